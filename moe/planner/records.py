"""Records of a compiled program's work and exchanges."""

from __future__ import annotations

import dataclasses

from moe.dispatch.backends.tpu_tiles import Kind

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


#: Axis of a transfer between a device and its host's memory.
HOST = "host"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices, or between a device and its host's memory.

    Attributes:
        kind: an entry of :data:`KINDS`, or "to" or "from", with the axis :data:`HOST`.
        axes: mesh axes along which a group's members differ; empty if the groups could not be read.
        group: devices of the first group, as positions in the flattened mesh; the other groups are alike.
        bytes: of one device's array, once: the result of an all-gather, the smaller of input and buffer of a ragged
            all-to-all, the input of every other kind.
        count: times a step.
        overlap_seconds: estimated work scheduled between its start and its done; -1 without a separate done, that is,
            if the device waits for it.
        source: JAX's name of the operation it came from.
        computation: name of the one that starts it.
        places: of its start and its done among the instructions of that computation.
        started: estimated work of that computation before the start, kernels included, seconds.
        rings: one-way rings that share the bytes evenly, as the compiler states for some exchanges on TPUs: the sizes
            of each one's phases; (): not stated.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    bytes: int
    count: int
    overlap_seconds: float
    source: str
    computation: str = dataclasses.field(default="", compare=False)
    places: tuple[int, int] = dataclasses.field(default=(0, 0), compare=False)
    started: float = dataclasses.field(default=0.0, compare=False)
    rings: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class GroupedMatmul:
    """One kernel that multiplies rows sorted by expert; it carries no estimate.

    Attributes:
        kind: "rows" for [R,K]·[E,K,N] → [R,N], "weights" for [R,K]ᵀ·[R,N] → [E,K,N]; "activated" and "gradients": rows
            with the nonlinearity or its gradient in a TPU's kernel (:mod:`moe.dispatch.backends.gated`).
        sizes: R (rows of the buffer, filled or not), K, N, E.
        tiles: sizes in rows, K and N of the blocks that a step of its grid multiplies; of TPUs' kernels.
        itemsize: bytes of one number.
        count: times a step.
        kernel: "tpu" (``lax.ragged_dot``), "mosaic" or "triton" (GPUs).
        source: JAX's name of the operation it came from.
    """

    kind: Kind
    sizes: tuple[int, int, int, int]
    tiles: tuple[int, int, int]
    itemsize: int
    count: int
    kernel: str = "tpu"
    source: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Price:
    """Time of one run of a kernel, or of several.

    Attributes:
        seconds: the central estimate.
        low, high: the ends of its 80 % interval.
        basis: what it rests on: "measured" or "by analogy".
        flops: of the filled rows, or of the scores that attention computes.
        least: seconds of those at peak FLOP/s.
    """

    seconds: float
    low: float
    high: float
    basis: str
    flops: float = 0.0
    least: float = 0.0


@dataclasses.dataclass(frozen=True)
class Item:
    """Work of one instruction on a device.

    Attributes:
        name: in the program.
        kind: "matmul" (of XLA), "grouped matmul", "attention" (kernels), "row movement" (gathers of a TPU's
            SparseCore), "other" (fusions bound by memory or vector units) or "no estimate" (priced at memory
            bandwidth).
        where: the pass: "forward", "recomputation", "backward" or "update".
        source: JAX's name of the operation.
        seconds: of one run.
        count: runs a step.
        flops: of one run; bytes: that one run reads and writes.
        computation: name of the one that holds it; started: estimated work of that computation before it, seconds.
        low, high: ends of the interval of ``seconds`` where it is priced from measurements; otherwise ``seconds``.
        basis: what ``seconds`` rests on.
        least: seconds of its FLOPs at peak.
    """

    name: str
    kind: str
    where: str
    source: str
    seconds: float
    count: int
    flops: float
    bytes: int
    computation: str
    started: float
    low: float
    high: float
    basis: str
    least: float = 0.0


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that is alive when most memory is in use.

    Attributes:
        name: in the program; source: JAX's name of the operation that makes it.
        type: such as ``bf16[4,128]``; bytes: without padding.
    """

    name: str
    source: str
    type: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """Work and exchanges of a step, per device.

    Attributes:
        collectives: in program order.
        seconds: the compiler's estimate of a step, without exchanges and without unpriced instructions.
        parts: the same by pass ("forward", "recomputation", "backward", "update") and kind ("matmuls": fusions that
            contain a matrix product; "other"); all branches of a conditional.
        unpriced: instructions of a step without an estimate.
        unpriced_bytes: bytes that those read and write.
        unknown_loops: loops whose trip count could not be read and was taken as 1.
        grouped: matmuls over rows sorted by expert; without an estimate, not among the unpriced.
        copies: (bytes, times a step, JAX's name) of each array of 1 MiB and more copied to another layout or address.
        items: all work with an estimate or a price, in program order.
        loops: (computation, body, trips, clock before it) of each loop.
        entry: name of the computation that runs first.
        arrays: alive when most memory is in use, an estimate; the largest first.
    """

    collectives: tuple[Collective, ...]
    seconds: float
    parts: dict[tuple[str, str], float]
    unpriced: int
    unpriced_bytes: int
    unknown_loops: int
    grouped: tuple[GroupedMatmul, ...] = ()
    copies: tuple[tuple[int, int, str], ...] = ()
    items: tuple[Item, ...] = ()
    loops: tuple[tuple[str, str, int, float], ...] = ()
    entry: str = ""
    arrays: tuple[Array, ...] = ()
