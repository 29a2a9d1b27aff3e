"""Inputs and output of a gate."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jax import Array


@dataclasses.dataclass(frozen=True)
class GateInputs:
    """Inputs of a gate in a call of the layer, besides the router logits.

    Attributes:
        mask: [G,S] bool, tokens to route: neither padding nor broken.
        rng: key for the gate's random draws; None: deterministic, as in evaluation.
        train: whether this is a training step.
        expert_capacity: C, tokens per expert under expert choice; 0: ceil(K·S/E).
        noise_logits: [G,S,E] float32, x·W_noise of noisy top-k; None: no noise.
        selection_bias: [E] float32, added to the scores for selection only; None: zeros.
        state: of the gate's balancing rule, a pytree of [E] float32 arrays; None: the gate has no rule.
        token_ids: [G,S] int32, for gates that route by token id.
        positions: [G,S] int32, position of each token in its text, given when generating: a rule that would draw, or
            count tokens of the batch, uses them so that no row depends on the others; None: not generating.
        segment_ids: [G,S] int32, document of each token within its row, from 1; 0: padding. A group may hold several
            rows. None: a layer that was called without them.
        expert_index: [G,S,K] int32, recorded experts whose weights are to be recomputed; None: the gate chooses.
        carry: what the MoE layer below handed on, or in the lowest one the gate's ``first_carry``: a pytree of
            [G,S,...] float32; None: no gate of the model hands anything on.
        prompt: what :meth:`Gate.of_prompt` returned, for tokens after a prompt; None: of others, and of other gates.
    """

    mask: Array
    rng: Array | None = None
    train: bool = False
    expert_capacity: int = 0
    noise_logits: Array | None = None
    selection_bias: Array | None = None
    state: Any = None
    token_ids: Array | None = None
    positions: Array | None = None
    segment_ids: Array | None = None
    expert_index: Array | None = None
    carry: Any = None
    prompt: Any = None


class GateOutput(NamedTuple):
    """Assignments of a gate, before padding and broken tokens are masked out.

    Attributes:
        expert_index: [G,S,K] int32, first choice first.
        weights: [G,S,K] float32.
        accepted: [G,S,K] bool, False where the gate does not send the assignment; None: all are sent.
        probs: [G,S,E] float32, probabilities for the balancing losses; None: softmax of the logits.
        smooth_load: [G,S,E] float32, differentiable probability of being chosen; None: not defined by the gate.
        needed_bias: [G,S,E] float32, selection bias above which the token goes to the expert; None: not needed.
        carry: what is handed on to the MoE layer above, of the same shapes as ``GateInputs.carry``; None: that.
        broken: [G,S] bool, tokens that must not be routed; None: none of them.
    """

    expert_index: Array
    weights: Array
    accepted: Array | None = None
    probs: Array | None = None
    smooth_load: Array | None = None
    needed_bias: Array | None = None
    carry: Any = None
    broken: Array | None = None
