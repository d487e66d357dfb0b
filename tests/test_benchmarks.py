"""The programs in benchmarks/ run, and compare what they claim to: the same tokens or losses on both sides."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("generate.py --model=tiny --quick", "tokens identical on both sides"),
        ("generate.py --model=tiny --quick --samples=4", "tokens identical on both sides"),
        ("sft.py --model=tiny --part=shape --quick", "losses"),
        ("ppo.py --quick", "here / "),
    ],
)
def test_a_comparison_with_torch_runs(program, says):
    name, *options = program.split()
    command = [sys.executable, str(ROOT / "benchmarks" / name), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert says in done.stdout and "torch" in done.stdout
