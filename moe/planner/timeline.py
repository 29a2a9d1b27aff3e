"""Where a step's time goes: by part of the model, by instruction, and in the order of the schedule."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from moe.dispatch.backends.row_blocks import SCOPE as BLOCKS_SCOPE
from moe.parallel.parameters import WEIGHTS_SCOPE
from moe.planner import exchanges
from moe.planner.chips import Chip
from moe.planner.gpus import Gpu
from moe.planner.records import Collective, CompiledProgram, Item
from moe.training.losses import LOSS_SCOPE

#: Parts of a model by JAX's scopes and the names of einsums, the first match counts.
_PARTS = (
    (rf"\({LOSS_SCOPE}\)|/{LOSS_SCOPE}/", "loss and unembedding"),
    (r"embedding", "embedding"),
    (r"\bcross_attention\b", "cross-attention"),
    (r"btd,dnh->btnh|btnh,nhd->btd|\battention\b(?!\.)|dot_product_attention|splash", "attention"),
    (rf"\b{BLOCKS_SCOPE}_", "experts"),
    (r"shard_map|\bmoe\b|expert_load|gsd,|gse", "MoE"),
    (r"\bffn\b", "dense FFN"),
)


def part(item: Item) -> str:
    """The part of the model that an instruction belongs to."""
    if item.kind in ("grouped matmul", "attention"):
        return "experts" if item.kind == "grouped matmul" else "attention"
    if item.where == "update":
        return "optimizer"
    source = re.sub(rf"{WEIGHTS_SCOPE}[\w.]+", lambda name: name.group().rsplit(".", 1)[0], item.source)
    return next((name for pattern, name in _PARTS if re.search(pattern, source)), "layers, the rest")


def by_part(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Seconds of a step by part of the model and kind of work, the largest first."""
    seconds: dict[tuple[str, str], float] = {}
    for item in items:
        key = part(item), item.kind
        seconds[key] = seconds.get(key, 0.0) + item.seconds * item.count
    rows = [{"part": where, "kind": kind, "seconds": value} for (where, kind), value in seconds.items()]
    return sorted(rows, key=lambda row: -row["seconds"])


def dearest(
    items: Sequence[Item],
    peak: float,
    bandwidth: float,
    waited: Sequence[exchanges.Exchange] = (),
    limit: int = 30,
) -> list[dict[str, Any]]:
    """Instructions and exchanges that take most of a step, equal ones together, with their bounds.

    Args:
        items: of the program.
        peak: FLOP/s of a device.
        bandwidth: bytes/s of its memory.
        waited: exchanges, which take the time that the device waits for them, at the network's bandwidth.
        limit: number of rows.
    """
    groups: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        groups.setdefault((item.kind, item.where, item.source, item.flops, round(item.seconds, 9)), []).append(item)
    rows = []
    for same in groups.values():
        first, runs = same[0], sum(item.count for item in same)
        limits = {"FLOPs": first.flops / peak, "HBM": first.bytes / bandwidth}
        bound = max(limits, key=lambda name: limits[name])
        rows.append(
            {
                "name": first.name, "part": part(first), "kind": first.kind, "pass": first.where,
                "source": first.source, "seconds": first.seconds * runs, "low": first.low * runs,
                "high": first.high * runs, "runs": runs, "flops": first.flops, "bytes": first.bytes, "bound": bound,
                "at_bound": limits[bound] / first.seconds if first.seconds else 0.0, "basis": first.basis,
            }
        )  # fmt: skip
    for exchange in waited:
        if exchange.exposed_seconds > 0:
            seconds = exchange.exposed_seconds
            rows.append(
                {
                    "name": exchange.kind, "part": "exchange", "kind": "exposed exchange",
                    "pass": f"over {'+'.join(exchange.axes)}", "source": f"{exchange.kind}, {exchange.purpose}",
                    "seconds": seconds, "low": seconds, "high": seconds, "runs": exchange.count, "flops": 0.0,
                    "bytes": exchange.bytes, "bound": "network", "at_bound": 1.0, "basis": "network model",
                }
            )  # fmt: skip
    return sorted(rows, key=lambda row: -row["seconds"])[:limit]


def lanes(program: CompiledProgram, devices: Sequence[Any], chip: Chip | Gpu, limit: int = 3) -> list[dict[str, Any]]:
    """The computations that take most time, one run of each: work on the device, and exchanges beside it.

    Returns:
        For each: name, runs a step, seconds of a run, and lists of [start, seconds, kind, label] of its work and of
        [start, seconds, wait, label] of its exchanges; the device waits that long at the end of an exchange.
    """
    durations, waits = exchanges.timed(program.collectives, devices, chip)
    lanes = {name: _Lane(name) for name in {item.computation for item in program.items} | {program.entry}}
    for item in program.items:
        lanes[item.computation].runs = item.count
        if item.seconds > 0:
            lanes[item.computation].work.append((item.started, item.seconds, item.kind, part(item)))
    for collective, duration, wait in zip(program.collectives, durations, waits, strict=True):
        if collective.computation in lanes and collective.count:
            lanes[collective.computation].exchanges.append((collective, duration, wait))
    for computation, body, trips, started in reversed(program.loops):  # the inner ones first
        if computation in lanes and body in lanes and trips:
            lanes[computation].loops.append((started, trips, lanes[body]))
    rows = [lane.to_json() for lane in lanes.values()]
    return sorted(rows, key=lambda row: -row["runs"] * row["seconds"])[:limit]


@dataclasses.dataclass
class _Lane:
    """Events of one run of a computation, by the clock of its work, which does not count waits."""

    name: str
    runs: int = 1
    work: list[tuple[float, float, str, str]] = dataclasses.field(default_factory=list)
    exchanges: list[tuple[Collective, float, float]] = dataclasses.field(default_factory=list)
    loops: list[tuple[float, int, _Lane]] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def busy(self) -> float:
        """Seconds of work."""
        return sum(seconds for _, seconds, *_ in self.work) + sum(trips * body.busy for _, trips, body in self.loops)

    @functools.cached_property
    def waiting(self) -> float:
        """Seconds of waiting."""
        return sum(wait for *_, wait in self.exchanges) + sum(trips * body.waiting for _, trips, body in self.loops)

    def _delay(self, clock: float, place: int | None = None) -> float:
        """Waits before a time of the clock; those of exchanges that end at it count if they end before a place."""
        delay = sum(trips * body.waiting for started, trips, body in self.loops if started < clock)
        for collective, _, wait in self.exchanges:
            done = collective.started + max(collective.overlap_seconds, 0.0)
            if done <= clock and (place is None or collective.places[1] < place):
                delay += wait
        return delay

    def to_json(self) -> dict[str, Any]:
        """The lane with waits."""
        work = [[started + self._delay(started), seconds, kind, label] for started, seconds, kind, label in self.work]
        work += [
            [started + self._delay(started), trips * (body.busy + body.waiting), "loop", f"{trips} x {body.name}"]
            for started, trips, body in self.loops
        ]
        rows = [
            [
                collective.started + self._delay(collective.started, collective.places[0]),
                seconds,
                wait,
                f"{collective.kind}, {exchanges.purpose(collective)}",
            ]
            for collective, seconds, wait in self.exchanges
            if seconds > 0
        ]
        total = self.busy + self.waiting
        return {
            "name": self.name,
            "runs": self.runs,
            "seconds": total,
            "work": _merged(sorted(work)),
            "exchanges": rows,
        }


def _merged(work: list[list[Any]], limit: int = 300) -> list[list[Any]]:
    """The same with the shortest neighbours of one kind joined, so that a page stays small."""
    if not work:
        return work
    least = sum(entry[1] for entry in work) / limit
    merged = [list(work[0])]
    for start, seconds, kind, label in work[1:]:
        last = merged[-1]
        if kind == last[2] and seconds < least and last[1] < 4 * least:
            last[1] += seconds
            last[3] = last[3] if last[3] == label else "several"
        else:
            merged.append([start, seconds, kind, label])
    return merged
