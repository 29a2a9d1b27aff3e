"""Contents of a compiled program, read from its text: collectives, estimated work, copies, kernels without estimate.

Everything is the compiler's own statement except trip counts, which are read from loop conditions. A loop's body stands
once in the text; its instructions count as often as the loop runs. A fusion counts as one instruction unless XLA put a
collective into it (a reduce-scatter on TPUs is a fusion around an all-reduce).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

from moe.dispatch.exchange import OVERFLOW_SCOPE
from moe.planner import hlo, liveness, work
from moe.planner.hlo import Instruction, array_bytes
from moe.planner.records import HOST, KINDS, Collective, CompiledProgram, GroupedMatmul, Item, Price

#: ``estimated_cycles`` of a TPU fusion that the compiler has no model for, such as those on the SparseCore.
_UNKNOWN_CYCLES = 2**63 - 1

_NO_PRICE = Price(0.0, 0.0, 0.0, "")
_AT_BANDWIDTH = Price(1.0, 1.0, 1.0, "memory bandwidth")


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of a device.

    Attributes:
        memory_bandwidth: bytes/s.
        peak: FLOP/s.
        matmuls: FLOP/s of matmuls, instead of the compiler's estimates; 0: those.
        condition: seconds that the device waits for the host at a loop's condition, if that depends on the data.
        float8: FLOP/s of matmuls of float8 on GPUs.
        loss_share: of the peak, that matmuls of the loss reach at most.
        rows: time of moving rows by index, for a second that reading and writing them once takes.
    """

    memory_bandwidth: float = math.inf
    peak: float = math.inf
    matmuls: float = 0.0
    condition: float = 0.0
    float8: float = math.inf
    loss_share: float = 1.0
    rows: Price = _AT_BANDWIDTH


def _times(price: Price, factor: float) -> Price:
    return Price(price.seconds * factor, price.low * factor, price.high * factor, price.basis)


_KernelPrice = Callable[[GroupedMatmul], Price]
_AttentionPrices = Callable[[Sequence[Item]], Mapping[str, Price]]

#: Trips of a loop whose count depends on the data, by JAX's name of it; None: unknown.
_Trips = Callable[[str], int | None]


def read(
    text: str,
    mesh: Mapping[str, int],
    clock: float,
    kernel_price: _KernelPrice = lambda matmul: _NO_PRICE,
    rates: Rates | None = None,
    attention_prices: _AttentionPrices = lambda kernels: {},
    trips: _Trips = lambda name: None,
) -> CompiledProgram:
    """Read a scheduled module.

    Args:
        text: ``compiled.as_text()``.
        mesh: devices per axis, in the order of the mesh's axes.
        clock: Hz, of the cycles in the text.
        kernel_price: of a grouped matmul, which counts as work beside exchanges only.
        rates: of the device, for work without an estimate; None: such work takes no time.
        attention_prices: all attention kernels of the program → prices by name, which count as kernel_price does. A
            kernel's price depends on the others, whose FLOPs the text does not state.
        trips: of loops that the text does not state.
    """
    module, rates = hlo.parse(text), rates or Rates()
    reader = _Reader(module, mesh, clock, kernel_price, rates, {}, trips)
    seconds, _ = reader.walk(module.entry, 1)
    if prices := attention_prices([item for item in reader.items if item.kind == "attention"]):
        reader = _Reader(module, mesh, clock, kernel_price, rates, prices, trips)
        reader.walk(module.entry, 1)
    return CompiledProgram(
        tuple(reader.collectives),
        seconds,
        reader.parts,
        reader.unpriced,
        reader.unpriced_bytes,
        reader.unknown_loops,
        tuple(reader.grouped),
        tuple(reader.copies),
        tuple(reader.items),
        tuple(reader.loops),
        module.entry,
        liveness.at_peak(module),
    )


@dataclasses.dataclass
class _Scope:
    """Progress in one computation.

    Attributes:
        name: of the computation.
        types: result type of each instruction.
        times: runs of the computation in a step.
        seconds: estimated work of one run so far, without kernels.
        clock: the same with kernels.
        place: number of instructions so far.
        started: carriers of collectives that are not done, the collective inside, ``clock`` and ``place`` at their
            start.
        carried: by channel, what starts a collective that fusions carry on, and the fusions' seconds so far.
        sent: transfers between slices that are not done, by rendezvous, ``clock`` and ``place`` at their start.
        received: receives that are not done.
    """

    name: str
    types: Mapping[str, str]
    times: int
    seconds: float = 0.0
    clock: float = 0.0
    place: int = 0
    started: dict[str, tuple[Instruction, Instruction, float, int]] = dataclasses.field(default_factory=dict)
    carried: dict[str, tuple[Instruction, float]] = dataclasses.field(default_factory=dict)
    sent: dict[str, tuple[Instruction, float, int]] = dataclasses.field(default_factory=dict)
    received: dict[str, Instruction] = dataclasses.field(default_factory=dict)

    def spend(self, seconds: float, clock: float) -> None:
        """Add estimated work without and with kernels."""
        self.seconds += seconds
        self.clock += clock

    def operand_bytes(self, instruction: Instruction, stop: int | None = None) -> list[int]:
        """Bytes of each operand, or of the first ``stop`` of them."""
        return [array_bytes(self.types.get(name, "")) for name in instruction.operands[:stop]]


class _Reader:
    """Walk over the computations of a module; its public attributes are those of :class:`CompiledProgram`."""

    def __init__(
        self,
        module: hlo.Module,
        mesh: Mapping[str, int],
        clock: float,
        kernel_price: _KernelPrice,
        rates: Rates,
        attention_prices: Mapping[str, Price],
        trips: _Trips,
    ):
        self.module = module
        self._mesh = mesh
        self._clock = clock
        self._kernel_price = kernel_price
        self._rates = rates
        self._attention_prices = attention_prices
        self._balanced_trips = trips
        self.items: list[Item] = []
        self.loops: list[tuple[str, str, int, float]] = []
        self.collectives: list[Collective] = []
        self.grouped: list[GroupedMatmul] = []
        self.copies: list[tuple[int, int, str]] = []
        self.parts: dict[tuple[str, str], float] = {}
        self.unpriced = self.unpriced_bytes = self.unknown_loops = 0
        self._pass = "forward"
        self._products = work.Products(module)

    def walk(self, name: str, times: int) -> tuple[float, float]:
        """Record a computation that runs ``times`` times a step; returns the estimated seconds of one run, without and
        with kernels."""
        instructions = self.module.computations.get(name, ())
        scope = _Scope(name, {instruction.name: instruction.type for instruction in instructions}, times)
        for scope.place, instruction in enumerate(instructions):
            self._visit(instruction, scope)
        return scope.seconds, scope.clock

    def _visit(self, instruction: Instruction, scope: _Scope) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            trips = self._trips(instruction, scope)
            self.loops.append((scope.name, instruction.attribute("body"), trips, scope.clock))
            seconds, clock = self.walk(instruction.attribute("body"), scope.times * trips)
            scope.spend(trips * seconds, trips * clock)
        elif opcode == "conditional":
            branches = re.findall(r"%([\w.\-]+)", instruction.attributes.partition("branch_computations=")[2])
            known = [branch for branch in branches if branch in self.module.computations]
            share = work.branch_share(instruction)
            dearest = max((self.walk(branch, round(scope.times * share)) for branch in known), default=(0.0, 0.0))
            scope.spend(*(seconds * share for seconds in dearest))
        elif opcode == "call":
            scope.spend(*self.walk(instruction.attribute("to_apply"), scope.times))
        elif inner := self._collective_in(instruction):
            self._visit_collective(instruction, inner, scope)
        elif opcode == "call-update" and instruction.operands[0] in scope.started:
            # A SparseCore waits from call-start on for its operands, which the update gives it.
            _, inner, *_ = scope.started.pop(instruction.operands[0])
            scope.started[instruction.name] = instruction, inner, scope.clock, scope.place
        elif opcode.endswith("-done"):
            self._visit_done(instruction, scope)
        elif opcode == "send" and "_xla_megascale_transfer_type" in instruction.attributes:
            scope.sent[work.slice_attribute(instruction, "rendezvous")] = instruction, scope.clock, scope.place
        elif opcode == "recv":
            scope.received[instruction.name] = instruction
        else:
            self._visit_work(instruction, scope)

    def _trips(self, loop: Instruction, scope: _Scope) -> int:
        trips = hlo.trip_count(loop, self.module)
        if trips is not None:
            return trips
        # Further exchange rounds are never needed by a balanced router.
        trips = 0 if re.search(rf"\b{OVERFLOW_SCOPE}\)*/", loop.op_name) else self._balanced_trips(loop.op_name)
        if trips is None:
            self.unknown_loops += 1
            trips = 1
        if self._rates.condition:
            seconds = (trips + 1) * self._rates.condition
            self._note(loop, scope, "other", Price(seconds, seconds, seconds, "assumed"))
            scope.spend(seconds, seconds)
        return trips

    def _collective_in(self, instruction: Instruction) -> Instruction | None:
        """The collective that an instruction is, or that is inside its fusion or asynchronous computation."""
        if instruction.opcode.removesuffix("-start") in KINDS or work.is_host_transfer(instruction):
            return instruction
        if instruction.opcode not in ("fusion", "async-start", "call-start"):
            return None
        return self._hidden_collective(instruction)

    def _hidden_collective(self, instruction: Instruction) -> Instruction | None:
        for inner in self.module.called(instruction, "to_apply" if "call" in instruction.opcode else "calls"):
            if inner.opcode.removesuffix("-start") in KINDS:
                return inner
            if inner.opcode in ("fusion", "call") and (found := self._hidden_collective(inner)):
                return found
        return None

    def _visit_collective(self, carrier: Instruction, inner: Instruction, scope: _Scope) -> None:
        if carrier.opcode.endswith("-start"):
            scope.started[carrier.name] = carrier, inner, scope.clock, scope.place
            return
        if stage := work.stage_in_fusions(carrier, inner, self.module):
            self._visit_stage(stage, carrier, inner, scope)
            return
        self._record(carrier, inner, scope, scope.clock, scope.place, -1.0)
        if carrier.opcode == "fusion" and inner.opcode == "all-gather":  # a matmul with the gather inside
            self._spend(carrier, self._estimate(carrier) or 0.0, scope)

    def _visit_stage(self, stage: str, carrier: Instruction, inner: Instruction, scope: _Scope) -> None:
        """Visit a part of a collective that several fusions carry on. It advances within them alone, so that it takes
        the link as if they all came right before its end."""
        channel, before = inner.attribute("channel_id"), scope.clock
        if stage == "step":
            self._visit_work(carrier, scope)
        without_state = dataclasses.replace(carrier, type=inner.type)
        start, seconds = scope.carried.pop(channel, (without_state, 0.0))
        seconds += scope.clock - before
        if stage == "done":
            self._record(start, inner, scope, scope.clock - seconds, scope.place, seconds)
        else:
            scope.carried[channel] = start, seconds

    def _visit_done(self, instruction: Instruction, scope: _Scope) -> None:
        first = instruction.operands[0] if instruction.operands else ""
        if first in scope.received:
            received = scope.received.pop(first)
            started = scope.sent.pop(work.slice_attribute(received, "rendezvous"), None)
            if started:
                self._record_between_slices(received, scope, *started)
        elif first in scope.started:
            carrier, inner, started, place = scope.started.pop(first)
            self._record(carrier, inner, scope, started, place, scope.clock - started)

    def _record(
        self, carrier: Instruction, inner: Instruction, scope: _Scope, started: float, place: int, overlap: float
    ) -> None:
        """Record a collective that is done: ``clock`` and ``place`` at its start, and the work beside it."""
        where = scope.name, (place, scope.place), started
        if work.is_host_transfer(carrier):
            self._record_host_transfer(carrier, scope, overlap, where)
            return
        kind = inner.opcode.removesuffix("-start")
        named, group = hlo.first_group(inner.attributes)
        axes = named if named and set(named) <= set(self._mesh) else hlo.group_axes(group, self._mesh)
        axes = tuple(axis for axis in axes if self._mesh.get(axis, 1) > 1)
        result, inputs = array_bytes(carrier.type), sum(scope.operand_bytes(carrier))
        if carrier.opcode == "call-update":  # (call-start, operands...) → ((operands...), results...)
            inputs -= scope.operand_bytes(carrier, 1)[0]
            result -= inputs
        # XLA pads parts that are no multiple of the network's unit: [4096] to 8 times [520].
        if kind == "all-reduce" and carrier.opcode == "fusion" and len(group) > 1 and result * len(group) < 2 * inputs:
            kind = "reduce-scatter"
        size = inputs or result
        if kind == "ragged-all-to-all":
            # The operands are rows, a buffer for those that arrive, and offsets; a balanced load fills the smaller.
            size = min(scope.operand_bytes(carrier, 2))
        if kind == "all-gather":
            # The result of a start is (operands, results, ...).
            size = result - inputs if inner.opcode.endswith("-start") and result > inputs else result
        source = carrier.op_name or inner.op_name
        rings = work.one_way_rings(inner, len(group))
        self.collectives.append(Collective(kind, axes, group, size, scope.times, overlap, source, *where, rings))

    def _record_host_transfer(
        self, carrier: Instruction, scope: _Scope, overlap: float, where: tuple[str, tuple[int, int], float]
    ) -> None:
        """Record a copy, or an update or slice of an array in the host's memory, of which only that part moves."""
        from_host = work.IN_HOST in scope.types.get(carrier.operands[0], "")
        if work.updates_host(carrier):
            kind, size = "to", scope.operand_bytes(carrier)[1]
        else:
            kind, size = "from" if from_host else "to", array_bytes(carrier.type) - sum(scope.operand_bytes(carrier))
        self.collectives.append(Collective(kind, (HOST,), (), size, scope.times, overlap, carrier.op_name, *where))

    def _record_between_slices(
        self, received: Instruction, scope: _Scope, sent: Instruction, started: float, place: int
    ) -> None:
        """Record an exchange between TPU slices: a send and a receive through the hosts, without JAX's names."""
        kind = work.slice_attribute(sent, "transfer_type").lower().replace("_", "-")
        # The type of a receive is (array, ...).
        carried = received.type[1:].partition("{")[0] if kind == "all-gather" else scope.types.get(sent.operands[0], "")
        # Only the first axis of the mesh spans slices (moe.parallel.mesh).
        axis, *inner = self._mesh
        stride = math.prod(self._mesh[name] for name in inner)
        group = tuple(range(0, self._mesh[axis] * stride, stride))
        overlap, where = scope.clock - started, ("between slices", scope.name, (place, scope.place), started)
        self.collectives.append(Collective(kind, (axis,), group, array_bytes(carried), scope.times, overlap, *where))

    def _visit_work(self, instruction: Instruction, scope: _Scope) -> None:
        kernel, types = work.kernel_of(instruction, self.module, scope.types)
        matmul = None if kernel is None else work.grouped_matmul(kernel, types)
        if matmul is not None:
            self.grouped.append(dataclasses.replace(matmul, count=scope.times))
            price = self._kernel_price(self.grouped[-1])
            self._note(instruction, scope, "grouped matmul", price, price.flops)
            scope.clock += price.seconds
            return
        if kernel is not None and re.search(r"__cudnn\$fmha|tpu_custom_call", kernel.attributes):
            price = self._attention_prices.get(instruction.name, _NO_PRICE)
            flops = price.flops or work.attention_flops(kernel, types)
            self._note(instruction, scope, "attention", price, flops)
            scope.clock += price.seconds
            return
        if instruction.opcode == "copy" and array_bytes(instruction.type) >= 2**20:
            self.copies.append((array_bytes(instruction.type), scope.times, instruction.op_name))
        # Asynchronous calls to the SparseCore and copies on GPUs have no estimate.
        estimate = None if instruction.opcode in ("call-start", "fusion-start") else self._estimate(instruction)
        if estimate is None:
            moved = work.moved_bytes(instruction, self.module, scope.types)
            self.unpriced += scope.times
            self.unpriced_bytes += scope.times * moved
            rows = work.moves_rows(instruction)
            price = _times(self._rates.rows if rows else _AT_BANDWIDTH, moved / self._rates.memory_bandwidth)
            self._note(instruction, scope, "row movement" if rows else "no estimate", price)
        elif estimate:
            self._spend(instruction, estimate, scope)

    def _note(
        self, instruction: Instruction, scope: _Scope, kind: str, price: Price, flops: float | None = None
    ) -> None:
        """Keep an instruction's time, work and place."""
        moved = work.traffic(instruction, self.module, scope.types)
        if flops is None:
            flops = self._products.flops(instruction, scope.types)
        where = work.pass_of(instruction.op_name) or self._pass
        item = Item(
            instruction.name, kind, where, instruction.op_name, price.seconds, scope.times, flops, moved, scope.name,
            scope.clock, price.low, price.high, price.basis, price.least,
        )  # fmt: skip
        self.items.append(item)

    def _estimate(self, instruction: Instruction) -> float | None:
        """The compiler's seconds; 0 without an estimate, None for an estimate that says "unknown"."""
        found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if not found:
            return work.gpu_estimate(instruction, self._products, self._rates.float8)
        cycles = int(found.group(1))
        return None if cycles == _UNKNOWN_CYCLES else cycles / self._clock

    def _spend(self, instruction: Instruction, seconds: float, scope: _Scope) -> None:
        """Book estimated work; an instruction without a name belongs to the pass of the one before it."""
        self._pass = work.pass_of(instruction.op_name) or self._pass
        product = instruction.opcode in work.PRODUCTS or self._products.has(instruction.attribute("calls"))
        at_peak = 0.0
        if product:
            flops = self._products.flops(instruction, scope.types)
            in_bytes = self._products.factor_types(instruction, scope.types) <= work.BYTES
            at_peak = flops / (self._rates.peak * (2 if in_bytes else 1))
            best = self._rates.loss_share if work.of_loss(instruction) else 1.0
            seconds = flops / self._rates.matmuls if self._rates.matmuls else max(seconds, at_peak / best)
        part = self._pass, "matmuls" if product else "other"
        self.parts[part] = self.parts.get(part, 0.0) + seconds * scope.times
        price = Price(seconds, seconds, seconds, "the compiler's estimate", least=at_peak)
        self._note(instruction, scope, "matmul" if product else "other", price)
        scope.spend(seconds, seconds)
