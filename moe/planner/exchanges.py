"""Collectives of a step, grouped by kind, axes and purpose, with their time by the network model."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe.config import MoEConfig
from moe.dispatch.exchange import LOAD_SCOPE, ROUND_SIZE, ROUTED_SCOPE
from moe.dispatch.hosts import balanced_visits
from moe.parallel.parameters import WEIGHTS_SCOPE
from moe.planner import network
from moe.planner.chips import Chip
from moe.planner.gpus import Gpu
from moe.planner.records import HOST, Collective, CompiledProgram
from moe.training.losses import LOSS_SCOPE

WEIGHTS, UNNAMED, LOADS, ROUTED = "weights", "unnamed", "loads of experts", "tokens to experts, back"
PASSED_ON = "microbatches to next stage"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind, over the same axes, for the same purpose.

    Attributes:
        purpose: "weights", "gradients of weights", "tokens to experts, back", or JAX's name of the operation.
        count: times a step.
        asynchronous: the part of ``count`` that is started and awaited apart.
        bytes: of one device's arrays, in a step.
        seconds: by the network model, in a step.
        exposed_seconds: the part of ``seconds`` with no work scheduled beside it.
    """

    kind: str
    axes: tuple[str, ...]
    purpose: str
    count: int
    asynchronous: int
    bytes: int
    seconds: float
    exposed_seconds: float


def summarise(program: CompiledProgram, devices: Sequence[Any], chip: Chip | Gpu) -> tuple[Exchange, ...]:
    """Add up the collectives of each kind, axes and purpose; the slowest first."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    durations, waits = timed(program.collectives, devices, chip)
    for collective, duration, waited in zip(program.collectives, durations, waits, strict=True):
        sums = groups.setdefault((collective.kind, collective.axes, purpose(collective)), [0, 0, 0, 0.0, 0.0])
        apart = int(collective.overlap_seconds >= 0)
        for i, value in enumerate((1, apart, collective.bytes, duration, waited)):
            sums[i] += value * collective.count
    found = [
        Exchange(kind, axes, name, int(count), int(apart), int(size), duration, waited)
        for (kind, axes, name), (count, apart, size, duration, waited) in groups.items()
    ]
    return tuple(sorted(found, key=lambda exchange: -exchange.seconds))


def balanced(collectives: Sequence[Collective], moe: MoEConfig, mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """The collectives with the bytes of balanced rows where tokens are exchanged by host and buffers hold more."""
    devices, choices = mesh["expert"], moe.experts_per_token
    hosts = moe.hosts(devices)
    if hosts == 1:
        return tuple(collectives)
    visits = balanced_visits(hosts, choices, getattr(moe.gate, "groups", 1), getattr(moe.gate, "kept_groups", 1))

    def with_rows(collective: Collective) -> Collective:
        if collective.kind != "ragged-all-to-all":
            return collective
        first, second = np.unravel_index(collective.group[:2], tuple(mesh.values()))[list(mesh).index("expert")]
        between = second - first == devices // hosts
        share = visits / min(hosts, choices) if between else 1 / ROUND_SIZE
        return dataclasses.replace(collective, bytes=round(collective.bytes * share))

    return tuple(map(with_rows, collectives))


def skewed(exchange: Exchange, skew: float) -> Exchange:
    """The exchange on the device that receives so many times the mean rows; the further time is exposed."""
    if exchange.purpose != ROUTED:
        return exchange
    further = exchange.seconds * (skew - 1)
    return dataclasses.replace(
        exchange, seconds=exchange.seconds + further, exposed_seconds=exchange.exposed_seconds + further
    )


def timed(
    collectives: Sequence[Collective], devices: Sequence[Any], chip: Chip | Gpu
) -> tuple[list[float], list[float]]:
    """Seconds of each collective, and those that the device waits for it."""
    durations = [network.seconds(collective, devices, chip) for collective in collectives]
    links = [network.link(collective, devices, chip) for collective in collectives]
    return durations, exposed(collectives, durations, links)


def busy(collectives: Sequence[Collective], devices: Sequence[Any], chip: Chip | Gpu) -> dict[str, float]:
    """Seconds a step that each kind of link carries exchanges (:func:`moe.planner.network.link`)."""
    seconds: dict[str, float] = {}
    for collective in collectives:
        link = network.link(collective, devices, chip)
        seconds[link] = seconds.get(link, 0.0) + collective.count * network.seconds(collective, devices, chip)
    return seconds


def exposed(collectives: Sequence[Collective], durations: Sequence[float], links: Sequence[str]) -> list[float]:
    """Seconds that the device waits for each collective: within a computation, those on one link use it one after
    another, in the order of their starts, beside the work scheduled between start and done. Those of less than 10
    microseconds wait for no other. While the device waits for one, those on other links go on."""
    waits, ends = [0.0] * len(collectives), [0.0] * len(collectives)
    events: dict[str, list[tuple[int, int, int]]] = collections.defaultdict(list)
    for i, collective in enumerate(collectives):
        events[collective.computation] += [(place, is_done, i) for is_done, place in enumerate(collective.places)]
    for happening in events.values():
        waited, free = 0.0, dict.fromkeys(links, 0.0)
        for _, is_done, i in sorted(happening):
            now = collectives[i].started + waited
            if not is_done and durations[i] < 1e-5:
                ends[i] = now + durations[i]
            elif not is_done:
                ends[i] = free[links[i]] = max(now, free[links[i]]) + durations[i]
            else:
                waits[i] = max(0.0, ends[i] - now - max(collectives[i].overlap_seconds, 0.0))
                waited += waits[i]
    return waits


def purpose(collective: Collective) -> str:
    """The purpose of a collective, from JAX's name of the operation it came from."""
    source = collective.source
    if collective.axes == (HOST,):
        return "arrays that are kept there"
    first = source.strip("()").partition(":")[0] if source.startswith("(") else source  # "(a:b)": combined collectives
    if WEIGHTS_SCOPE in source or first.startswith("state."):
        gathered = "transpose(" not in source or "rematted_computation" in source or collective.kind == "all-gather"
        return WEIGHTS if gathered else "gradients of weights"
    if re.search(rf"\b{ROUTED_SCOPE}\)*/", source):
        return ROUTED
    # A weight's gradient is named after the operation that makes it: a matmul or the embedding's sum over tokens; on
    # GPUs also after the transposition or the end of a shard_map that follows.
    made_by = "dot_general|scatter-add" + ("|transpose$|psum$" if collective.kind == "reduce-scatter" else "")
    if collective.kind != "all-gather" and "transpose(" in source and re.search(made_by, source):
        return "gradients of weights"
    if re.search(rf"\b{LOAD_SCOPE}\)*/", source):
        return LOADS
    if "all-to-all" in collective.kind and collective.axes == ("expert",):
        return ROUTED
    if collective.kind == "collective-permute" and collective.axes == ("pipeline",):
        return PASSED_ON
    if f"({LOSS_SCOPE})" in source:
        return "loss"
    return first.rsplit("/", 1)[-1].strip("()") or UNNAMED
