"""Shortcut-connected MoE: the experts' output is added after the layer above, so that its dense path runs while rows
travel.

Cai et al. 2024 (arXiv 2404.05019), as LongCat-Flash arranges it (2025, arXiv 2509.01322, section 2): with n of the
norms, a_i of attention and f_i of dense FFNs, f_1 the shared expert,

    h = x + a_1(n x)    u = h + f_1(n h)    v = u + a_2(n u)    y = v + f_2(n v) + experts(n h)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.layers.call import Call, Report
from moe.layers.inputs import Site
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain

_NAME = "late"


def first_late(x: Float[Array, "B T D"]) -> dict[str, Any]:
    """Zeros, which the first layer reads."""
    return {_NAME: jnp.zeros_like(x)}


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """Runs an MoE layer whose output is that of its shared expert, and hands its experts' output on."""

    run: Callable[[Any, Array, Call], tuple[Array, Report]]

    def __call__(self, layer: Any, x: Array, call: Call) -> tuple[Array, Report]:
        """Apply the layer."""
        late, report = self.run(layer, x, call)
        late = constrain(call.drop.at(Site.SHORTCUT)(late), partition_specs.BATCH)
        y = layer.beside(x, layer.real_tokens(call.rows))
        return jnp.zeros_like(late) if y is None else y, report.replace(handed=report.handed | {_NAME: late})


class Late(nnx.Module):
    """Part of a dense layer that adds the output of the experts of the layer below."""

    def run(self, x: Float[Array, "B T D"], call: Call) -> tuple[Float[Array, "B T D"], Report]:
        """The output that the layer below handed on; hands 0 to the layer above."""
        del x
        late = call.handed[_NAME]
        return late, Report(handed={_NAME: jnp.zeros_like(late)})
