"""The report of an MoE layer: what its config says of losses and metrics, read once when the layer is made."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.config import MoEConfig
from moe.layers.tokens import Tokens
from moe.routing import balancing
from moe.routing.interface import BalanceCounts, BalanceScope
from moe.routing.routing import Routing


@dataclasses.dataclass(frozen=True)
class Reporting:
    """Makes the reports of a layer.

    Attributes:
        counts, scope: of ``moe.losses``.
        k: K; None: the measured mean.
        groups: of experts, in the device-level loss.
        experts: E, FFNs.
        null_experts: without an FFN, the last columns.
        null_weight: of these in the load-balancing loss.
        routed: the layer has a router.
    """

    counts: BalanceCounts
    scope: BalanceScope
    k: int | None
    groups: int
    experts: int
    null_experts: int
    null_weight: float
    routed: bool

    @classmethod
    def of(cls, moe: MoEConfig, *, routed: bool) -> Reporting:
        """Read a config."""
        gate, losses = moe.gate, moe.losses
        assert gate is not None
        k = None if gate.experts_choose else moe.experts_per_token
        columns = moe.num_experts, moe.null_experts, losses.null
        return cls(losses.counts, losses.scope, k, gate.expert_groups, *columns, routed)

    @property
    def columns(self) -> int:
        """Columns of the router."""
        return self.experts + self.null_experts

    def __call__(
        self, tokens: Tokens, routing: Routing, kept: Bool[Array, "G S K"], strength: Float[Array, ""] | None
    ) -> balancing.LayerReport:
        """Report of a batch.

        Args:
            tokens: of the batch.
            routing: of the tokens.
            kept: assignments that were not dropped.
            strength: of the sparsity penalty; None: there is none.
        """
        report = balancing.report(
            routing,
            tokens.mask,
            kept,
            counts=self.counts,
            parts={"batch": 1, "step": 1, "group": len(tokens.mask), "sequence": tokens.shape[0]}[self.scope],
            k=self.k,
            null_experts=self.null_experts,
            keeps_needed=self.scope == "step",
            weights=balancing.balance_weights(self.experts, self.null_experts, self.null_weight),
            expert_groups=self.groups,
            strength=strength,
        )
        # Constant losses are set to 0, as a model whose other layers have other gates must not count them: the device
        # loss over a single group of experts, and all losses of a layer without a router.
        if self.routed:
            return report if self.groups > 1 else dataclasses.replace(report, device_balance_loss=jnp.zeros(()))
        sums = dataclasses.replace(report.sums, counts=0 * report.sums.counts, probs=0 * report.sums.probs)
        return dataclasses.replace(report, sums=sums, **dict.fromkeys(balancing.AUXILIARY, jnp.zeros(())))
