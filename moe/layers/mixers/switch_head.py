"""Attention whose value and output projections are experts of each head (SwitchHead: Csordas et al. 2023)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from moe.config import ModelConfig
from moe.config.mixers import GroupedQuery, SwitchHead
from moe.dispatch import quantized
from moe.layers.attention.cache import LayerCache
from moe.layers.inputs import Rows
from moe.layers.mixers.attention import Attention
from moe.layers.parameter import matrix
from moe.layers.router import matmul as float32_matmul
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import matmul, project_joined
from moe.parallel.partition_specs import REPLICATED, STORED
from moe.routing import balancing
from moe.routing.interface import GateInputs
from moe.routing.routing import Routing, route


class SwitchHeadAttention(Attention):
    """Attention with values v_h = sum_e s_he(x) x V_he, and output sum_h sum_e s'_he(x) a_h O_he of its heads a_h, over
    the K experts e that head h's routers choose for x, s_he the router's scores (SwitchHead 2023).

    Every expert is computed, and those that are not chosen get weight 0: at 2 of 4 experts, one dense product of twice
    the FLOPs moves no rows. Nothing is dropped, and experts stay on the devices of their heads.
    """

    def __init__(self, config: ModelConfig, mixer: SwitchHead, *, rngs: nnx.Rngs):
        self.switch = mixer
        n, h = mixer.heads, mixer.head_dim
        super().__init__(config, GroupedQuery(heads=n, kv_heads=n, head_dim=h), rngs=rngs)
        self.reports = mixer.reports

    @classmethod
    def empty_state(
        cls, config: ModelConfig, mixer: Any, leading: tuple[int, int], length: int, *, ahead: int = 0
    ) -> LayerCache:
        """Slots of the keys and values of all heads."""
        n, h = mixer.heads, mixer.head_dim
        plain = GroupedQuery(heads=n, kv_heads=n, head_dim=h)
        return super().empty_state(config, plain, leading, length, ahead=ahead)

    def create_values(self, rngs: nnx.Rngs) -> None:
        """Draw E matrices of values and of the output, and both routers, of each head."""
        c, m = self.config, self.switch
        d, n, h, e, scale = c.d_model, m.heads, m.head_dim, m.experts, c.init_scale
        self.value = matrix(rngs, (d, n, e, h), P(STORED, "tensor", None, None), fan_in=d, scale=scale)
        spec = P("tensor", None, None, STORED)
        self.out = matrix(rngs, (n, e, h, d), spec, fan_in=n * h, scale=scale, inputs=3)
        self.value_router, self.out_router = (
            matrix(rngs, (d, n, e), REPLICATED, fan_in=d, scale=scale, inputs=0) for _ in range(2)
        )

    def project_heads(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Queries and keys as in dense attention; values are weighted sums of the experts'."""
        if name != "value":
            return super().project_heads(name, x)
        weights = self._weights(self._routing(x, self.value_router))  # [B,T,N,E]
        values = self._product(x, self.value)  # [B,T,N,E,H]
        return jnp.einsum("btne,btneh->btnh", weights, values, preferred_element_type=jnp.float32).astype(x.dtype)

    def join(self, heads: Float[Array, "B T N H"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Weighted sum of the output experts of all heads."""
        weights = self._weights(self._routing(x, self.out_router))
        weighted = (weights[..., None] * heads[..., None, :].astype(jnp.float32)).astype(heads.dtype)
        return self._product(weighted, self.out)

    def report(self, x: Float[Array, "B T D"], rows: Rows) -> balancing.LayerReport:
        """Reports of 2·N routers: those of the values, then those of the output, by head."""
        mask = rows.as_keys > 0
        found = [self._reports(x, router, mask) for router in (self.value_router, self.out_router)]
        report = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
        loss = self.switch.balance * report.load_balancing_loss + self.switch.z * report.router_z_loss
        return dataclasses.replace(report, sparsity_penalty=loss)

    def _reports(self, x: Array, router: nnx.Param[Array], mask: Bool[Array, "B T"]) -> balancing.LayerReport:
        def one(routing: Routing) -> balancing.LayerReport:
            return balancing.report(routing, mask, routing.chosen, k=self.switch.k)

        return jax.vmap(one)(self._routing(x, router, mask))

    def _routing(
        self, x: Float[Array, "B T D"], router: nnx.Param[Array], mask: Bool[Array, "B T"] | None = None
    ) -> Routing:
        """Routing of every head, each array [N,B,T,...]; logits in float32."""
        inputs = GateInputs(jnp.ones(x.shape[:2], bool) if mask is None else mask)
        logits = constrain(float32_matmul(x.astype(jnp.float32), router[...]), partition_specs.HEADS)
        return jax.vmap(lambda logits: route(self.switch.gate, logits, inputs))(jnp.moveaxis(logits, 2, 0))

    def _weights(self, routing: Routing) -> Float[Array, "B T N E"]:
        """Weight of every expert, 0 unless it is chosen."""
        named = routing.expert_index[..., None] == jnp.arange(self.switch.experts)
        weights = jnp.sum(jnp.where(named, routing.combine_weights[..., None], 0.0), axis=-2)
        return jnp.moveaxis(weights, 0, 2)

    def _product(self, x: Array, weights: nnx.Param[Array]) -> Array:
        """x times the matrices of all experts, whose axes are joined."""
        precision = self.precision
        by = matmul if precision == "none" else functools.partial(quantized.matmul, precision=precision)
        return project_joined(x, weights, by)
