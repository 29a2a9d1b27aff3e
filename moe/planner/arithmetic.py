"""FLOPs of all matrix products in a traced program, recomputation and empty expert slots included.

A jaxpr is not partitioned yet, so the sum is over all devices. A multiply-add is 2 FLOPs; elementwise work is not
counted. (The compiler's own figure counts a loop's body once.)
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core

from moe.dispatch.ragged_exchange import OVERFLOW_SCOPE


def matmul_flops(jaxpr: Any, *, kernels_only: bool = False) -> float:
    """FLOPs of all matrix products; a scan counts its length times, a conditional its most expensive branch.

    A Pallas kernel counts its body once for every point of its grid, including blocks skipped at run time (the upper
    triangle in causal attention).

    Args:
        jaxpr: of the traced program.
        kernels_only: count products inside Pallas kernels only.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "while" and OVERFLOW_SCOPE in str(equation.source_info.name_stack):
            continue  # further exchange rounds, which a balanced router never needs
        if name == "pallas_call" and not all(isinstance(size, int) for size in params["grid_mapping"].grid):
            # A grouped matmul: its grid depends on the rows that arrive, so it declares the FLOPs of a full buffer.
            # moe.planner.grouped_matmuls estimates its time.
            total += 0.0 if kernels_only else params["cost_estimate"].flops
        elif name == "pallas_call":
            total += math.prod(params["grid_mapping"].grid) * matmul_flops(params["jaxpr"])
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr, kernels_only=kernels_only) for branch in params["branches"])
        elif name in _PRODUCTS:
            total += 0.0 if kernels_only else _product_flops(equation)
        else:
            times = params["length"] if name == "scan" else 1
            if name == "shard_map":  # its shapes are one device's
                times = math.prod(params["mesh"].shape.values())
            total += times * sum(matmul_flops(inner, kernels_only=kernels_only) for inner in _inner_jaxprs(params))
    return total


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
