"""Counts of a compiled step that today's prices turn into its time, small enough to keep with a plan.

A compiled program does not change, prices do. Kernels are kept as sizes and runs, moved rows and awaited exchanges as
seconds at the whole bandwidth, and all other work as the seconds that the compiler estimates, so that a kept plan is
priced again in a moment and without a compiler. Two things are taken as they were counted: which work an exchange is
hidden beside, and the compiler's estimates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import cast

import pydantic

from moe.dispatch.backends.tpu_tiles import Kind
from moe.planner import attention, kernels, network, row_movement
from moe.planner.kinds import KINDS
from moe.planner.records import GroupedMatmul, Item
from moe.system.foreign_files import Amount, Fields


class Work(Fields):
    """Alike instructions among :attr:`Counts.rest`.

    Attributes:
        name: pass, part of the model, JAX's operation and the longest instruction.
        seconds: of a step.
        least: seconds of their FLOPs at peak or of their bytes at memory bandwidth, the longer.
    """

    name: str
    seconds: Amount
    least: Amount


class Counts(Fields):
    """Counts of a step on one device.

    Attributes:
        matmuls: runs a step of each grouped matmul, by "kind kernel rows K N experts bytes", with the rows that a
            balanced router fills (:class:`moe.planner.records.GroupedMatmul`).
        attention: FLOPs a step of all T² scores, by "pass tokens dims window" of its layers.
        rows: seconds of rows moved by a TPU's SparseCore, each read and written once at memory bandwidth.
        rest: seconds of all other work.
        rest_least: seconds of its matrix products at peak.
        waited: seconds of exchange that the device waits for, at the whole of the links' bandwidth.
        memory: seconds of all bytes that the work reads and writes, at memory bandwidth; 0: not kept.
        links: seconds of all exchanges on the busiest kind of link, at the whole of its bandwidth; 0: not kept.
        work: instructions of ``rest`` that take longest beyond their own limits; []: not kept.
        waits: parts of ``waited``, by "kind over axes, purpose"; {}: not kept.
    """

    matmuls: dict[str, Amount]
    attention: dict[str, Amount]
    rows: Amount
    rest: Amount
    rest_least: Amount
    waited: Amount
    memory: Amount = 0.0
    links: Amount = 0.0
    work: list[Work] = pydantic.Field(default_factory=list)
    waits: dict[str, Amount] = pydantic.Field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Priced:
    """Seconds of a step by a set of prices.

    Attributes:
        kernels, kernels_low, kernels_high: of kernels and moved rows, and at the ends of their intervals.
        work: of everything on the device.
        exposed: of exchange that it waits for.
        peak: of all its FLOPs at peak.
    """

    kernels: float
    kernels_low: float
    kernels_high: float
    work: float
    exposed: float
    peak: float

    @property
    def counted(self) -> float:
        """Seconds of the step."""
        return self.work + self.exposed

    @property
    def floor(self) -> float:
        """A bound of the step from below: its FLOPs at peak, and the awaited exchange at full bandwidth."""
        return self.peak + network.USABLE * self.exposed

    @property
    def bound(self) -> str:
        """The largest part of the step, in words."""
        parts = {
            "matrix products at peak": min(self.peak, self.work),
            "the rest of the chip's work (memory, padding, vector units)": max(self.work - self.peak, 0.0),
            "exposed exchange": self.exposed,
        }
        worst = max(parts, key=lambda part: parts[part])
        return f"{worst}, {100 * parts[worst] / self.counted:.0f} % of the step"


def matmuls(grouped: Iterable[tuple[GroupedMatmul, int]]) -> dict[str, float]:
    """:attr:`Counts.matmuls` of kernels and the rows that each fills."""
    found: dict[str, float] = {}
    for matmul, rows in grouped:
        sizes = max(rows, 1), *matmul.sizes[1:]
        key = " ".join(map(str, (matmul.kind, matmul.kernel, *sizes, matmul.itemsize)))
        found[key] = found.get(key, 0.0) + matmul.count
    return found


def matmul_of(key: str) -> GroupedMatmul:
    """The kernel of a key of :attr:`Counts.matmuls`, its buffer as large as its filled rows."""
    kind, kernel, *sizes = key.split()
    rows, k, n, experts, itemsize = map(int, sizes)
    return GroupedMatmul(cast("Kind", kind), (rows, k, n, experts), (0, 0, 0), itemsize, 1, kernel)


def scores(items: Sequence[Item], name: str, layers: Sequence[attention.Layer]) -> dict[str, float]:
    """:attr:`Counts.attention` of attention's kernels, which alike layers share evenly.

    Args:
        items: of the program.
        name: of the chip.
        layers: of the model, from :func:`moe.planner.attention.layers`.
    """
    found: dict[str, float] = {}
    for where in ("forward", "backward"):
        flops = sum(
            item.flops * item.count
            for item in items
            if item.kind == "attention" and (item.where == "backward") == (where == "backward")
        )
        if not flops:
            continue
        computed = attention.mean(name, where, layers)[3]
        for tokens, dims, window in layers:
            key = f"{where} {tokens} {dims} {window}"
            found[key] = found.get(key, 0.0) + flops / computed / len(layers)
    return found


def price(counts: Counts, name: str) -> Priced:
    """Seconds of a step by today's prices.

    Args:
        counts: of the step.
        name: of the chip, such as "v5p".
    """
    chip = KINDS[name]
    peak = chip.device_peak
    seconds = low = high = least = 0.0
    for key, runs in counts.matmuls.items():
        matmul = matmul_of(key)
        made = kernels.price(matmul, matmul.sizes[0], chip)
        seconds += runs * made.seconds
        low += runs * made.low
        high += runs * made.high
        least += runs * made.least
    for key, flops in counts.attention.items():
        where, *layer = key.split()
        tokens, dims, window = map(int, layer)
        times, times_low, times_high, computed, _ = attention.mean(name, where, [(tokens, dims, window)])
        seconds += times * flops / peak
        low += times_low * flops / peak
        high += times_high * flops / peak
        least += computed * flops / peak
    moved = row_movement.price(name)
    seconds += moved.seconds * counts.rows
    low += moved.low * counts.rows
    high += moved.high * counts.rows
    exposed = counts.waited / network.USABLE
    return Priced(seconds, low, high, seconds + counts.rest, exposed, least + counts.rest_least)


def limits(counts: Counts, priced: Priced) -> dict[str, float]:
    """Seconds that a step needs at least: of its FLOPs at peak, of its bytes at memory bandwidth, of its exchanges on
    the busiest links. Those that were not kept are left out."""
    found = {"peak": priced.peak, "memory": counts.memory, "links": counts.links}
    return {name: seconds for name, seconds in found.items() if seconds}


def share_words(limits: dict[str, float], step: float) -> str:
    """Share of a step that the largest of its limits is, as a phrase."""
    if not limits:
        return "not kept"
    largest = max(limits, key=lambda name: limits[name])
    missing = {"peak", "memory", "links"} - set(limits)
    words = f"{100 * limits[largest] / step:.0f} % ({largest})"
    return f"at least {words}" if missing else words
