"""What every MoE layer did with every token of held-out text, as plain NumPy arrays.

In: a :class:`moe.training.step.Program`, variables, and batches per domain (:class:`moe.training.evaluation.Heldout` has them, and
:mod:`moe.analysis.documents` makes them of whole documents). Out: :class:`Records`. ::

    recorder = Recorder(program)  # compiles once; any variables of that model
    records = recorder(variables, heldout.batches)
    records.first_choice  # [L,n]

Routing is the routers' own decision in evaluation: before drops, without noise. For one process.

Letters: L MoE layers, n real tokens (padding is left out), K choices, E experts; B batch, T sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe.config import ConfigError, sparse_layers
from moe.training.step import Batch, Program, place


@dataclasses.dataclass(frozen=True)
class Records:
    """Tokens by domain, and within a domain in reading order: batch by batch, row by row.

    Attributes:
        domains: names.
        layers: [L] numbers of the MoE layers in the model, from 0.
        num_experts: E.
        tokens: [n] int32, ids.
        domain: [n] int32, index into ``domains``.
        row: [n] int32, number of the row that a token is in; no two domains share one.
        segment_ids: [n] int32, document within the row, from 1.
        positions: [n] int32, within the segment.
        expert_index: [L,n,K] int32, first choice first. With a gate that lists every expert (K = E), ordered by
            router probability.
        combine_weights: [L,n,K] float32; 0 where not chosen.
        chosen: [L,n,K] bool, False for a choice that the gate declined (under expert choice, most are).
        router_probs: [L,n,E] float32.
        marks: any further [B,T] arrays of the batches, flattened alike to [n].
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
        """[L,n] int32, the first expert of every token."""
        return self.expert_index[..., 0]

    @property
    def consecutive(self) -> np.ndarray:
        """[P] int64: every i whose token i + 1 is the next one of the same document."""
        same = (self.row[1:] == self.row[:-1]) & (self.segment_ids[1:] == self.segment_ids[:-1])
        return np.flatnonzero(same)

    def select(self, tokens: np.ndarray) -> Records:
        """The same of some tokens only. tokens: [n] bool, or indices in order."""
        flat = {name: getattr(self, name)[tokens] for name in ("tokens", "domain", "row", "segment_ids", "positions")}
        layered = {
            name: getattr(self, name)[:, tokens]
            for name in ("expert_index", "combine_weights", "chosen", "router_probs")
        }
        marks = {name: mark[tokens] for name, mark in self.marks.items()}
        return dataclasses.replace(self, **flat, **layered, marks=marks)


class Recorder:
    """Records the routing of one model, whatever its variables; the forward pass is compiled at the first call."""

    def __init__(self, program: Program):
        """Refuses a model without routers.

        Raises:
            ConfigError: the model is dense.
        """
        model = program.config.model
        if model.moe.gate == "none":
            raise ConfigError("model.moe.gate='none': a dense model has no routing to analyse; use an MoE model")
        self.program = program

        def forward(variables: dict[str, Any], batch: Batch) -> tuple[Any, ...]:
            output = program.model(variables)(
                batch["tokens"], batch["segment_ids"], batch["positions"], return_routing=True
            )
            r = output.routing
            assert r is not None
            return r.expert_index, r.combine_weights, r.chosen, r.router_probs

        self._forward = jax.jit(forward)

    def __call__(self, variables: dict[str, Any], batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> Records:
        """Runs the model over all batches.

        Args:
            variables: as :func:`moe.checkpoints.parameters.read_variables` or ``TrainState.variables``.
            batches: domain → batches of [B,T] int32 arrays: tokens, segment_ids and positions; other [B,T] arrays
                become marks; targets, and what is not [B,T], are not kept.
        """
        model = self.program.config.model
        flat: dict[str, list[np.ndarray]] = {}
        layered: list[tuple[np.ndarray, ...]] = []
        first_row = 0
        for domain, of_domain in enumerate(batches.values()):
            for batch in of_domain:
                shape = batch["tokens"].shape
                with jax.set_mesh(self.program.mesh):
                    routed = self._forward(variables, place({"targets": batch["tokens"], **batch}, self.program.mesh))
                real = np.asarray(batch["segment_ids"]).reshape(-1) > 0
                # [L,G,S,...] → [L,B·T,...]: groups are runs of tokens in row order.
                layered.append(
                    tuple(np.asarray(x).reshape(x.shape[0], real.size, x.shape[-1])[:, real] for x in routed)
                )
                rows = first_row + np.arange(shape[0], dtype=np.int32)
                first_row += shape[0]
                kept = {name: x for name, x in batch.items() if x.shape == shape and name != "targets"}
                kept |= {"row": np.broadcast_to(rows[:, None], shape), "domain": np.full(shape, domain, np.int32)}
                for name, values in kept.items():
                    flat.setdefault(name, []).append(np.asarray(values).reshape(-1)[real])
        tokens = {name: np.concatenate(parts) for name, parts in flat.items()}
        index, weights, chosen, probs = (np.concatenate(parts, axis=1) for parts in zip(*layered, strict=True))
        if index.shape[-1] == model.moe.num_experts:
            preference = np.take_along_axis(probs, index, axis=-1)
            order = np.argsort(-preference, axis=-1, kind="stable")
            index, weights, chosen = (np.take_along_axis(x, order, axis=-1) for x in (index, weights, chosen))
        own = ("tokens", "domain", "row", "segment_ids", "positions")
        return Records(
            domains=tuple(batches),
            layers=tuple(layer for layer, sparse in enumerate(sparse_layers(model)) if sparse),
            num_experts=model.moe.num_experts,
            **{name: tokens.pop(name) for name in own},
            expert_index=index,
            combine_weights=weights,
            chosen=chosen,
            router_probs=probs,
            marks=tokens,
        )
