"""Routing of every token of held-out text in every MoE layer, as NumPy arrays::

    recorder = Recorder(program)  # compiles once, for any variables of the model
    records = recorder(variables, heldout.batches)
    records.first_choice  # [L,n]

The routing is the routers' decision in evaluation: without noise, before drops. Single process only. For an
encoder-decoder, a recorder records one stack, whose tokens are the encoder's input or the decoder's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe.config import ConfigError, stacks
from moe.training.batches import Batch, forward, place
from moe.training.step import Program


@dataclasses.dataclass(frozen=True)
class Records:
    """Routing of n real tokens (no padding), by domain and in reading order within a domain.

    Attributes:
        domains: names of the domains.
        layers: [L] indices of the MoE layers in the model, from 0; a decoder's come after those of its encoder.
        num_experts: E, including experts without an FFN.
        tokens: [n] int32 token ids.
        domain: [n] int32, index into ``domains``.
        row: [n] int32, number of the token's row, unique over domains.
        segment_ids: [n] int32, document within the row, from 1.
        positions: [n] int32, position within the segment.
        expert_index: [L,n,K] int32, first choice first; ordered by router probability if the gate lists every expert
            (K = E).
        combine_weights: [L,n,K] float32; 0 where not chosen.
        chosen: [L,n,K] bool, False for an assignment that the gate declined (under expert choice, most are).
        router_probs: [L,n,E] float32.
        marks: further [B,T] arrays of the batches, flattened to [n].
    """

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    num_experts: int
    tokens: np.ndarray
    domain: np.ndarray
    row: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    expert_index: np.ndarray
    combine_weights: np.ndarray
    chosen: np.ndarray
    router_probs: np.ndarray
    marks: dict[str, np.ndarray]

    @property
    def first_choice(self) -> np.ndarray:
        """First expert of every token, [L,n] int32."""
        return self.expert_index[..., 0]

    @property
    def consecutive(self) -> np.ndarray:
        """Indices i whose token i + 1 is the next token of the same document, int64."""
        same = (self.row[1:] == self.row[:-1]) & (self.segment_ids[1:] == self.segment_ids[:-1])
        return np.flatnonzero(same)

    def select(self, tokens: np.ndarray) -> Records:
        """Restricts the records to some tokens: [n] bool, or sorted indices."""
        flat = {name: getattr(self, name)[tokens] for name in ("tokens", "domain", "row", "segment_ids", "positions")}
        layered = {
            name: getattr(self, name)[:, tokens]
            for name in ("expert_index", "combine_weights", "chosen", "router_probs")
        }
        marks = {name: mark[tokens] for name, mark in self.marks.items()}
        return dataclasses.replace(self, **flat, **layered, marks=marks)


#: Name of an array of a decoder's batch → name of the encoder's.
_ENCODER = {name: f"encoder_{name}" for name in ("tokens", "segment_ids", "positions")}


class Recorder:
    """Records the routing of one model for any variables; the forward pass is compiled at the first call."""

    def __init__(self, program: Program, stack: str = ""):
        """Build the recorder.

        Args:
            program: program of the model.
            stack: "encoder" or "decoder" of an encoder-decoder, else "".

        Raises:
            ConfigError: the model, or the stack, has no MoE layers.
        """
        model = program.config.model
        if model.moe.gate is None:
            raise ConfigError("model.moe.gate='none': a dense model has no routing to analyse; use an MoE model")
        self.program, self.stack = program, stack
        first = model.encoder_layers if stack == "decoder" else 0
        self._layers = tuple(layer for layer, kind in enumerate(stacks(model)[stack], first) if kind.sparse)
        if not self._layers:
            raise ConfigError(f"model.moe.layers={model.moe.layers}: the {stack} has no MoE layers to analyse")

        def routed(variables: dict[str, Any], batch: Batch) -> tuple[Any, ...]:
            routing: Any = forward(program.model(variables), batch, return_routing=True).routing
            r = routing[("encoder", "decoder").index(stack)] if stack else routing
            return r.expert_index, r.combine_weights, r.chosen, r.router_probs, r.router_logits

        self._forward = jax.jit(routed)

    def __call__(self, variables: dict[str, Any], batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> Records:
        """Run the model over all batches.

        Args:
            variables: from :func:`moe.checkpoints.parameters.read_variables` or ``TrainState.variables``.
            batches: domain → batches of [B,T] int32 arrays: tokens, segment_ids and positions, and those of the encoder
                of an encoder-decoder. Other arrays of the shape of the stack's tokens become marks, except targets.
        """
        flat: dict[str, list[np.ndarray]] = {}
        layered: list[tuple[np.ndarray, ...]] = []
        first_row = 0
        for domain, of_domain in enumerate(batches.values()):
            for batch in of_domain:
                names = _ENCODER if self.stack == "encoder" else {name: name for name in _ENCODER}
                shape = batch[names["tokens"]].shape
                with jax.set_mesh(self.program.mesh):
                    routed = self._forward(variables, place({"targets": batch["tokens"], **batch}, self.program.mesh))
                real = np.asarray(batch[names["segment_ids"]]).reshape(-1) > 0
                # [L,G,S,...] → [L,B·T,...]: groups are consecutive tokens in row order.
                layered.append(
                    tuple(np.asarray(x).reshape(x.shape[0], real.size, x.shape[-1])[:, real] for x in routed)
                )
                rows = first_row + np.arange(shape[0], dtype=np.int32)
                first_row += shape[0]
                skipped = {"targets", *_ENCODER, *_ENCODER.values()}
                kept = {name: x for name, x in batch.items() if x.shape == shape and name not in skipped}
                kept |= {name: batch[key] for name, key in names.items()}
                kept |= {"row": np.broadcast_to(rows[:, None], shape), "domain": np.full(shape, domain, np.int32)}
                for name, values in kept.items():
                    flat.setdefault(name, []).append(np.asarray(values).reshape(-1)[real])
        tokens = {name: np.concatenate(parts) for name, parts in flat.items()}
        index, weights, chosen, probs, logits = (np.concatenate(parts, axis=1) for parts in zip(*layered, strict=True))
        if index.shape[-1] == probs.shape[-1]:
            # ReMoE's probabilities are 0 for every expert without a positive logit.
            preference, logit = (np.take_along_axis(x, index, axis=-1) for x in (probs, logits))
            order = np.lexsort((-logit, -preference), axis=-1)
            index, weights, chosen = (np.take_along_axis(x, order, axis=-1) for x in (index, weights, chosen))
        own = ("tokens", "domain", "row", "segment_ids", "positions")
        return Records(
            domains=tuple(batches),
            layers=self._layers,
            num_experts=probs.shape[-1],
            **{name: tokens.pop(name) for name in own},
            expert_index=index,
            combine_weights=weights,
            chosen=chosen,
            router_probs=probs,
            marks=tokens,
        )
