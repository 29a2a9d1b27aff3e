"""The dispatch modes by name."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from moe.dispatch.dropless import dropless
from moe.dispatch.einsum import einsum
from moe.dispatch.experts import Experts
from moe.dispatch.gather import gather
from moe.dispatch.plan import Plan
from moe.routing.routing import Routing

#: (x [G,S,D], Routing, Plan, Experts) → y [G,S,D] float32: Σ_k weight·expert output, 0 for dropped
MODES: dict[str, Callable[[Array, Routing, Plan, Experts], Array]] = {
    "gather": gather,
    "einsum": einsum,
    "dropless": dropless,
}
