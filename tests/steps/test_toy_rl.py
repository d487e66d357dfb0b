"""Where the best policy is known, each algorithm comes near it (benchmarks/toy_rl.py)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

_SPEC = importlib.util.spec_from_file_location("toy_rl", Path(__file__).parents[2] / "benchmarks" / "toy_rl.py")
toy_rl = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(toy_rl)


def test_all_answers_are_there_once():
    said = toy_rl.answers()
    assert len({tuple(row) for row in said}) == len(said) == 1 + 4 * 5
    whole = toy_rl.rollout_batch(np.repeat(toy_rl.PROMPTS, len(said), axis=0), np.tile(said, (2, 1)))
    params = toy_rl.init_params(toy_rl.SPEC, toy_rl.jax.random.key(0))
    sums = np.exp(toy_rl.log_probabilities(params, whole)).reshape(2, -1).sum(axis=1)
    np.testing.assert_allclose(sums, 1.0, atol=1e-5)


@pytest.mark.parametrize("name", ["PPO", "RLOO", "GRPO"])
def test_it_comes_near_the_optimum(name):
    run = toy_rl.learn(name, 200, 0)
    assert run["reference"] < 0.2 * run["optimum"] < run["optimum"]
    assert max(run["values"]) <= run["optimum"] + 1e-6  # nothing is better than the best
    assert toy_rl.missing(run) < 0.04 and run["kl"] < 0.05
