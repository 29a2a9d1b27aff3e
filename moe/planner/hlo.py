"""Reads a compiled TPU program's text: what it exchanges, how often, and how many cycles its compiler expects.

In: ``compiled.as_text()`` of a scheduled module and the sizes of the mesh. Out: a :class:`ProgramText`. Everything in
it is the compiler's own statement but the trip counts, which are read from loop conditions.

What TPU slices exchange goes through their hosts: a send and a receive that say for which collective. Programs of
several slices carry no names of JAX's on their collectives.

A loop's body stands once in the text; its instructions are multiplied by the loop's trip count. Fusions are one
instruction: their insides are not walked, except where XLA hides a collective there (its reduce-scatter is a fusion
around an all-reduce).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from moe.dispatch.ragged_exchange import OVERFLOW_SCOPE

_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0}


_UNKNOWN_CYCLES = (
    2**63 - 1
)  # what the compiler writes where it has no model of a fusion, as for those on the SparseCore


KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips, as often as a step runs it.

    Attributes:
        kind: an entry of :data:`KINDS`.
        axes: mesh axes along which a group's members differ; empty if the groups could not be read.
        group: devices in one group, as positions in the flattened mesh (the first group; all are alike).
        bytes: of one device's array, once: the result of an all-gather, the smaller of input and buffer of a ragged
            all-to-all, the input of every other kind.
        count: times a step.
        overlap_cycles: compiler-estimated cycles of work scheduled between its start and its done; -1 where it has no
            separate done, that is, where the chip waits for it.
        source: JAX's name of the operation it came from.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    bytes: int
    count: int
    overlap_cycles: int
    source: str


@dataclasses.dataclass(frozen=True)
class GroupedMatmul:
    """One ``lax.ragged_dot`` that XLA compiled to its kernel, which it gives no cycles.

    Attributes:
        kind: "rows" for [R,K]·[E,K,N] → [R,N], "weights" for [R,K]ᵀ·[R,N] → [E,K,N].
        sizes: R (all rows there is room for), K, N, E.
        tiles: rows, of K and of N that a step of its grid multiplies.
        itemsize: bytes of an operand's number.
        count: times a step.
    """

    kind: str
    sizes: tuple[int, int, int, int]
    tiles: tuple[int, int, int]
    itemsize: int
    count: int


@dataclasses.dataclass(frozen=True)
class ProgramText:
    """What a step does, per device.

    Attributes:
        collectives: in program order.
        cycles: the compiler's estimated cycles of a step, trip counts applied, exchanges left out.
        parts: the same cycles by pass ("forward", "recomputation", "backward", "update") and kind ("matmuls", which
            are fusions with a matrix product in them, and "other"); all branches of a conditional.
        unpriced: instructions of a step without an estimate.
        unpriced_bytes: what those read and write.
        unknown_loops: loops whose trip count could not be read and was taken as 1.
        grouped: matmuls over rows sorted by expert, without an estimate and not among the unpriced.
        copies: (bytes, times a step, JAX's name) of every array copied to another layout or place in HBM, of 1 MiB and
            more: what another order of dimensions may save.
    """

    collectives: tuple[Collective, ...]
    cycles: int
    parts: dict[tuple[str, str], int]
    unpriced: int
    unpriced_bytes: int
    unknown_loops: int
    grouped: tuple[GroupedMatmul, ...] = ()
    copies: tuple[tuple[int, int, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


def array_bytes(type_text: str) -> int:
    """Bytes of every array in a type such as ``(bf16[4,128]{1,0}, s32[])``; padding by tiles is not counted."""
    total = 0.0
    for dtype, dims in re.findall(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]", type_text):
        size = _SIZES.get(dtype)
        if size is None:
            bits = re.search(r"[0-9]+", dtype)
            size = int(bits.group()) / 8 if bits else 0
        total += size * math.prod(int(dim) for dim in dims.split(",") if dim)
    return int(total)


def _split_type(text: str) -> tuple[str, str]:
    """(type, what follows) of the right side of an instruction."""
    if not text.startswith("("):
        type_text, _, rest = text.partition(" ")
        return type_text, rest
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[: i + 1], text[i + 2 :]
    return text, ""


def _parse_computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions of each computation, in schedule order, and the name of the entry."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        # Other unindented lines are pieces of a kernel's metadata, which may hold line breaks.
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = computations.setdefault(head.group(2), [])
            if head.group(1):
                entry = head.group(2)
            continue
        found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
        if current is None or not found:
            continue
        type_text, rest = _split_type(found.group(3))
        opcode, _, rest = rest.partition("(")
        operands, _, attributes = rest.partition(")")
        names = tuple(re.findall(r"%([\w.\-]+)", operands))
        if opcode == "constant":
            names = (operands,)
        current.append(_Instruction(found.group(2), type_text, opcode, names, attributes, bool(found.group(1))))
    return computations, entry


def _attribute(instruction: _Instruction, name: str) -> str | None:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    return found.group(1) if found else None


def _attribute_of_hosts(name: str, transfer: _Instruction) -> str:
    """Of a send or a receive between slices."""
    found = re.search(rf'_xla_(?:megascale|host_transfer)_{name}="([^"]*)"', transfer.attributes)
    return found.group(1) if found else ""


def _trip_count(loop: _Instruction, computations: Mapping[str, Sequence[_Instruction]]) -> int | None:
    """Trips of a while loop that counts from 0 by 1: the bound that its condition compares with."""
    known = re.search(r'known_trip_count\\?"?:?\{\\?"?n\\?"?:\\?"?(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition = computations.get(_attribute(loop, "condition") or "", ())
    by_name = {instruction.name: instruction for instruction in condition}
    root = next((instruction for instruction in condition if instruction.root), None)
    if root is None:
        return None
    # The comparison may be wrapped in a fusion, whose operands are what is compared.
    if root.opcode != "fusion" and not (root.opcode == "compare" and "direction=LT" in root.attributes):
        return None
    names = root.operands
    bounds = [by_name[name].operands[0] for name in names if name in by_name and by_name[name].opcode == "constant"]
    return int(bounds[0]) if len(bounds) == 1 and bounds[0].lstrip("-").isdigit() else None


def _first_group(attributes: str) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    """(axis names if the text has them, first group of device positions) of an instruction's replica groups."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes)
    if pairs:
        # A permutation's group is the cycle, or chain, through the first pair.
        following = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))}
        start = next(iter(following))
        members, node = [start], following[start]
        while node != start and node in following and node not in members:
            members.append(node)
            node = following[node]
        if node not in members:
            members.append(node)
        return None, tuple(sorted(members))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return None, tuple(int(member) for member in listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, source = (tuple(int(n) for n in iota.group(i).split(",")) for i in (1, 2))
        ids = np.arange(math.prod(source)).reshape(source)
        if iota.group(3):
            ids = ids.transpose([int(n) for n in iota.group(3).split(",")])
        return None, tuple(int(member) for member in ids.reshape(shape)[0])
    named = re.search(r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}", attributes)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        varying = re.findall(r"'([^']+)'", named.group(2))
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        index = tuple(slice(None) if name in varying else 0 for name in sizes)
        return tuple(varying), tuple(int(member) for member in np.ravel(ids[index]))
    return None, ()


def group_axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the positions of a group differ."""
    if not group or max(group) >= math.prod(mesh.values()):
        return ()
    coordinates = np.unravel_index(np.asarray(group), tuple(mesh.values()))
    return tuple(axis for axis, values in zip(mesh, coordinates, strict=True) if len(set(values.tolist())) > 1)


def _cycles(instruction: _Instruction) -> int | None:
    """Estimated cycles; None where the instruction has an estimate that says nothing."""
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    if not found:
        return 0
    cycles = int(found.group(1))
    return None if cycles == _UNKNOWN_CYCLES else cycles


def _hidden_kind(instruction: _Instruction, computations: Mapping[str, Sequence[_Instruction]]) -> _Instruction | None:
    """The collective inside a fusion, if there is one."""
    for inner in computations.get(_attribute(instruction, "calls") or "", ()):
        if inner.opcode.removesuffix("-start") in KINDS:
            return inner
        if inner.opcode in ("fusion", "call"):
            found = _hidden_kind(inner, computations)
            if found:
                return found
    return None


def _pass_of(instruction: _Instruction) -> str | None:
    """The part of a train step that an instruction comes from, by JAX's name of it; None: it has no name."""
    name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes)
    if not name:
        return None
    if "rematted_computation" in name.group(1):
        return "recomputation"
    if "transpose(" in name.group(1):
        return "backward"
    return "forward" if "jvp(" in name.group(1) else "update"


def _dims(type_text: str) -> tuple[int, ...]:
    """Of the first array in a type."""
    found = re.search(r"\[([0-9,]*)\]", type_text)
    return tuple(int(dim) for dim in found.group(1).split(",") if dim) if found else ()


def _grouped(kernel: _Instruction, types: Mapping[str, str], times: int) -> GroupedMatmul | None:
    """The kernel's matmul, if it is one over groups of rows: its operands are scalars' arrays, then the two factors."""
    tiles = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', kernel.attributes)
    if not tiles:
        return None
    left, right = (types.get(name, "") for name in kernel.operands[-2:])
    itemsize = array_bytes(left) // math.prod(_dims(left))
    (rows, k), result = _dims(left), _dims(kernel.type)
    kind, groups = ("weights", result[0]) if len(result) == 3 else ("rows", _dims(right)[0])
    tiling = int(tiles[1]), int(tiles[2]), int(tiles[3])
    return GroupedMatmul(kind, (rows, k, result[-1], groups), tiling, itemsize, times)


def _source(instruction: _Instruction) -> str:
    """JAX's name of where an instruction comes from."""
    name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes)
    return name.group(1).replace("\\", "") if name else ""


def read(text: str, mesh: Mapping[str, int]) -> ProgramText:
    """Reads a scheduled module.

    Args:
        text: ``compiled.as_text()``.
        mesh: devices per axis, in the order of the mesh's axes.
    """
    computations, entry = _parse_computations(text)
    collectives: list[Collective] = []
    grouped: list[GroupedMatmul] = []
    copies: list[tuple[int, int, str]] = []
    parts: dict[tuple[str, str], int] = {}
    multiplies: dict[str, bool] = {}
    totals = {"cycles": 0, "unpriced": 0, "unpriced_bytes": 0, "unknown_loops": 0}

    def record(carrier: _Instruction, inner: _Instruction, types: Mapping[str, str], times: int, overlap: int) -> None:
        kind = inner.opcode.removesuffix("-start")
        named, group = _first_group(inner.attributes)
        axes = named if named and set(named) <= set(mesh) else group_axes(group, mesh)
        axes = tuple(axis for axis in axes if mesh.get(axis, 1) > 1)
        result = array_bytes(carrier.type)
        inputs = sum(array_bytes(types.get(name, "")) for name in carrier.operands)
        # Where a part is no multiple of what the network likes, XLA pads it: [4096] to 8 times [520].
        if kind == "all-reduce" and carrier.opcode == "fusion" and len(group) > 1 and result * len(group) < 2 * inputs:
            kind = "reduce-scatter"
        size = inputs or result
        if kind == "ragged-all-to-all":
            # Its operands are rows, a buffer for those that arrive, and offsets: a balanced load fills the smaller.
            size = min(array_bytes(types.get(name, "")) for name in carrier.operands[:2])
        if kind == "all-gather":
            # A start's result is (operands, results, ...).
            size = result - inputs if inner.opcode.endswith("-start") and result > inputs else result
        collectives.append(Collective(kind, axes, group, size, times, overlap, _source(carrier) or _source(inner)))

    def record_between_slices(
        sent: _Instruction, received: _Instruction, types: Mapping[str, str], times: int, overlap: int
    ) -> None:
        kind = _attribute_of_hosts("transfer_type", sent).lower().replace("_", "-")
        # A receive's type is (array, ...).
        carried = received.type[1:].partition("{")[0] if kind == "all-gather" else types.get(sent.operands[0], "")
        # Only the first axis of the mesh spans slices (moe.parallel.mesh).
        axis, *inner = mesh
        stride = math.prod(mesh[name] for name in inner)
        group = tuple(range(0, mesh[axis] * stride, stride))
        collectives.append(Collective(kind, (axis,), group, array_bytes(carried), times, overlap, "between slices"))

    def has_product(name: str) -> bool:
        """Whether there is a matrix product in a computation or those it calls."""
        if name not in multiplies:
            multiplies[name] = any(
                inner.opcode in ("convolution", "dot")
                or (inner.opcode == "fusion" and has_product(_attribute(inner, "calls") or ""))
                for inner in computations.get(name, ())
            )
        return multiplies[name]

    def spend(instruction: _Instruction, cycles: int, times: int) -> int:
        """Books the cycles of an instruction; one without a name belongs to what came before it."""
        nonlocal current
        current = _pass_of(instruction) or current
        product = instruction.opcode in ("convolution", "dot") or has_product(_attribute(instruction, "calls") or "")
        part = current, "matmuls" if product else "other"
        parts[part] = parts.get(part, 0) + cycles * times
        return cycles

    current = "forward"

    def walk(name: str, times: int) -> int:
        """Records a computation run `times` times; returns the cycles of one run."""
        own = 0
        types = {instruction.name: instruction.type for instruction in computations.get(name, ())}
        open_exchanges: dict[str, tuple[_Instruction, _Instruction, int]] = {}
        sent_to_slices: dict[str, tuple[_Instruction, int]] = {}
        received: dict[str, _Instruction] = {}
        for instruction in computations.get(name, ()):
            opcode = instruction.opcode
            if opcode == "while":
                trips = _trip_count(instruction, computations)
                if trips is None and f"{OVERFLOW_SCOPE}/" in _source(instruction):
                    trips = 0  # further exchange rounds, which a balanced router never needs
                if trips is None:
                    totals["unknown_loops"] += 1
                    trips = 1
                own += trips * walk(_attribute(instruction, "body") or "", times * trips)
                continue
            if opcode == "conditional":
                branches = re.findall(r"%([\w.\-]+)", instruction.attributes.partition("branch_computations=")[2])
                own += max((walk(branch, times) for branch in branches if branch in computations), default=0)
                continue
            if opcode == "call":
                own += walk(_attribute(instruction, "to_apply") or "", times)
                continue
            inner = instruction if opcode.removesuffix("-start") in KINDS else None
            if opcode in ("fusion", "async-start"):
                inner = _hidden_kind(instruction, computations)
            if inner is not None:
                if opcode.endswith("-start"):
                    open_exchanges[instruction.name] = (instruction, inner, own)
                else:
                    record(instruction, inner, types, times, -1)
                    if opcode == "fusion" and inner.opcode == "all-gather":
                        own += spend(instruction, _cycles(instruction) or 0, times)  # a matmul with the gather inside
                continue
            if opcode == "send" and "_xla_megascale_transfer_type" in instruction.attributes:
                sent_to_slices[_attribute_of_hosts("rendezvous", instruction)] = instruction, own
            elif opcode == "recv":
                received[instruction.name] = instruction
            elif opcode == "recv-done" and instruction.operands and instruction.operands[0] in received:
                other = received.pop(instruction.operands[0])
                started = sent_to_slices.pop(_attribute_of_hosts("rendezvous", other), None)
                if started:
                    record_between_slices(started[0], other, types, times, own - started[1])
            if opcode.endswith("-done"):
                started = open_exchanges.pop(instruction.operands[0], None) if instruction.operands else None
                if started:
                    record(started[0], started[1], types, times, own - started[2])
                continue
            if opcode == "custom-call":
                matmul = _grouped(instruction, types, times)
                if matmul:
                    grouped.append(matmul)
            if opcode == "copy" and array_bytes(instruction.type) >= 2**20:
                copies.append((array_bytes(instruction.type), times, _source(instruction)))
            cycles = None if opcode == "call-start" else _cycles(instruction)  # calls to the SparseCore
            if cycles is None:
                totals["unpriced"] += times
                moved = array_bytes(instruction.type) + sum(array_bytes(types.get(n, "")) for n in instruction.operands)
                written = array_bytes(instruction.type)
                if opcode == "call-start":  # asynchronous: what it moves is told by the computation it calls
                    called = computations.get(_attribute(instruction, "to_apply") or "", ())
                    written = sum(array_bytes(inner.type) for inner in called if inner.root)
                    moved = 2 * written
                # A gather reads as much as it writes, whatever the size of what it picks from.
                totals["unpriced_bytes"] += times * min(moved, 2 * written)
            elif cycles:
                own += spend(instruction, cycles, times)
        return own

    totals["cycles"] = walk(entry, 1)
    return ProgramText(tuple(collectives), parts=parts, grouped=tuple(grouped), copies=tuple(copies), **totals)
