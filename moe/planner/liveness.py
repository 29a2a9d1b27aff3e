"""Arrays that are alive when most memory is in use, from the order of a scheduled program."""

from __future__ import annotations

import functools
import operator
import re

from moe.planner import hlo
from moe.planner.hlo import Instruction, array_bytes
from moe.planner.records import Array

_NO_BUFFER = ("parameter", "constant", "iota", "after-all", "partition-id", "replica-id", "send", "send-done")
_ALIAS = ("bitcast", "get-tuple-element", "tuple", "while", "optimization-barrier", "call-update")

_NOT_HBM = re.compile(r"S\([125]\)")  # memory spaces on TPUs' chips, and the host's


def at_peak(module: hlo.Module) -> tuple[Array, ...]:
    """Arrays alive at the fullest moment, the largest first: an estimate, since the compiler's allocation is not in the
    text. Arguments of the program are always alive; results updated in place count once; padding is left out."""

    @functools.cache
    def peak(name: str) -> tuple[int, tuple[Array, ...]]:
        """(bytes, arrays) that a computation adds to those of its caller."""
        instructions = module.computations.get(name, ())
        buffers, last = _buffers(instructions, module), {}
        for place, instruction in enumerate(instructions):
            for operand in (instruction.name, *instruction.operands):
                for buffer in buffers.get(operand, ()):
                    last[buffer] = len(instructions) if instruction.root else place
        first = {instruction.name: place for place, instruction in enumerate(instructions)}
        alive: dict[str, Array] = {}
        best: tuple[int, tuple[Array, ...]] = 0, ()
        total = 0
        for place, instruction in enumerate(instructions):
            # The result of a call or conditional is the array that its computation returns, which that counts.
            inner = max((peak(each) for each in _called(instruction)), key=operator.itemgetter(0), default=(0, ()))
            if total + inner[0] > best[0]:
                best = total + inner[0], (*alive.values(), *inner[1])
            if buffers.get(instruction.name) == {instruction.name} and not _NOT_HBM.search(instruction.type):
                array = Array(instruction.name, instruction.op_name, instruction.type, _size(instruction, instructions))
                alive[array.name] = array
                total += array.bytes
            if total > best[0]:
                best = total, tuple(alive.values())
            for buffer in [each for each in alive if last.get(each, first[each]) <= place]:
                total -= alive.pop(buffer).bytes
        return best

    arguments = [
        Array(i.name, i.op_name or i.name, i.type, array_bytes(i.type))
        for i in module.computations.get(module.entry, ())
        if i.opcode == "parameter"
    ]
    return tuple(sorted([*arguments, *peak(module.entry)[1]], key=lambda array: -array.bytes))


def _called(instruction: Instruction) -> list[str]:
    if instruction.opcode == "while":
        return [instruction.attribute("body")]
    if instruction.opcode == "call":
        return [instruction.attribute("to_apply")]
    if instruction.opcode == "conditional":
        names = instruction.attributes.partition("branch_computations={")[2].partition("}")[0]
        return [name.strip().lstrip("%") for name in names.split(",") if name.strip()]
    return []


def _buffers(instructions, module: hlo.Module) -> dict[str, set[str]]:
    """Buffers that hold each instruction's result: its own, named after it, or those of its operands."""
    buffers: dict[str, set[str]] = {}
    for instruction in instructions:
        if instruction.opcode in _NO_BUFFER:
            buffers[instruction.name] = set()
        elif instruction.opcode in _ALIAS or instruction.opcode.endswith("-done"):
            buffers[instruction.name] = set().union(*(buffers.get(name, set()) for name in instruction.operands))
        elif _updates_in_place(instruction, module):
            buffers[instruction.name] = buffers.get(instruction.operands[0], set()) if instruction.operands else set()
        else:
            buffers[instruction.name] = {instruction.name}
    return buffers


def _updates_in_place(instruction: Instruction, module: hlo.Module) -> bool:
    if instruction.opcode == "dynamic-update-slice":
        return True
    if instruction.opcode not in ("fusion", "fusion-start"):
        return False
    by_name = {inner.name: inner for inner in module.called(instruction)}
    root = next((inner for inner in by_name.values() if inner.root), None)
    while root is not None and root.opcode == "bitcast" and root.operands:
        root = by_name.get(root.operands[0])
    return root is not None and root.opcode == "dynamic-update-slice"


def _size(instruction: Instruction, instructions) -> int:
    """Bytes of a result, without the operands that the result type of an exchange's start repeats."""
    size = array_bytes(instruction.type)
    if instruction.opcode.endswith("-start") and instruction.type.startswith("(("):
        types = {each.name: each.type for each in instructions if each.name in instruction.operands}
        size -= sum(array_bytes(types.get(name, "")) for name in instruction.operands)
    return max(size, 0)
