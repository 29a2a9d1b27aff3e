"""The dispatch modes by name."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

from jax import Array

from moe.config.schema import Dispatch
from moe.dispatch.dropless import dropless
from moe.dispatch.einsum import einsum
from moe.dispatch.experts import Experts
from moe.dispatch.gather import gather
from moe.dispatch.soft import soft
from moe.routing.routing import Routing

#: (x [G,S,D], Routing, plan, Experts) → y [G,S,D] float32: Σ_k weight·expert output, 0 for a dropped token. The plan is
#: a :class:`moe.dispatch.soft.SoftPlan` for soft and a :class:`moe.dispatch.plan.Plan` for the others.
MODES: dict[str, Callable[[Array, Routing, Any, Experts], Array]] = {
    "gather": gather,
    "einsum": einsum,
    "dropless": dropless,
    "soft": soft,
}

#: The modes that ``model.moe.dispatch`` may name. Layers of Soft MoE use soft, whatever it names.
CONFIG_MODES: tuple[str, ...] = typing.get_args(Dispatch)
