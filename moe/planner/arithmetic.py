"""FLOPs of all matrix products in a traced program, recomputation and empty expert slots included.

A jaxpr is not partitioned yet, so the sum is over all devices. A multiply-add is 2 FLOPs; elementwise work is not
counted. (The compiler's own figure counts a loop's body once.)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

from moe.dispatch.backends.row_blocks import balanced_trips
from moe.dispatch.exchange import OVERFLOW_SCOPE


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of a program.

    Attributes:
        matmuls: matrix products of XLA.
        kernels: in Pallas kernels other than grouped matmuls.
        grouped: in kernels of grouped matmuls, all rows of their buffers.
    """

    matmuls: float = 0.0
    kernels: float = 0.0
    grouped: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all kinds."""
        return self.matmuls + self.kernels + self.grouped

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matmuls + other.matmuls, self.kernels + other.kernels, self.grouped + other.grouped)

    def times(self, count: int) -> Flops:
        """FLOPs of that many runs."""
        return Flops(self.matmuls * count, self.kernels * count, self.grouped * count)


def matmul_flops(jaxpr: Any) -> Flops:
    """FLOPs of all matrix products that the results need; a scan body counts ``length`` times, a conditional as its
    most expensive branch.

    A Pallas kernel counts its body once for every point of its grid, including blocks skipped at run time (the upper
    triangle in causal attention); a grouped matmul's kernel, and a loop over row blocks, count all rows of a buffer.
    """
    total = Flops()
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    for equation in live.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "while" and OVERFLOW_SCOPE in str(equation.source_info.name_stack):
            continue  # further exchange rounds, which a balanced router never needs
        if name in ("pallas_call", "mpmd_map"):
            total += _kernel_flops(equation)
        elif name == "cond":
            branches = [matmul_flops(branch.jaxpr) for branch in params["branches"]]
            total += max(branches, key=lambda flops: flops.total)
        elif name in _PRODUCTS:
            total += Flops(matmuls=_product_flops(equation))
        else:
            times = params["length"] if name == "scan" else 1
            if name == "while":
                trips = balanced_trips(str(equation.source_info.name_stack))
                times = 1 if trips is None else trips
            if name == "shard_map":  # its shapes are one device's
                times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += sum((matmul_flops(inner) for inner in _inner_jaxprs(params)), Flops()).times(times)
    return total


def _kernel_flops(kernel: Any) -> Flops:
    """FLOPs of a Pallas kernel, for TPUs or GPUs (``mpmd_map``: a Mosaic kernel for GPUs)."""
    params = kernel.params
    grouped = _grouped_flops(kernel)
    if grouped is not None:
        return Flops(grouped=grouped)
    if kernel.primitive.name != "pallas_call":
        return Flops()
    if not all(isinstance(size, int) for size in params["grid_mapping"].grid):
        # A grouped matmul for TPUs: its grid depends on the rows that arrive; it declares the FLOPs of a full buffer.
        return Flops(grouped=float(params["cost_estimate"].flops))
    return Flops(kernels=math.prod(params["grid_mapping"].grid) * matmul_flops(params["jaxpr"]).total)


def _grouped_flops(kernel: Any) -> float | None:
    """FLOPs of a grouped matmul for GPUs, recognised by its shapes; None for any other kernel.

    Operands are rows [R,K] and matrices [E,K,N] for [R,N], or two kinds of rows, [R,K] and [R,N], for [E,K,N]; and
    int32 arrays that describe the groups.
    """
    arrays = [v.aval for v in kernel.invars if hasattr(v.aval, "shape")]
    factors = [a.shape for a in arrays if a.ndim >= 2]
    if len(factors) != 2 or not any(a.ndim == 1 and a.dtype.kind == "i" for a in arrays):
        return None
    ranks = sorted(map(len, factors))
    rows, result = max(factors, key=lambda shape: -len(shape)), kernel.outvars[0].aval.shape
    if ranks == [2, 3] and len(result) == 2:
        return 2.0 * rows[0] * rows[1] * result[-1]
    if ranks == [2, 2] and len(result) == 3 and factors[0][0] == factors[1][0]:
        return 2.0 * rows[0] * result[1] * result[2]
    return None


_PRODUCTS = ("dot_general", "ragged_dot", "ragged_dot_general")


def _product_flops(equation: Any) -> float:
    first, result = equation.invars[0].aval.shape, math.prod(equation.outvars[0].aval.shape)
    params = equation.params
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
    elif equation.primitive.name == "ragged_dot":
        contracted = (len(first) - 1,)
    else:
        numbers = params["ragged_dot_dimension_numbers"]
        (contracted, _), _ = numbers.dot_dimension_numbers
        if set(numbers.lhs_ragged_dimensions) & set(contracted):
            # A weight gradient [R,K]ᵀ·[R,N] → [E,K,N]: each row contributes to one of the E results.
            result //= equation.invars[2].aval.shape[-1]
    return 2.0 * result * math.prod(first[axis] for axis in contracted)


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
            continue
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, core.Jaxpr):
                found.append(item)
            elif isinstance(getattr(item, "jaxpr", None), core.Jaxpr):  # a ClosedJaxpr
                found.append(item.jaxpr)
    return found
