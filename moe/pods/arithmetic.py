"""FLOPs of a traced program: every matrix product that a step does, recomputation and empty expert slots included.

In: a jaxpr, before partitioning, so that the sum is over all devices. Out: FLOPs, 2 per multiply-add; elementwise work
is not counted. The compiler's own figure counts a loop's body once, hence this.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax.extend import core


def matmul_flops(jaxpr: core.Jaxpr) -> float:
    """FLOPs of all dot_generals, scans multiplied out; a conditional counts its dearest branch.

    A Pallas kernel counts as what it declares.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * math.prod(sizes[axis] for axis in contracted)
        elif name in ("ragged_dot", "ragged_dot_general"):
            rows, inner = equation.invars[0].aval.shape[-2:]
            total += 2.0 * rows * inner * equation.outvars[0].aval.shape[-1]
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total += float(estimate.flops) if estimate is not None else 0.0
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            if name == "shard_map":  # its shapes are one device's; axes it does not name are not divided
                times = math.prod(params["mesh"].shape.values())
            total += times * sum(matmul_flops(inner) for inner in _inner_jaxprs(params))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
            continue
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
