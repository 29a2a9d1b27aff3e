"""Arrays that routers hand on from MoE layer to MoE layer (:meth:`moe.routing.interface.Gate.first_carry`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import Array

from moe.config import MoEConfig
from moe.config.layer_kinds import LayerKind
from moe.layers.call import Call, Report
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.routing.carry import HANDED, first_carry, of_tokens, regrouped


def first_handed(moe: MoEConfig, kinds: Iterable[LayerKind], shape: tuple[int, ...]) -> dict[str, Any]:
    """Initial arrays, read by the lowest MoE layer, for tokens of this shape [B,T]; {} if nothing is handed on.

    Raises:
        ConfigError: gates hand on different shapes.
    """
    gates = [kind.gate for kind in kinds if kind.gate is not None]
    carry = first_carry(gates, moe.num_experts + moe.null_experts)
    return {} if carry is None else {HANDED: of_tokens(carry, shape)}


@dataclasses.dataclass(frozen=True)
class HandedOn:
    """Runs an MoE layer whose router reads what the MoE layer below handed on; without a layer below it begins anew."""

    run: Callable[[Any, Array, Call], tuple[Array, Report]]

    def __call__(self, layer: Any, x: Array, call: Call) -> tuple[Array, Report]:
        """Apply the layer; one that replays a whole routing hands on what it was handed."""
        if HANDED not in call.handed:
            return self.run(layer, x, call)
        y, report = self.run(layer, x, call.replace(read={HANDED: call.handed[HANDED]}))
        carry = report.signals["routing"].carry
        if carry is None:
            return y, report
        carry = jax.tree.map(lambda leaf: constrain(leaf, partition_specs.BATCH), regrouped(carry, x.shape[:2]))
        return y, report.replace(handed=report.handed | {HANDED: carry})
