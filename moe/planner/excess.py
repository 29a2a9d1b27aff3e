"""Instructions that keep a step above its floor, by the seconds that each takes beyond its own limit.

The limit of an instruction is its FLOPs at peak or its bytes at memory bandwidth, the longer; of an exchange that the
device waits for, nothing. Kernels are priced anew from their counts; other instructions are those that were kept.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from moe.planner import attention, counts, kernels, network, row_movement, timeline
from moe.planner.exchanges import Exchange
from moe.planner.kinds import KINDS
from moe.planner.records import Item

#: Share of its floor below which a plan names the instructions that take it there.
NEAR = 0.75

_KEPT = 8

#: Grouped matmuls in words, by :attr:`moe.planner.records.GroupedMatmul.kind`.
_KERNELS = {
    "rows": "the experts' products of rows",
    "activated": "the experts' products with the nonlinearity",
    "gradients": "the experts' products with its gradient",
    "weights": "the gradients of the experts' matrices",
}


@dataclasses.dataclass(frozen=True)
class Excess:
    """Alike instructions of a step.

    Attributes:
        name: of the kernel with its sizes, of the operation, or of the exchange.
        seconds: of a step.
        least: seconds at the instructions' own limit, 0 for an exchange that the device waits for.
    """

    name: str
    seconds: float
    least: float

    @property
    def beyond(self) -> float:
        """Seconds above the limit."""
        return self.seconds - self.least

    def words(self) -> str:
        """Phrase with the time and the limit."""
        if not self.least:
            return f"{self.seconds:.3g} s waiting for {self.name}"
        return f"{self.seconds:.3g} s in {self.name}, {self.seconds / self.least:.1f} times its limit"


def of_items(items: Sequence[Item], peak: float, bandwidth: float) -> list[counts.Work]:
    """:attr:`moe.planner.counts.Counts.work` of instructions.

    Args:
        items: those that are neither kernels nor moved rows.
        peak: FLOP/s.
        bandwidth: bytes/s of the memory.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        operation = "/".join(re.sub(r"[\s`|]", "", item.source).split("/")[-2:]) or "unnamed"
        groups.setdefault(f"{timeline.part(item)}, {item.where}, {operation}", []).append(item)
    found = []
    for name, alike in groups.items():
        longest = max(alike, key=lambda item: item.seconds * item.count)
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        # The bytes of a nested fusion's operand count as a whole, also where it slices it.
        least = sum(min(max(item.flops / peak, item.bytes / bandwidth), item.seconds) * item.count for item in alike)
        seconds = sum(item.seconds * item.count for item in alike)
        found.append(counts.Work(name=f"{name} ({longest.name}{more})", seconds=seconds, least=least))
    return sorted(found, key=lambda work: work.least - work.seconds)[:_KEPT]


def of_exchanges(exchanges: Sequence[Exchange]) -> dict[str, float]:
    """:attr:`moe.planner.counts.Counts.waits` of exchanges."""
    waits: dict[str, float] = {}
    for exchange in exchanges:
        if exchange.exposed_seconds:
            name = f"{exchange.kind} over {'+'.join(exchange.axes) or 'all devices'}, {exchange.purpose}"
            waits[name] = waits.get(name, 0.0) + network.USABLE * exchange.exposed_seconds
    return waits


def of_step(step: counts.Counts, kind: str) -> list[Excess]:
    """Instructions of a step by today's prices, the farthest above their limits first.

    Args:
        step: its counts.
        kind: of the chip, such as "v5p".
    """
    chip = KINDS[kind]
    found = [Excess(work.name, work.seconds, work.least) for work in step.work]
    for key, runs in step.matmuls.items():
        matmul = counts.matmul_of(key)
        rows, k, n, experts = matmul.sizes
        name = f"{_KERNELS[matmul.kind]}, {rows} rows and {experts} matrices of {k} x {n}"
        seconds = kernels.price(matmul, rows, chip).seconds
        found.append(Excess(name, runs * seconds, runs * kernels.roofline(matmul, rows, chip)))
    for key, flops in step.attention.items():
        where, *layer = key.split()
        tokens, dims, window = map(int, layer)
        times, _, _, computed, _ = attention.mean(kind, where, [(tokens, dims, window)])
        scores = flops / chip.device_peak
        name = f"attention's kernel, {where}, {tokens} tokens" + (f" in windows of {window}" if window else "")
        found.append(Excess(name, times * scores, computed * scores))
    if step.rows:
        moved = row_movement.price(kind).seconds
        found.append(Excess("rows moved by index", moved * step.rows, step.rows))
    waits = step.waits or ({"exchanges (not kept apart)": step.waited} if step.waited else {})
    found += [Excess(name, seconds / network.USABLE, 0.0) for name, seconds in waits.items()]
    if not step.work:
        found.append(Excess("all other work (not kept apart)", step.rest, step.rest_least))
    return sorted(found, key=lambda each: -each.beyond)


def reasons(step: counts.Counts, kind: str, seconds: float, limits: dict[str, float], most: int = 5) -> list[str]:
    """Phrases on what takes a step to less than :data:`NEAR` of its floor, the largest first; none for a step nearer.

    Args:
        step: its counts; kind: of the chip.
        seconds: of the step; limits: from :func:`moe.planner.counts.limits`.
        most: number of phrases.
    """
    if not limits or max(limits.values()) >= NEAR * seconds:
        return []
    return [each.words() for each in of_step(step, kind)[:most] if each.beyond > 0]
