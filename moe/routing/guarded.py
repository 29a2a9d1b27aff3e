"""Guards of a user's gate: errors that name its class, and checks of what its methods return."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe.routing.gate_values import GateInputs, GateOutput
from moe.system.fields import ConfigError, raised_as_errors
from moe.system.guarded import Guard, is_own


def named_in_errors(gate: Any, what: str) -> contextlib.AbstractContextManager[None]:
    """Raise errors in code of a user's gate as ConfigErrors that begin with the gate's name and ``what``."""
    return raised_as_errors(f"gate {gate.name}: {what}") if is_own(gate) else contextlib.nullcontext()


def check_output(gate: Any, output: object, router_logits: Array) -> GateOutput:
    """Refuse outputs of wrong types, shapes or dtypes. Raises ConfigError."""
    name = f"gate {type(gate).__name__}"
    if not isinstance(output, GateOutput):
        raise ConfigError(f"{name}: route must return a GateOutput, not {type(output).__name__}")
    tokens, (shape, kind) = router_logits.shape[:2], (jnp.shape(output.expert_index), output.expert_index.dtype)
    if len(shape) != 3 or shape[:2] != tokens or not jnp.issubdtype(kind, jnp.integer):
        raise ConfigError(f"{name}: expert_index is {kind}{list(shape)}, must be integers [{tokens[0]},{tokens[1]},K]")
    for field, wanted in (
        ("weights", shape),
        ("accepted", shape),
        ("probs", router_logits.shape),
        ("smooth_load", router_logits.shape),
        ("needed_bias", router_logits.shape),
    ):
        value, dtype = getattr(output, field), jnp.bool_ if field == "accepted" else jnp.float32
        if value is not None and (jnp.shape(value) != wanted or value.dtype != dtype):
            is_now = f"{value.dtype}{list(jnp.shape(value))}"
            raise ConfigError(f"{name}: {field} is {is_now}, must be {jnp.dtype(dtype).name}{list(wanted)}")
    return output


def _without_wrong_choices(output: GateOutput, router_logits: Array, inputs: GateInputs) -> GateOutput:
    """Call tokens broken that have an expert twice, one that does not exist, or a weight or probability that is
    negative or not finite, and all of them if the selection bias is not finite: :func:`moe.routing.own_gates.probe`
    sees few tokens, and these would be trained without a word."""
    index, k = output.expert_index, output.expert_index.shape[-1]
    chosen = jnp.broadcast_to(inputs.mask[..., None], index.shape)
    chosen = chosen if output.accepted is None else chosen & output.accepted
    ordered = jnp.sort(jnp.where(chosen, index, -1 - jnp.arange(k)), axis=-1)
    exists = (index >= 0) & (index < router_logits.shape[-1])
    weights = jnp.isfinite(output.weights) & (output.weights >= 0)
    sound = jnp.all((exists & weights) | ~chosen, axis=-1)
    sound &= jnp.all(ordered[..., 1:] != ordered[..., :-1], axis=-1)
    sound &= True if inputs.selection_bias is None else jnp.all(jnp.isfinite(inputs.selection_bias))
    probs = jax.nn.softmax(router_logits, axis=-1) if output.probs is None else output.probs
    shares = {"probs": probs} | ({} if output.smooth_load is None else {"smooth_load": output.smooth_load})
    for share in shares.values():
        sound &= jnp.all(jnp.isfinite(share) & (share >= 0), axis=-1)
    return output._replace(
        **{name: jnp.where(sound[..., None], share, 0.0) for name, share in shares.items()},
        accepted=chosen & sound[..., None],
        broken=~sound,
    )


def _route(gate: Any, route: Callable[..., Any]) -> Callable[..., GateOutput]:
    def checked(router_logits: Array, inputs: GateInputs) -> GateOutput:
        with raised_as_errors(f"gate {type(gate).__name__}: route"):
            output = check_output(gate, route(router_logits, inputs), router_logits)
            replayed = inputs.expert_index is not None
            return output if replayed else _without_wrong_choices(output, router_logits, inputs)

    return checked


def _parameter_loss(gate: Any, parameter_loss: Callable[..., Any]) -> Callable[..., Array | None]:
    def checked(router: Array, experts: Array, rng: Array | None) -> Array | None:
        name = f"gate {type(gate).__name__}: parameter_loss"
        with raised_as_errors(name):
            loss = parameter_loss(router, experts, rng)
        if loss is not None and jnp.shape(loss):
            raise ConfigError(f"{name} returns an array {list(jnp.shape(loss))}: must be a number or None")
        return loss

    return checked


def _first_carry(gate: Any, first_carry: Callable[..., Any]) -> Callable[..., Any]:
    def checked(num_experts: int) -> Any:
        with raised_as_errors(f"gate {gate.name}: first_carry"):
            return jax.tree.map(jnp.asarray, first_carry(num_experts))

    return checked


#: Guards by method of :class:`moe.routing.interface.Gate`.
GUARDS: Mapping[str, Guard] = types.MappingProxyType(
    {"route": _route, "parameter_loss": _parameter_loss, "first_carry": _first_carry}
)
