"""Soft MoE (Puigcerver et al. 2023): every slot of an expert is a weighted mean of all tokens of a group."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from moe.config import ModelConfig
from moe.config.registry import find_layer
from moe.dispatch.modes import mix
from moe.layers.moe_layer import MoELayer
from moe.layers.router import Router
from moe.layers.tokens import Keys
from moe.routing import balancing, gates
from moe.routing.routing import Choices, Routing, route

_LAYER = find_layer("soft_moe")


class SlotRouter(Router):
    """A column of W_g for every slot of every expert. Deviation from Soft MoE (2023, section 2.3): x and W_g are not
    L2-normalised, because x is the output of an RMSNorm."""

    @staticmethod
    def kernel_shape(config: ModelConfig) -> tuple[int, ...]:
        """[D,E,P] for P slots of every expert."""
        assert config.moe.gate is not None
        return *Router.kernel_shape(config), config.moe.gate.slots_per_expert


class SoftMoE(MoELayer):
    """Router logits per slot, experts on slots, and their outputs mixed back into tokens: nothing is routed or dropped.

    Example, with the gate of :mod:`moe.routing.gates`::

        layer = SoftMoE(d_model=512, d_ff=1024, num_experts=8, gate=gates.SoftMoE(slots=2), rngs=nnx.Rngs(0))
    """

    gate_class = gates.SoftMoE
    router_class = SlotRouter
    #: Settings of the paper's layer, which also hold where the gate is given as a value.
    defaults = types.MappingProxyType(
        {"gate": "soft_moe"} | {name: getattr(_LAYER, name) for name in ("dispatch", "capacity", "losses")}
    )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[ArrayLike, "B T"] | None = None,
        *,
        routing: Routing | Choices | None = None,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
        gate_inputs: Mapping[str, Any] = types.MappingProxyType({}),
        **read: Any,
    ) -> tuple[Float[Array, "B T D"], balancing.LayerReport, Routing]:
        """Mix, apply the experts, mix back; arguments and result are those of :class:`moe.layers.moe_layer.MoELayer`.

        The routing that is returned holds each token's probability of an expert, the sum over the expert's slots.

        Raises:
            ValueError: a routing to replay: slots are not in it.
        """
        if routing is not None:
            raise ValueError("a routing cannot be replayed by Soft MoE: its slots are not in it")
        tokens, keys = self.group(x, mask, read), Keys.split(rng)
        slot_logits, tokens = self._logits(tokens, keys)
        inputs = self._inputs(tokens, keys, train=train, **gate_inputs)
        routing = route(self.gate, expert_logits(slot_logits), inputs)
        weights = slot_weights(slot_logits, tokens.mask & ~routing.broken)

        def experts(rows: Array, routing: Routing) -> tuple[Array, Array]:
            return mix(rows, *weights, self._experts(keys, train=train)), routing.chosen

        return self._finish(x, tokens, routing, experts)


def expert_logits(slot_logits: Float[Array, "G S E C"]) -> Float[Array, "G S E"]:
    """Logits that make an expert's probability the sum over its slots; NaN where a slot's logit is not finite, since
    a slot at −inf would not show in the sum."""
    logits = jax.nn.logsumexp(slot_logits, axis=-1)
    return jnp.where(jnp.all(jnp.isfinite(slot_logits), axis=-1), logits, jnp.nan)


def slot_weights(
    slot_logits: Float[Array, "G S E C"], valid: Bool[Array, "G S"]
) -> tuple[Float[Array, "G S E C"], Float[Array, "G S E C"]]:
    """Dispatch weights of Soft MoE, a softmax over tokens, and combine weights, a softmax over slots (2023, equations 1
    and 3); 0 for tokens that are not valid."""
    valid = valid[..., None, None]
    slot_logits = jnp.where(valid, slot_logits, 0.0)
    # A group without valid tokens: softmax over −inf alone would be NaN.
    dispatch = jax.nn.softmax(jnp.where(valid, slot_logits, jnp.finfo(jnp.float32).min), axis=1)
    combine = jax.nn.softmax(slot_logits, axis=(2, 3))
    return jnp.where(valid, dispatch, 0.0), jnp.where(valid, combine, 0.0)
