"""Settings of attention beside its arrays, as every implementation takes them."""

from __future__ import annotations

import dataclasses

from jax import Array
from jaxtyping import Bool, Float, Int

from moe.layers.dropout import KEEP_ALL, Dropout


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Which keys a query sees, and what their weights depend on beside query·key.

    Attributes:
        window: positions a query sees, its own included; 0: all.
        causal: a query sees earlier positions and its own; else all.
        bias: of the distances 1 − T … T − 1 (:meth:`moe.layers.attention.relative.RelativeBias.by_distance`).
        prefix: 1 for keys that all queries of their document see, whatever ``causal``.
        scale: of the products; None: 1/sqrt(H).
        drop: dropout of the weights.
        sinks: logit of a further key without a value (:mod:`moe.layers.attention.sinks`); None: none.
    """

    window: int = 0
    causal: bool = True
    bias: Float[Array, "N D"] | None = None
    prefix: Int[Array, "B U"] | None = None
    scale: float | None = None
    drop: Dropout = KEEP_ALL
    sinks: Float[Array, " N"] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the kernels of :mod:`moe.layers.attention.cpu` and :mod:`moe.layers.attention.tpu` compute it."""
        return self.causal and self.bias is None and self.prefix is None and not self.drop.active

    def factor(self, head_dim: int) -> float:
        """Factor of query·key."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def in_window(self, distance: Int[Array, "T U"]) -> Bool[Array, "T U"]:
        """Whether a query sees a key so many positions before it in a causal model."""
        return (distance >= 0) & ((distance < self.window) if self.window else True)
