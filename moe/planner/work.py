"""Work of single instructions in a compiled program: FLOPs of products, kernels, and the pass they belong to."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from moe.dispatch.backends.tpu_tiles import Kind
from moe.models.stages import TAKEN_SCOPE
from moe.planner import hlo
from moe.planner.hlo import Instruction, array_bytes, array_shape
from moe.planner.records import GroupedMatmul
from moe.training.losses import LOSS_SCOPE

PRODUCTS = ("convolution", "dot")

#: Element types that all devices with matrix units for them multiply at twice the rate of bfloat16.
BYTES = {"s8", "u8", "f8e4m3fn", "f8e5m2"}

#: A layout in the host's memory.
IN_HOST = "S(5)"


class Products:
    """Matrix products inside the computations of a module, which fusions call."""

    def __init__(self, module: hlo.Module):
        self._module = module
        self._flops: dict[str, float] = {}

    def has(self, name: str) -> bool:
        """Check for a matrix product in a computation or in those it calls."""
        return self._of(name) > 0

    def flops(self, instruction: Instruction, types: Mapping[str, str]) -> float:
        """FLOPs of a product or of the products inside a fusion."""
        if instruction.opcode in PRODUCTS:
            return product_flops(instruction, types)
        return self._of(instruction.attribute("calls"))

    def factor_types(self, instruction: Instruction, types: Mapping[str, str]) -> set[str]:
        """Element types of the factors of a product or of a fused one; none without one."""
        if instruction.opcode in PRODUCTS:
            return {types.get(name, "").partition("[")[0] for name in instruction.operands}
        inner = self._module.called(instruction)
        inner_types = {each.name: each.type for each in inner}
        for each in inner:
            if each.opcode in PRODUCTS or (each.opcode == "fusion" and self.has(each.attribute("calls"))):
                return self.factor_types(each, inner_types)
        return set()

    def _of(self, name: str) -> float:
        if name not in self._flops:
            inner = self._module.computations.get(name, ())
            types = {instruction.name: instruction.type for instruction in inner}
            self._flops[name] = sum(
                product_flops(each, types) if each.opcode in PRODUCTS else self._of(each.attribute("calls"))
                for each in inner
                if each.opcode in (*PRODUCTS, "fusion")
            )
        return self._flops[name]


_in_memory = functools.partial(array_bytes, in_memory=True)


def traffic(instruction: Instruction, module: hlo.Module, types: Mapping[str, str]) -> int:
    """Bytes of main memory that an instruction reads and writes at least: of an operand that a fusion only slices, the
    slices; of a result that it updates in place, the update. A loop's traffic is that of its body."""
    if instruction.opcode == "while":
        return 0
    inner = module.called(instruction) if instruction.opcode in ("fusion", "fusion-start") else ()
    if not inner:
        return _in_memory(instruction.type) + sum(_in_memory(types.get(name, "")) for name in instruction.operands)
    inner_types = {each.name: each.type for each in inner}
    uses: dict[str, list[Instruction]] = {each.name: [] for each in inner}
    for each in inner:
        for name in each.operands:
            uses.get(name, []).append(each)
    moved = 0
    for each in inner:
        if each.opcode == "parameter":
            for user in uses[each.name]:
                if user.opcode not in ("dynamic-slice", "slice", "gather", "dynamic-update-slice"):
                    moved += _in_memory(each.type)
                    break
            else:
                moved += sum(_in_memory(user.type) for user in uses[each.name] if "update" not in user.opcode)
        if each.root:
            moved += written_bytes(each, inner, inner_types, _in_memory)
    return moved


def moved_bytes(instruction: Instruction, module: hlo.Module, types: Mapping[str, str]) -> int:
    """Bytes that an instruction without an estimate reads and writes; a gather reads as much as it writes."""
    written = array_bytes(instruction.type)
    if instruction.opcode in ("call-start", "fusion-start"):  # the called computation says how much is moved
        called = module.called(instruction, "to_apply" if instruction.opcode == "call-start" else "calls")
        inner_types = {inner.name: inner.type for inner in called}
        return 2 * sum(written_bytes(inner, called, inner_types) for inner in called if inner.root)
    return min(written + sum(array_bytes(types.get(name, "")) for name in instruction.operands), 2 * written)


def written_bytes(
    root: Instruction,
    computation: Sequence[Instruction],
    types: Mapping[str, str],
    size: Callable[[str], int] = array_bytes,
) -> int:
    """Bytes that the last instruction of a computation writes; ``size``: of an array of some type."""
    if root.opcode in ("bitcast", "tuple") and root.operands:
        by_name = {each.name: each for each in computation}
        return sum(written_bytes(by_name[name], computation, types, size) for name in root.operands if name in by_name)
    return size(types[root.operands[1]] if root.opcode == "dynamic-update-slice" else root.type)


def product_flops(product: Instruction, types: Mapping[str, str]) -> float:
    """FLOPs of a dot, or of a convolution that stands for one on TPUs; at least 1.

    A spatial dimension of such a convolution is contracted if the result lacks it; else it is one of the batch.
    """
    left = array_shape(types.get(product.operands[0], "") if product.operands else "")
    result = array_shape(product.type)
    contracted = 1
    if product.opcode == "dot":
        named = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
        axes = [int(axis) for axis in named.group(1).split(",") if axis] if named else []
        contracted = math.prod(left[axis] for axis in axes if axis < len(left))
    elif labels := re.search(r"dim_labels=(\w+)_\w+->(\w+)", product.attributes):
        of_left = dict(zip(labels.group(1), left, strict=False))
        of_result = dict(zip(labels.group(2), result, strict=False))
        spatial = [label for label in of_left if label.isdigit()]
        contracted = of_left.get("f", 1) * math.prod(
            of_left[label] for label in spatial if of_result.get(label, 1) != of_left[label]
        )
    return max(2.0 * math.prod(result) * contracted, 1.0)


def gpu_estimate(instruction: Instruction, products: Products, float8: float) -> float:
    """XLA's seconds of a fusion on a GPU, present with ``xla_gpu_collect_cost_model_stats``; 0 without.

    XLA states the times of several models. "sol" has measured rates of matmuls, whose result must have the type of
    the operands; others are taken at peak, those of float8, whose rates it lacks, at twice bfloat16's. (The
    remaining models time a matmul with the tiles of this compilation, which are chosen by measurement on a real
    device.) "indexing-cost-model" is for other Triton fusions, the model without a name for all the rest.

    Args:
        float8: FLOP/s of matmuls of float8.
    """
    found = re.search(r'"reification_cost":(\[[^\]]*\])', instruction.attributes)
    costs = {cost["name"]: cost for cost in json.loads(found.group(1))} if found else {}
    matmul, measured = costs.get("experimental-gemm-cost-model"), costs.get("sol", {}).get("exec_time_us", 0)
    product = matmul or products.has(instruction.attribute("calls"))
    factors = products.factor_types(instruction, {}) if product else set()
    if factors == {"f8e4m3fn"}:
        return products.flops(instruction, {}) / float8
    if product and measured and factors <= {instruction.type.partition("[")[0]}:
        return measured * 1e-6
    if matmul:
        return max(matmul["compute_time_us"], matmul["memory_access_time_us"]) * 1e-6
    cost = costs.get("indexing-cost-model") or costs.get("")
    return cost["exec_time_us"] * 1e-6 if cost else 0.0


def of_loss(instruction: Instruction) -> bool:
    """Whether an instruction belongs to the cross-entropy and the unembedding."""
    return bool(re.search(rf"\({LOSS_SCOPE}\)|/{LOSS_SCOPE}/", instruction.op_name))


def moves_rows(call: Instruction) -> bool:
    """Whether an asynchronous call is a gather or scatter of a TPU's SparseCore."""
    return call.opcode == "call-start" and bool(re.search(r"\b(gather|scatter)", call.name))


def branch_share(conditional: Instruction) -> float:
    """Share of a conditional's runs in which its dearest branch is taken: all, unless its scope says otherwise."""
    share = re.search(TAKEN_SCOPE.format(r"(\d+)", r"(\d+)"), conditional.op_name)
    return int(share[1]) / int(share[2]) if share else 1.0


def pass_of(op_name: str) -> str | None:
    """The part of a train step that JAX's name of an operation belongs to; None without a name."""
    if not op_name:
        return None
    if "rematted_computation" in op_name:
        return "recomputation"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update"


def attention_flops(kernel: Instruction, types: Mapping[str, str]) -> float:
    """FLOPs of all T² scores in one attention kernel; 0: unknown.

    Kernels are cuDNN's, q [B,T,N,H] and k [B,U,M,H], with 2 matmuls forward and 5 backward; and splash attention's, q
    [B,N,T,H] and v [B,M,T,V] after operands of integers, with 2 forward, 5 for all gradients, or 4 for those of keys
    and values and 3 for those of queries.
    """
    if "__cudnn$fmha" in kernel.attributes:
        q, k = (array_shape(types.get(name, "")) for name in kernel.operands[:2])
        return (5 if "Backward" in kernel.attributes else 2) * 2.0 * math.prod(q) * k[1]
    named = re.search(r"splash_\w+?_(fwd|dkv|dq)", kernel.name)
    arrays = [types.get(name, "") for name in kernel.operands]
    factors = [array_shape(each) for each in arrays if each.startswith(("bf16", "f32")) and len(array_shape(each)) >= 3]
    if named is None or len(factors) < 3:
        return 0.0
    (*q, _), value = factors[0], factors[2]
    head, length = factors[0][-1], value[-2]
    has_queries = len(re.findall(r"(?:bf16|f32)\[", kernel.type)) >= 3  # gradients of all three
    of_keys, of_values = {"fwd": (1, 1), "dq": (2, 1), "dkv": (3, 2) if has_queries else (2, 2)}[named[1]]
    return 2.0 * math.prod(q) * length * (of_keys * head + of_values * value[-1])


def kernel_of(
    instruction: Instruction, module: hlo.Module, types: Mapping[str, str]
) -> tuple[Instruction | None, Mapping[str, str]]:
    """The kernel that an instruction is, or that its fusion has with slices of its operands; the operands' types."""
    if instruction.opcode != "fusion":
        return (instruction if instruction.opcode == "custom-call" else None), types
    inner = module.called(instruction)
    return next((each for each in inner if each.opcode == "custom-call"), None), {
        each.name: each.type for each in inner
    }


def grouped_matmul(kernel: Instruction, types: Mapping[str, str]) -> GroupedMatmul | None:
    """The grouped matmul of a kernel; its two factors are the first operands that are no vectors.

    Kernels are XLA's, this project's, and ``gmm`` and ``tgmm`` of megablox, which have the same operands.
    """
    megablox = re.search(r"\bt?gmm\b", kernel.op_name) and "tpu_custom_call" in kernel.attributes
    tiles = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', kernel.attributes)
    gpu = re.search(r'custom_call_target="(mosaic_gpu|__gpu\$xla\.gpu\.triton)', kernel.attributes)
    if not tiles and not gpu and not megablox:
        return None
    factors = [each for name in kernel.operands if len(array_shape(each := types.get(name, ""))) >= 2]
    named = re.search(r'kernel_kind="(activated|gradients|rows)"', kernel.attributes)
    result = array_shape(kernel.type)
    if len(factors) < 2 or (named is None and len(factors) > 2):
        return None
    left, right = factors[:2]
    if len(result) not in (2, 3) or len(array_shape(left)) != 2:
        return None
    rows, k = array_shape(left)
    itemsize = array_bytes(left) // (rows * k)
    groups, columns = result[0] if len(result) == 3 else array_shape(right)[0], result[-1]
    kind: Kind = "weights" if len(result) == 3 else "rows"
    if named is not None:
        kind = cast("Kind", named[1])
        # The first result has pairs; of a product of gradients comes one number.
        columns = columns // 2 if kind == "gradients" else columns
    tiling = (int(tiles[1]), int(tiles[2]), int(tiles[3])) if tiles else (0, 0, 0)
    name = "tpu" if gpu is None else "mosaic" if "mosaic" in gpu.group(1) else "triton"
    return GroupedMatmul(kind, (rows, k, columns, groups), tiling, itemsize, 1, name, kernel.op_name)


def stage_in_fusions(fusion: Instruction, collective: Instruction, module: hlo.Module) -> str:
    """The "start", a "step" or the "done" of a collective that TPU fusions carry on beside their own work, each of
    which holds a copy of it; "" for a collective that a fusion does as a whole."""
    for inner in module.called(fusion):
        if found := re.search(r'custom_call_target="AsyncCollective(Start|Done)"', inner.attributes):
            return found.group(1).lower()
    return "step" if '"async_collective_fusion_config"' in collective.attributes else ""


def one_way_rings(collective: Instruction, members: int) -> tuple[tuple[int, ...], ...]:
    """One-way rings that share a collective's bytes on a TPU, by its algorithm: sizes of each one's phases, in order;
    () if not stated.

    A SparseCore's algorithm names a ring for each part of the bytes ("color"), in phases over a dimension each; a
    TensorCore's of one dimension has one ring in both directions.
    """
    colors = re.findall(r'"phase_rings":\[(.*?)\]', collective.attributes)
    if colors:
        sizes = [tuple(map(int, re.findall(r'"core_count":"(\d+)"', color))) for color in colors]
        # Of devices that share a chip, a ring may count the chips.
        return tuple(phases if math.prod(phases) in (members, members // 2) else (members,) for phases in sizes)
    both = re.search(r'"emitter":"1D|"strategy":"StrategyRing"', collective.attributes)
    return ((members,), (members,)) if both else ()


def is_host_transfer(instruction: Instruction) -> bool:
    """Whether an instruction starts to copy between the device and its host's memory."""
    moves = ("copy-start", "dynamic-slice-start", "dynamic-update-slice-start", "fusion-start")
    return instruction.opcode in moves and IN_HOST in instruction.type


def updates_host(transfer: Instruction) -> bool:
    """Whether a transfer writes a part of an array in the host's memory; on GPUs such a fusion's operand and result are
    there."""
    fused = transfer.opcode == "fusion-start" and transfer.type.count(IN_HOST) > 1
    return fused or transfer.opcode == "dynamic-update-slice-start"


def slice_attribute(transfer: Instruction, name: str) -> str:
    """A frontend attribute of a send or receive between TPU slices."""
    found = re.search(rf'_xla_(?:megascale|host_transfer)_{name}="([^"]*)"', transfer.attributes)
    return found.group(1) if found else ""
