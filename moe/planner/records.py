"""Records of a compiled program's work and exchanges."""

from __future__ import annotations

import dataclasses

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
    """One exchange between devices.

    Attributes:
        kind: an entry of :data:`KINDS`.
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


@dataclasses.dataclass(frozen=True)
class GroupedMatmul:
    """One ``lax.ragged_dot`` compiled to the TPU kernel, which carries no estimate.

    Attributes:
        kind: "rows" for [R,K]·[E,K,N] → [R,N], "weights" for [R,K]ᵀ·[R,N] → [E,K,N].
        sizes: R (rows of the buffer, filled or not), K, N, E.
        tiles: sizes in rows, K and N of the blocks that a step of its grid multiplies.
        itemsize: bytes of one number.
        count: times a step.
    """

    kind: str
    sizes: tuple[int, int, int, int]
    tiles: tuple[int, int, int]
    itemsize: int
    count: int


@dataclasses.dataclass(frozen=True)
class Program:
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
        attention_flops: of cuDNN's attention kernels, all keys of all queries; without an estimate, not among the
            unpriced.
        copies: (bytes, times a step, JAX's name) of each array of 1 MiB and more copied to another layout or address.
    """

    collectives: tuple[Collective, ...]
    seconds: float
    parts: dict[tuple[str, str], float]
    unpriced: int
    unpriced_bytes: int
    unknown_loops: int
    grouped: tuple[GroupedMatmul, ...] = ()
    attention_flops: float = 0.0
    copies: tuple[tuple[int, int, str], ...] = ()
