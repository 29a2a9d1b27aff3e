"""Routing decisions of a batch: experts and weights of every token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from moe.routing.carry import handed_on
from moe.routing.gate_values import GateInputs, GateOutput
from moe.routing.interface import ROUTES, Gate
from moe.system.fields import LARGEST, ConfigError
from moe.system.npz_files import read_arrays, write_arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """The experts of a routing without their weights, which the router recomputes in a replay, with a gradient.

    Attributes:
        expert_index: [G,S,K] int32; for a whole model [L,G,S,K].
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
        needed_bias: [G,S,E] float32, see :class:`moe.routing.gate_values.GateOutput`. A layer uses it and
            ``smooth_load`` for its report and omits both from the routing that it returns.
        carry: pytree of [G,S,...] float32, what the router hands on to the MoE layer above, 0 for tokens that are not
            routed; None: nothing. A model omits it from the routing that it returns.
    """

    expert_index: Array
    combine_weights: Array
    chosen: Array
    router_logits: Array
    router_probs: Array
    broken: Array
    smooth_load: Array | None = None
    needed_bias: Array | None = None
    carry: Any = None

    def without_report_inputs(self) -> Routing:
        """The routing without what only a layer's report reads."""
        return dataclasses.replace(self, smooth_load=None, needed_bias=None)

    @property
    def choices(self) -> Choices:
        """The experts without their weights."""
        return Choices(self.expert_index, self.chosen)


def save_routing(path: str, routing: Routing | Choices) -> None:
    """Write a routing, or choices, as an npz file with one array per attribute; ``carry`` is not written."""
    arrays = {name: getattr(routing, name) for name in _stored_fields(type(routing))}
    given: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
    write_arrays(Path(path), given)


def _stored_fields(kind: type[Routing | Choices]) -> dict[str, bool]:
    """Attribute → whether a file must have it."""
    fields = (field for field in dataclasses.fields(kind) if field.name != "carry")
    return {field.name: field.default is dataclasses.MISSING for field in fields}


def load_routing(path: str) -> Routing | Choices:
    """Read a file of :func:`save_routing`, or of another program with the arrays of :class:`Choices`.

    Raises:
        ConfigError: it holds something else; see also :func:`moe.system.npz_files.read_arrays`.
    """
    arrays = read_arrays(path)
    where = f"{path}: not the arrays of a routing, or of choices"
    kind = Choices if arrays.keys() == {"expert_index", "chosen"} else Routing
    fields = _stored_fields(kind)
    needed = {name for name, is_needed in fields.items() if is_needed}
    if wrong := sorted((needed - arrays.keys()) | (arrays.keys() - fields.keys())):
        raise ConfigError(f"{where}: {wrong[0]} is {'not one of them' if wrong[0] in arrays else 'missing'}")
    experts, chosen = arrays["expert_index"], arrays["chosen"]
    if experts.dtype.kind not in "iu" or chosen.dtype.kind != "b" or experts.ndim not in (3, 4):
        raise ConfigError(f"{where}: expert_index must be integers [G,S,K] or [L,G,S,K], and chosen booleans")
    if experts.size and not (int(experts.min()) >= 0 and int(experts.max()) <= LARGEST):
        raise ConfigError(f"{where}: expert_index must be from 0 to {LARGEST}")
    if chosen.shape != experts.shape:
        raise ConfigError(f"{where}: chosen must be of expert_index's shape {experts.shape}, not {chosen.shape}")
    return kind(**{name: jnp.asarray(array) for name, array in arrays.items()})


def route(
    gate: Gate,
    router_logits: Float[Array, "G S E"],
    inputs: GateInputs,
    *,
    replay: Choices | None = None,
) -> Routing:
    """Apply a gate, and mask out padding and tokens with non-finite logits.

    Args:
        router_logits: cast to float32.
        inputs: with the mask of the real tokens; padding is never chosen and has zero weights.
        replay: recorded experts to use instead of choosing; their weights are recomputed.

    Raises:
        ConfigError: a user's gate returns something other than assignments of these tokens to these experts.
    """
    router_logits = router_logits.astype(jnp.float32)
    mask = inputs.mask
    noise_logits = inputs.noise_logits
    finite = jnp.all(jnp.isfinite(router_logits), axis=-1)
    if noise_logits is not None:
        finite &= jnp.all(jnp.isfinite(noise_logits), axis=-1)
        noise_logits = jnp.where(finite[..., None], noise_logits, 0.0)
    finite = checkpoint_name(finite, ROUTES)
    router_logits = jnp.where(finite[..., None], router_logits, 0.0)
    valid = mask & finite
    recorded = None if replay is None else replay.expert_index
    inputs = dataclasses.replace(inputs, mask=valid, noise_logits=noise_logits, expert_index=recorded)
    return assigned(gate, gate.route(router_logits, inputs), router_logits, mask, finite, replay, inputs.carry)


def assigned(
    gate: Gate,
    output: GateOutput,
    router_logits: Array,
    mask: Array,
    finite: Array,
    replay: Choices | None = None,
    carry: Any = None,
) -> Routing:
    """The routing of a gate's output, or of recorded choices with its weights; arguments are those of :func:`route`.

    Args:
        finite: [G,S], tokens whose logits are finite.
        carry: that the gate read.
    """
    valid = mask & finite
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
        broken=mask & (~finite if output.broken is None else ~finite | output.broken),
        smooth_load=output.smooth_load,
        needed_bias=output.needed_bias,
        carry=None if carry is output.carry is None else handed_on(gate, carry, output.carry, valid),
    )
