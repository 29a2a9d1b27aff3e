"""The router of an MoE layer: its parameters, the state of its balancing rule, and the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.layers.parameter import matrix, parameter, zeros
from moe.parallel import partition_specs
from moe.routing.balancing_rules import restored, stored
from moe.routing.carry import HANDED
from moe.routing.interface import Gate, RouterKind


class SelectionBias(nnx.Variable):
    """[E] float32 without a gradient, which the train step updates: the state of ``Gate.balancing``, or part of it."""


class Router(nnx.Module):
    """Linear router, x·W_g in float32 whatever the compute dtype ("selective precision", Switch 2021, section 2.4).

    With ``moe.router_dtype="bfloat16"``, x, W_g and the logits are rounded to bfloat16, for ablations; with
    ``moe.router_softcap`` = c they are c·tanh(logits / c). The gate says
    which further parameters there are (``kind``): W_noise (W_g and W_noise start at zero,
    Shazeer 2017, section 4 and appendix A) and the state of its balancing rule.
    """

    def __init__(self, config: ModelConfig, *, kind: RouterKind = "linear", rngs: nnx.Rngs):
        gate = config.moe.gate
        d = config.d_model
        e = config.moe.num_experts + config.moe.null_experts
        self.dtype, self.softcap = config.moe.router_dtype, config.moe.router_softcap
        self.bias = None if gate is None else _state_variables(gate, e)
        self.logit_bias = zeros((e,)) if config.moe.bias != "none" else None
        self.noise = zeros((d, e)) if kind == "noisy" else None
        if kind == "noisy":
            self.kernel = zeros((d, e), inputs=1)
        else:
            shape = self.kernel_shape(config)
            self.kernel = matrix(rngs, shape, partition_specs.REPLICATED, fan_in=shape[0], scale=config.init_scale)

    @staticmethod
    def kernel_shape(config: ModelConfig) -> tuple[int, ...]:
        """Shape of W_g, [D,E]; a derived router may have further axes."""
        return config.d_model, config.moe.num_experts + config.moe.null_experts

    def __call__(
        self, x: Float[Array, "G S D"], *, jitter: float = 0.0, rng: Array | None = None, carry: Any = None
    ) -> Float[Array, "G S *columns"]:
        """Router logits [G,S,E] in float32. A derived router that hands a vector on returns a pair, the logits and the
        new carry.

        Args:
            x: activations; jitter multiplies a copy that only the router sees.
            jitter: the factors are uniform in [1 − jitter, 1 + jitter].
            rng: key of the jitter; None: no jitter.
            carry: ``GateInputs.carry``; not read here.
        """
        del carry
        # Named in its own dtype, which says how it was rounded.
        x = jittered(checkpoint_name(x, partition_specs.ROUTER_INPUT), jitter, rng)
        features, columns = self.features(x), self.columns()
        logits = matmul(features.astype(self.dtype), columns.astype(self.dtype)).astype(jnp.float32)
        logits = logits if self.logit_bias is None else logits + self.logit_bias[...]
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits

    def logits(
        self, x: Float[Array, "G S D"], read: Mapping[str, Any], *, jitter: float, rng: Array | None
    ) -> tuple[Float[Array, "G S *columns"], Mapping[str, Any]]:
        """Router logits, and what tokens read (``Tokens.read``) with what the router hands on."""
        if HANDED not in read:
            return self(x, jitter=jitter, rng=rng), read
        output = self(x, jitter=jitter, rng=rng, **{HANDED: read[HANDED]})
        return (output[0], {**read, HANDED: output[1]}) if isinstance(output, tuple) else (output, read)

    def balancing_inputs(self, gate: Gate) -> dict[str, Any]:
        """State of the gate's balancing rule, and the selection bias that follows from it; {} without a state."""
        state = self._state(gate)
        if state is None or gate.balancing is None:
            return {}
        return {"selection_bias": gate.balancing.selection_bias(state), "state": state}

    def penalty(self, gate: Gate) -> Float[Array, ""] | None:
        """Strength of the sparsity penalty by the gate's balancing rule; None without one."""
        state = self._state(gate)
        return None if state is None or gate.balancing is None else gate.balancing.penalty(state)

    def _state(self, gate: Gate) -> Any:
        """State of the gate's balancing rule; None without one."""
        kept, rule = self.bias, gate.balancing
        if kept is None or rule is None:
            return None
        return restored(rule, {k: v[...] for k, v in kept.items()} if isinstance(kept, nnx.Dict) else kept[...])

    def features(self, x: Float[Array, "G S D"]) -> Float[Array, "G S inputs"]:
        """Inputs of W_g: x, unless a derived router changes it."""
        return x

    def columns(self) -> Array:
        """W_g, unless a derived router changes it."""
        return self.kernel[...]

    def noise_logits(self, x: Float[Array, "G S D"]) -> Float[Array, "G S E"] | None:
        """x·W_noise in float32; None for a gate without noise."""
        return None if self.noise is None else matmul(x.astype(jnp.float32), self.noise[...])


def _state_variables(gate: Gate, num_experts: int) -> SelectionBias | nnx.Dict | None:
    """Variables of the first state of a gate's balancing rule: one, or one of each array; None without a rule."""
    if gate.balancing is None:
        return None
    state = stored(gate.balancing.first_state(num_experts))
    if not isinstance(state, dict):
        return parameter(state, partition_specs.REPLICATED, kind=SelectionBias)
    return nnx.Dict(
        {name: parameter(array, partition_specs.REPLICATED, kind=SelectionBias) for name, array in state.items()}
    )


def jittered(x: Float[Array, "G S D"], jitter: float, rng: Array | None) -> Float[Array, "G S D"]:
    """x in float32, times factors uniform in [1 − jitter, 1 + jitter]; without a key, x in float32."""
    x = x.astype(jnp.float32)
    if rng is None or jitter == 0.0:
        return x
    return x * jax.random.uniform(rng, x.shape, minval=1.0 - jitter, maxval=1.0 + jitter)


def matmul(x: Array, kernel: Array) -> Array:
    """x·W in the highest precision."""
    # By default TPUs multiply float32 matrices in bfloat16 passes.
    return jnp.einsum("gsd,d...->gs...", x, kernel, precision=jax.lax.Precision.HIGHEST)
