"""Stacked experts, and the MoE layer: router, dispatch, experts in that order.

In: x [B,T,D] and which tokens are real. Out: y [B,T,D] and a :class:`moe.balancing.LayerReport`. The experts know
nothing of where their rows come from.

Letters: B batch, T sequence, G groups, S tokens per group, E experts, K choices per token, D model dim, F hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe import balancing, dispatch, sharding
from moe.config import ModelConfig
from moe.grouped import grouped_matmul
from moe.layers import GATED_ACTIVATIONS, DenseFFN, activate, matrix
from moe.routing import GATES, Routing, route


class Experts(nnx.Module):
    """E FFNs of one shape, as three stacked matrices."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        e, d, f = config.moe.num_experts, config.d_model, config.moe.d_ff
        self.activation = config.activation
        self.up = matrix(rngs, (e, d, f), d, config.init_scale)
        self.down = matrix(rngs, (e, f, d), f, config.init_scale)
        self.gate = matrix(rngs, (e, d, f), d, config.init_scale) if self.activation in GATED_ACTIVATIONS else None

    def batched(self, rows: Array) -> Array:
        """[E,R,D] → [E,R,D]: expert e over its R rows."""
        return self._ffn(rows, lambda rows, weights: jnp.einsum("eri,eij->erj", rows, weights))

    def grouped(self, rows: Array, group_sizes: Array) -> Array:
        """[R,D], [E] int32 → [R,D]: the first group_sizes[0] rows by expert 0, the next by expert 1, and so on."""
        return self._ffn(rows, lambda rows, weights: grouped_matmul(rows, weights, group_sizes))

    def _ffn(self, rows: Array, matmul: Callable[[Array, Array], Array]) -> Array:
        """The FFN over whatever layout ``matmul`` multiplies by [E,D,F] or [E,F,D]."""
        up = matmul(rows, sharding.use("experts.up", self.up[...], rows.dtype))
        gate = None
        if self.gate is not None:
            gate = matmul(rows, sharding.use("experts.gate", self.gate[...], rows.dtype))
        hidden = activate(self.activation, up, gate)
        return matmul(hidden, sharding.use("experts.down", self.down[...], rows.dtype))


class Router(nnx.Module):
    """x·W_g in float32 whatever the compute dtype (Switch 2021, section 2.4, "selective precision")."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.kernel = matrix(rngs, (config.d_model, config.moe.num_experts), config.d_model, config.init_scale)

    def __call__(self, x: Array, *, jitter: float = 0.0, rng: Array | None = None) -> Array:
        """[G,S,D] → router_logits [G,S,E] float32; the jitter multiplies this copy of x and nothing else."""
        x = x.astype(jnp.float32)
        if rng is not None and jitter > 0.0:
            x = x * jax.random.uniform(rng, x.shape, minval=1.0 - jitter, maxval=1.0 + jitter)
        # TPUs multiply float32 in bfloat16 passes unless told otherwise.
        return jnp.einsum("gsd,de->gse", x, self.kernel[...], precision=jax.lax.Precision.HIGHEST)


class SharedExpert(nnx.Module):
    """An FFN that every token visits, its output weighted by sigmoid(x·w) if so configured (DeepSeekMoE 2024,
    equation 9; the gate is Qwen2-MoE's). Not one of the E."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dense = DenseFFN(config, config.moe.shared_d_ff, rngs=rngs)
        d, scale = config.d_model, config.init_scale
        self.gate = matrix(rngs, (d, 1), d, scale) if config.moe.shared_gate else None

    def __call__(self, x: Array) -> Array:
        """[B,T,D] → [B,T,D]."""
        y = self.dense(x)
        return y if self.gate is None else y * jax.nn.sigmoid(x @ self.gate[...].astype(x.dtype))


class MoELayer(nnx.Module):
    """A paper's layer: the gate of that name between a router and stacked experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config.moe
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.shared = SharedExpert(config, rngs=rngs) if config.moe.shared_d_ff else None

    def __call__(
        self, x: Array, mask: Array, *, train: bool = False, rng: Array | None = None
    ) -> tuple[Array, balancing.LayerReport, Routing]:
        """Each token through its experts.

        Args:
            x: [B,T,D].
            mask: [B,T] bool, real tokens; padding takes no slot, gets 0 and counts in no loss.
            train: picks the capacity factor.
            rng: key of the router's jitter and of the gate's draws; None: deterministic.

        Returns:
            y [B,T,D], 0 for a token that no expert had room for (the residual carries it); the layer's report; the
            routing over groups.
        """
        c = self.config
        gate = GATES[c.gate]
        group_size = c.group_size or x.shape[1]
        # [B,T,D] → [G,S,D]; a group is a run of S tokens of the batch in row order, on whatever mesh.
        tokens = sharding.constrain(x.reshape(-1, group_size, x.shape[-1]), sharding.BATCH)
        mask = mask.reshape(-1, group_size)
        jitter_rng, gate_rng = (None, None) if rng is None else tuple(jax.random.split(rng))
        router_logits = self.router(tokens, jitter=c.jitter, rng=jitter_rng)
        routing = route(gate, router_logits, mask, experts_per_token=c.experts_per_token, rng=gate_rng)
        factor = c.capacity_factor if train else c.eval_capacity_factor
        capacity = dispatch.expert_capacity(factor, c.experts_per_token, group_size, c.num_experts)
        if c.dispatch == "dropless":
            capacity = group_size * c.experts_per_token  # room for every pair
        plan = dispatch.make_plan(routing, capacity)
        y = dispatch.MODES[c.dispatch](tokens, routing, plan, self.experts)
        # [G,S,D] → [B,T,D]
        y = sharding.constrain(y.astype(x.dtype).reshape(x.shape), sharding.BATCH)
        if self.shared is not None:
            # mask: [G,S] → [B,T,1]
            y = y + jnp.where(mask.reshape(*x.shape[:2], 1), self.shared(x), 0)
        return y, balancing.report(routing, mask, plan.kept, first_choice=gate.balance_first_choice), routing
