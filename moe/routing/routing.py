"""Routing decisions of a batch: experts and weights of every token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from moe.config import ConfigError
from moe.routing.interface import ROUTING_FIELDS, Gate, GateInputs, GateOutput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """The experts of a routing without its weights: replayed, the router weighs them anew and keeps its gradient.

    Attributes:
        expert_index: [G,S,K] int32; of a whole model [L,G,S,K].
        chosen: bool of the same shape.
    """

    expert_index: Array
    chosen: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Assignments of one MoE layer, a plain pytree: it can be saved, and replayed in the same layer under another
    dispatch mode or mesh.

    Attributes:
        expert_index: [G,S,K] int32, experts of a token, first choice first.
        combine_weights: [G,S,K] float32, factor of each expert's output; 0 where not chosen.
        chosen: [G,S,K] bool, False for padding, broken tokens and assignments that the gate does not send.
        router_logits: [G,S,E] float32; zeros for broken tokens.
        router_probs: [G,S,E] float32, softmax of the logits over E, or the gate's own probabilities.
        broken: [G,S] bool, real tokens with a NaN or infinite router or noise logit; they are not routed.
        smooth_load: [G,S,E] float32, differentiable probability of being chosen; None: not defined by the gate.
        needed_bias: [G,S,E] float32, see :class:`moe.routing.interface.GateOutput`. A layer reports on these two and
            leaves them out of the routing that it returns.
    """

    expert_index: Array
    combine_weights: Array
    chosen: Array
    router_logits: Array
    router_probs: Array
    broken: Array
    smooth_load: Array | None = None
    needed_bias: Array | None = None

    @property
    def choices(self) -> Choices:
        """The experts alone."""
        return Choices(self.expert_index, self.chosen)


def save_routing(path: str, routing: Routing | Choices) -> None:
    """Write a routing, or choices, as an npz file with one array per attribute."""
    arrays = {field.name: getattr(routing, field.name) for field in dataclasses.fields(routing)}
    given: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
    np.savez_compressed(path, **given)


def load_routing(path: str) -> Routing | Choices:
    """Read a file of :func:`save_routing`, or of another program with the arrays of :class:`Choices`."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: jnp.asarray(archive[name]) for name in archive.files}
    return (Choices if arrays.keys() == {"expert_index", "chosen"} else Routing)(**arrays)


def route(
    gate: Gate,
    router_logits: Float[Array, "G S E"],
    mask: Bool[Array | np.ndarray, "G S"],
    *,
    experts_per_token: int,
    replay: Choices | None = None,
    **inputs: Any,
) -> Routing:
    """Apply a gate, and mask out padding and tokens with non-finite logits.

    Args:
        gate: the routing rule.
        router_logits: cast to float32.
        mask: True for real tokens; padding is never chosen and has zero weights.
        experts_per_token: K, at most E.
        replay: recorded experts to weigh anew instead of choosing.
        **inputs: further fields of :class:`moe.routing.interface.GateInputs`, such as ``rng``; the gate's own constants
            where they are not given.
    """
    inputs = {name: getattr(gate, name) for name in ROUTING_FIELDS} | inputs
    if replay is not None:
        inputs["expert_index"] = replay.expert_index
    router_logits, mask = router_logits.astype(jnp.float32), jnp.asarray(mask)
    finite = jnp.all(jnp.isfinite(router_logits), axis=-1)
    if inputs.get("noise_logits") is not None:
        finite &= jnp.all(jnp.isfinite(inputs["noise_logits"]), axis=-1)
        inputs["noise_logits"] = jnp.where(finite[..., None], inputs["noise_logits"], 0.0)
    router_logits = jnp.where(finite[..., None], router_logits, 0.0)
    valid = mask & finite
    output = gate.choose(router_logits, GateInputs(mask=valid, experts_per_token=experts_per_token, **inputs))
    if not isinstance(output, GateOutput) or output.weights.shape != output.expert_index.shape:
        raise ConfigError(f"gate {gate.source!r}: must return a GateOutput with expert_index and weights of one shape")
    chosen = jnp.broadcast_to(valid[..., None], output.expert_index.shape)
    accepted, expert_index = output.accepted, output.expert_index
    if replay is not None:
        accepted, expert_index = replay.chosen, replay.expert_index
    if accepted is not None:
        chosen = chosen & accepted
    return Routing(
        expert_index=expert_index.astype(jnp.int32),
        combine_weights=jnp.where(chosen, output.weights, 0.0),
        chosen=chosen,
        router_logits=router_logits,
        router_probs=jax.nn.softmax(router_logits, axis=-1) if output.probs is None else output.probs,
        broken=mask & ~finite,
        smooth_load=output.smooth_load,
        needed_bias=output.needed_bias,
    )
