"""Stacked experts, and the MoE layer: router, dispatch, experts in that order.

In: x [B,T,D] and which tokens are real. Out: y [B,T,D] and a :class:`moe.balancing.LayerReport`. The experts know
nothing of where their rows come from.

Letters: B batch, T sequence, G groups, S tokens per group, E experts, K choices per token, D model dim, F hidden dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe import balancing, dispatch, sharding
from moe.config import ModelConfig
from moe.grouped import Chunks, grouped_ffn
from moe.layers import GATED_ACTIVATIONS, DenseFFN, activate, matrix
from moe.routing import GATES, Routing, route

Drop = Callable[[Array], Array]


class Experts(nnx.Module):
    """E FFNs of one shape, as three stacked matrices."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        e, d, f = config.moe.num_experts, config.d_model, config.moe.d_ff
        self.activation = config.activation
        self.up = matrix(rngs, (e, d, f), d, config.init_scale)
        self.down = matrix(rngs, (e, f, d), f, config.init_scale)
        self.gate = matrix(rngs, (e, d, f), d, config.init_scale) if self.activation in GATED_ACTIVATIONS else None

    def matrices(self, dtype: Any) -> tuple[tuple[Array, ...], Array]:
        """((up, and gate if any) [E,D,F], down [E,F,D]), ready for matmuls of that dtype."""
        into = (sharding.use("experts.up", self.up[...], dtype),)
        if self.gate is not None:
            into += (sharding.use("experts.gate", self.gate[...], dtype),)
        return into, sharding.use("experts.down", self.down[...], dtype)

    def batched(self, rows: Array, drop: Drop | None = None) -> Array:
        """[E,R,D] → [E,R,D]: expert e over its R rows.

        Args:
            rows: [E,R,D].
            drop: applied to the hidden activations.
        """
        into, out_of = self.matrices(rows.dtype)
        return _batched_matmul(_hidden(self.activation, drop, _first(rows, into, _batched_matmul)), out_of)

    def grouped(self, matrices: Any, rows: Array, sizes: Array, pieces: Chunks, drop: Drop | None = None) -> Array:
        """[R,D] → [R,D]: the first sizes[0] rows by expert 0, the next by expert 1, and so on.

        Args:
            matrices: from :meth:`matrices`, all or one device's experts.
            rows: [R,D].
            sizes: [E] int32, padded for ``pieces``.
            pieces: static.
            drop: applied to the hidden activations.
        """
        into, out_of = matrices
        starts = jnp.cumsum(sizes) - sizes
        if drop is None:
            second = functools.partial(_second, self.activation)
            return grouped_ffn(_first, second, rows, into, out_of, starts, sizes, pieces)
        hidden = _hidden(self.activation, drop, grouped_ffn(_first, None, rows, into, (), starts, sizes, pieces))
        (rows,) = grouped_ffn(_first, None, hidden, (out_of,), (), starts, sizes, pieces)
        return rows


def _first(rows: Array, into: tuple[Array, ...], matmul: Callable[[Array, Array], Array]) -> tuple[Array, ...]:
    return tuple(matmul(rows, matrix) for matrix in into)


def _hidden(activation: str, drop: Drop | None, inputs: tuple[Array, ...]) -> Array:
    hidden = activate(activation, inputs[0], inputs[1] if len(inputs) > 1 else None)
    return hidden if drop is None else drop(hidden)


def _second(
    activation: str, inputs: tuple[Array, ...], out_of: Array, matmul: Callable[[Array, Array], Array]
) -> Array:
    return matmul(_hidden(activation, None, inputs), out_of)


def _batched_matmul(rows: Array, matrices: Array) -> Array:
    return jnp.einsum("eri,eij->erj", rows, matrices)


@dataclasses.dataclass(frozen=True)
class ExpertDropout:
    """Experts whose hidden activations are dropped at a rate (Switch 2021, section 4.2, "expert dropout")."""

    experts: Experts
    rate: float
    rng: Array

    def matrices(self, dtype: Any) -> Any:
        """As :meth:`Experts.matrices`."""
        return self.experts.matrices(dtype)

    def batched(self, rows: Array) -> Array:
        """As :meth:`Experts.batched`."""
        return self.experts.batched(rows, self._drop)

    def grouped(self, matrices: Any, rows: Array, sizes: Array, pieces: Chunks) -> Array:
        """As :meth:`Experts.grouped`."""
        return self.experts.grouped(matrices, rows, sizes, pieces, self._drop)

    def _drop(self, hidden: Array) -> Array:
        # Under shard_map each device has rows of its own: it draws its own.
        manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
        rng = jax.random.fold_in(self.rng, jax.lax.axis_index(manual)) if manual else self.rng
        kept = jax.random.bernoulli(rng, 1.0 - self.rate, hidden.shape)
        return jnp.where(kept, hidden / (1.0 - self.rate), 0).astype(hidden.dtype)


class SelectionBias(nnx.Variable):
    """[E] float32, added to the scores for the choice alone. No gradient reaches it; the train step moves it."""


class Router(nnx.Module):
    """x·W_g in float32 whatever the compute dtype (Switch 2021, section 2.4, "selective precision"), unless
    ``moe.router_dtype`` says bfloat16: x, W_g and the logits are then rounded to it, for who wants to see what happens.

    The gate says what else it has (:attr:`moe.routing.Gate.router`): W_noise, both zero at first (Shazeer 2017, section
    4 and appendix A); a selection bias, zero at first; or a column per slot. Deviation from Soft MoE (2023, section
    2.3): x and W_g are not L2-normalised, x being the output of an RMSNorm.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, e, kind = config.d_model, config.moe.num_experts, GATES[config.moe.gate].router
        self.dtype = config.moe.router_dtype
        self.bias = SelectionBias(jnp.zeros((e,), jnp.float32)) if kind == "biased" else None
        self.noise = nnx.Param(jnp.zeros((d, e), jnp.float32)) if kind == "noisy" else None
        if kind == "noisy":
            self.kernel = nnx.Param(jnp.zeros((d, e), jnp.float32))
        else:
            shape = (d, e, config.moe.slots_per_expert) if kind == "slots" else (d, e)
            self.kernel = matrix(rngs, shape, d, config.init_scale)

    def __call__(self, x: Array, *, jitter: float = 0.0, rng: Array | None = None) -> Array:
        """[G,S,D] → router_logits [G,S,E] float32, or [G,S,E,P] of slots.

        The jitter multiplies this copy of x and nothing else.
        """
        x = x.astype(jnp.float32)
        if rng is not None and jitter > 0.0:
            x = x * jax.random.uniform(rng, x.shape, minval=1.0 - jitter, maxval=1.0 + jitter)
        return _matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype)).astype(jnp.float32)

    def noise_logits(self, x: Array) -> Array | None:
        """[G,S,D] → x·W_noise [G,S,E] float32, or None."""
        return None if self.noise is None else _matmul(x.astype(jnp.float32), self.noise[...])


def _matmul(x: Array, kernel: Array) -> Array:
    # TPUs multiply float32 in bfloat16 passes unless told otherwise.
    return jnp.einsum("gsd,d...->gs...", x, kernel, precision=jax.lax.Precision.HIGHEST)


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
        self.router = None if GATES[config.moe.gate].router == "none" else Router(config, rngs=rngs)
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
        c, gate = self.config, GATES[self.config.gate]
        group_size = c.group_size or x.shape[1]
        # [B,T,D] → [G,S,D]; a group is a run of S tokens of the batch in row order, on whatever mesh.
        tokens = sharding.constrain(x.reshape(-1, group_size, x.shape[-1]), sharding.BATCH)
        groups = tokens.shape[0]
        mask = mask.reshape(groups, group_size)
        jitter_rng, gate_rng, drop_rng, dropout_rng = (None,) * 4 if rng is None else tuple(jax.random.split(rng, 4))
        factor = c.capacity_factor if train else c.eval_capacity_factor
        capacity = dispatch.expert_capacity(factor, c.experts_per_token, group_size, c.num_experts)
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
        experts: dispatch.Experts = self.experts
        if train and dropout_rng is not None and c.expert_dropout > 0:
            experts = ExpertDropout(self.experts, c.expert_dropout, dropout_rng)
        if slot_logits is not None:
            sound = mask & ~routing.broken
            weights = dispatch.soft_weights(jnp.where(sound[..., None, None], slot_logits, 0.0), sound)
            y, kept = dispatch.mix(tokens, *weights, experts), routing.chosen
        else:
            if c.dispatch == "dropless":
                capacity = group_size * routing.chosen.shape[-1]  # room for every pair
            # Where nothing can be dropped, the order of service is nobody's concern.
            policy = c.drop_policy if capacity < group_size else "position"
            plan = dispatch.make_plan(routing, capacity, drop_policy=policy, rng=drop_rng)
            sent = routing
            if c.overflow_to_next:
                sent, plan = dispatch.overflow_to_next(routing, plan)
            y, kept = dispatch.MODES[c.dispatch](tokens, sent, plan, experts), plan.kept
        # [G,S,D] → [B,T,D]
        y = sharding.constrain(y.astype(x.dtype).reshape(x.shape), sharding.BATCH)
        if self.shared is not None:
            # mask: [G,S] → [B,T,1]
            y = y + jnp.where(mask.reshape(*x.shape[:2], 1), self.shared(x), 0)
        report = balancing.report(
            routing,
            mask,
            kept,
            first_choice=gate.balance_first_choice,
            parts={"batch": 1, "group": groups, "sequence": x.shape[0]}[c.balance_scope],
            expert_groups=c.expert_groups,
        )
        return y, report, routing
