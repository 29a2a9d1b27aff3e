"""The MoE layer: router, dispatch, experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe.config import ModelConfig
from moe.dispatch import experts as dispatch_experts
from moe.dispatch.modes import MODES
from moe.dispatch.plan import expert_capacity, plan_assignments
from moe.dispatch.soft import plan_slots
from moe.layers.experts import ExpertDropout, Experts
from moe.layers.ffn import DenseFFN
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.weights import matrix
from moe.routing import balancing
from moe.routing.interface import Gate
from moe.routing.registry import find_gate
from moe.routing.router import Router
from moe.routing.routing import Routing, route


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


def replace_gate(model: nnx.Module, gate: Gate) -> None:
    """Use this gate in every MoE layer of a model, with the router parameters that the layer has."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MoELayer):
            module.gate = gate


class MoELayer(nnx.Module):
    """A paper's layer: the gate of that name between a router and stacked experts."""

    def __init__(self, config: ModelConfig, *, gate: Gate | None = None, rngs: nnx.Rngs):
        self.config = config.moe
        self.gate = find_gate(config.moe.gate) if gate is None else gate
        self.router = None if self.gate.router == "none" else Router(config, gate=self.gate, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.shared = SharedExpert(config, rngs=rngs) if config.moe.shared_d_ff else None

    def __call__(
        self,
        x: Array,
        mask: Array,
        *,
        token_ids: Array | None = None,
        routing: Routing | None = None,
        train: bool = False,
        rng: Array | None = None,
    ) -> tuple[Array, balancing.LayerReport, Routing]:
        """Each token through its experts.

        Args:
            x: [B,T,D].
            mask: [B,T] bool, real tokens; padding takes no slot, gets 0 and counts in no loss.
            token_ids: [B,T] int32, for gates that route by identity.
            routing: over groups, used instead of the router's: a recorded one, replayed. The router is not asked.
            train: picks the capacity factor.
            rng: key of jitter, the gate's draws, random drops and expert dropout; None: deterministic.

        Returns:
            y [B,T,D], 0 for a token that no expert had room for (the residual carries it); the layer's report; the
            routing over groups.
        """
        c, gate = self.config, self.gate
        group_size = c.group_size or x.shape[1]
        # [B,T,D] → [G,S,D]; a group is a run of S tokens of the batch in row order, on whatever mesh.
        tokens = constrain(x.reshape(-1, group_size, x.shape[-1]), partition_specs.BATCH)
        groups = tokens.shape[0]
        mask = mask.reshape(groups, group_size)
        jitter_rng, gate_rng, drop_rng, dropout_rng = (None,) * 4 if rng is None else tuple(jax.random.split(rng, 4))
        factor = c.capacity_factor if train else c.eval_capacity_factor
        capacity = expert_capacity(factor, c.experts_per_token, group_size, c.num_experts)
        slot_logits = None
        if routing is None:
            logits = jnp.zeros((groups, group_size, c.num_experts), jnp.float32)
            if self.router is not None:
                logits = self.router(tokens, jitter=c.jitter, rng=jitter_rng)
            if gate.router == "slots":
                # An expert's probability is the sum of its slots': [G,S,E,P] → [G,S,E]
                slot_logits, logits = logits, jax.nn.logsumexp(logits, axis=-1)
                # A slot at -inf would not show in the sum: the token is broken all the same.
                logits = jnp.where(jnp.all(jnp.isfinite(slot_logits), axis=-1), logits, jnp.nan)
            routing = route(
                gate,
                logits,
                mask,
                experts_per_token=c.experts_per_token,
                rng=gate_rng,
                expert_capacity=capacity,
                expert_groups=c.expert_groups,
                kept_expert_groups=c.kept_expert_groups,
                renormalise=c.renormalise == 1,
                routing_scale=c.routing_scale,
                noise_logits=None if self.router is None or gate_rng is None else self.router.noise_logits(tokens),
                selection_bias=None if self.router is None or self.router.bias is None else self.router.bias[...],
                token_ids=None if token_ids is None else token_ids.reshape(groups, group_size),
            )
        elif gate.router == "slots" or routing.chosen.shape[:2] != (groups, group_size):
            raise ValueError(
                f"a routing of {routing.chosen.shape[:2]} groups and tokens cannot be replayed here: the gate is "
                f"{c.gate!r} (soft_moe's slots are not in it), groups and tokens are {(groups, group_size)}"
            )
        # A broken token must not reach others through a sum in which its weight is 0.
        tokens = jnp.where(routing.broken[..., None], 0, tokens)
        experts: dispatch_experts.Experts = self.experts
        if train and dropout_rng is not None and c.expert_dropout > 0:
            experts = ExpertDropout(self.experts, c.expert_dropout, dropout_rng)
        if slot_logits is not None:
            mode, sent, plan = "soft", routing, plan_slots(slot_logits, routing, mask)
        else:
            mode, (sent, plan) = c.dispatch, plan_assignments(c, routing, capacity, rng=drop_rng)
        y = MODES[mode](tokens, sent, plan, experts)
        # [G,S,D] → [B,T,D]
        y = constrain(y.astype(x.dtype).reshape(x.shape), partition_specs.BATCH)
        if self.shared is not None:
            # mask: [G,S] → [B,T,1]
            y = y + jnp.where(mask.reshape(*x.shape[:2], 1), self.shared(x), 0)
        report = balancing.report(
            routing,
            mask,
            plan.kept,
            first_choice=gate.balance_first_choice,
            parts={"batch": 1, "group": groups, "sequence": x.shape[0]}[c.balance_scope],
            expert_groups=c.expert_groups,
        )
        return y, report, routing
