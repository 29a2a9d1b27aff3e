"""Parser of a compiled program's text (optimized, scheduled HLO): instructions, array sizes, groups, trip counts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        type: of its result, such as ``bf16[4,128]{1,0}``.
        operands: names of instructions; the literal, for a constant; the number, for a parameter.
        attributes: everything behind the operands.
        root: the result of its computation.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, name: str) -> str:
        """An attribute's value, such as the name of a called computation; "" if absent."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else ""

    @property
    def op_name(self) -> str:
        """JAX's name of the operation that the instruction comes from; "" if it has none."""
        name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return name.group(1).replace("\\", "") if name else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: the instructions of each computation, in the order of the schedule, and the entry's name."""

    computations: Mapping[str, Sequence[Instruction]]
    entry: str

    def called(self, instruction: Instruction, attribute: str = "calls") -> Sequence[Instruction]:
        """Instructions of a computation that an instruction calls; empty if it calls none."""
        return self.computations.get(instruction.attribute(attribute), ())


def parse(text: str) -> Module:
    """Parse ``compiled.as_text()``."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        # Other unindented lines belong to a kernel's metadata, which may hold line breaks.
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
        names = (operands,) if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", operands))
        current.append(Instruction(found.group(2), type_text, opcode, names, attributes, bool(found.group(1))))
    return Module(computations, entry)


def _split_type(text: str) -> tuple[str, str]:
    """Split the right side of an instruction into its type and the rest."""
    if not text.startswith("("):
        type_text, _, rest = text.partition(" ")
        return type_text, rest
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[: i + 1], text[i + 2 :]
    return text, ""


def array_bytes(type_text: str, *, in_memory: bool = False) -> int:
    """Bytes of all arrays in a type such as ``(bf16[4,128]{1,0}, s32[])``, without the padding of tiles.

    Args:
        type_text: the type.
        in_memory: count only arrays in the device's main memory, whose layout names no other, as ``{1,0:S(1)}`` does
            for those that a TPU keeps in its vector memory.
    """
    total = 0.0
    for dtype, dims, layout in re.findall(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?", type_text):
        if in_memory and "S(" in layout:
            continue
        size = _BYTES.get(dtype)
        if size is None:
            bits = re.search(r"[0-9]+", dtype)
            size = int(bits.group()) / 8 if bits else 0
        total += size * math.prod(int(dim) for dim in dims.split(",") if dim)
    return int(total)


def array_shape(type_text: str) -> tuple[int, ...]:
    """Shape of the first array in a type."""
    found = re.search(r"\[([0-9,]*)\]", type_text)
    return tuple(int(dim) for dim in found.group(1).split(",") if dim) if found else ()


def trip_count(loop: Instruction, module: Module) -> int | None:
    """Trips of a while loop that counts by 1, from its start and the bound in its condition; None if unreadable."""
    known = re.search(r'known_trip_count\\?"?:?\{\\?"?n\\?"?:\\?"?(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.called(loop, "condition")
    root = next((instruction for instruction in condition if instruction.root), None)
    if root is None:
        return None
    by_name = {instruction.name: instruction for instruction in condition}
    sides = [by_name[name] for name in root.operands if name in by_name]
    counters = [side for side in sides if side.opcode == "get-tuple-element"]
    bounds = [side for side in sides if side.opcode == "constant"]
    # The comparison may be wrapped in a fusion, whose operands are then the two sides, or hold the bound itself.
    if root.opcode == "fusion" and not bounds:
        bounds = [instruction for instruction in module.called(root) if instruction.opcode == "constant"]
    elif root.opcode != "fusion" and not (root.opcode == "compare" and "direction=LT" in root.attributes):
        return None
    if len(bounds) != 1 or not bounds[0].operands[0].lstrip("-").isdigit():
        return None
    return int(bounds[0].operands[0]) - (_start(loop, counters[0], module) if counters else 0)


def _start(loop: Instruction, counter: Instruction, module: Module) -> int:
    """First value of a loop's counter; above 0 if the first trips were peeled off the loop."""
    around = next(each for each in module.computations.values() if any(instruction is loop for instruction in each))
    by_name = {instruction.name: instruction for instruction in around}
    initial = by_name.get(loop.operands[0])
    if initial is None or initial.opcode != "tuple":
        return 0
    value = by_name.get(initial.operands[int(counter.attribute("index"))])
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = by_name.get(value.operands[0])
    return int(value.operands[0]) if value is not None and value.opcode == "constant" else 0


def first_group(attributes: str) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    """The first of a collective's groups: (mesh axes if the text names them, positions in the flattened mesh)."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes)
    if pairs:
        return None, _first_cycle({int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))})
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


def _first_cycle(following: Mapping[int, int]) -> tuple[int, ...]:
    """Members of the cycle, or chain, of a permutation that contains its first source."""
    start = next(iter(following))
    members, node = [start], following[start]
    while node != start and node in following and node not in members:
        members.append(node)
        node = following[node]
    return tuple(sorted({*members, node}))


def group_axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the positions of a group differ."""
    if not group or max(group) >= math.prod(mesh.values()):
        return ()
    coordinates = np.unravel_index(np.asarray(group), tuple(mesh.values()))
    return tuple(axis for axis, values in zip(mesh, coordinates, strict=True) if len(set(values.tolist())) > 1)
