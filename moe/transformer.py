"""The decoder-only Transformer, its layers scanned.

In: tokens [B,T]. Out: logits [B,T,V] and, for every MoE layer, what its router did. Equal neighbouring blocks are
stored stacked and run as one ``jax.lax.scan``, so that a model of 32 layers compiles as fast as one of 4.

Letters: B batch, T sequence, D model dim, V vocab, L layers, G groups, S tokens per group, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe import sharding
from moe.balancing import LayerReport
from moe.config import ModelConfig
from moe.experts import MoELayer
from moe.layers import Attention, DenseFFN, Embedding, RMSNorm, Unembedding
from moe.routing import Routing

#: What the backward pass recomputes. "none": nothing; "dots": all but matmuls without a batch axis; "full": the layer.
REMAT_POLICIES: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Of one forward pass.

    Attributes:
        logits: [B,T,V] in the compute dtype.
        hidden: [B,T,D], what the logits are made of: hidden @ ``Transformer.output_matrix``.
        layers: a LayerReport whose arrays lead with the number of MoE layers, or None in a dense model.
        routing: a Routing whose arrays do likewise, or None unless asked for.
    """

    logits: Array
    hidden: Array
    layers: LayerReport | None
    routing: Routing | None


class LayerKind(NamedTuple):
    """What distinguishes one layer from another."""

    sparse: bool  # MoE
    window: int  # tokens a query sees, itself included; 0: all


class Block(nnx.Module):
    """x + attention(norm(x)), then x + FFN(norm(x)), the FFN dense or MoE."""

    def __init__(self, config: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, window=kind.window, rngs=rngs)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.sparse = kind.sparse
        if kind.sparse:
            self.moe = MoELayer(config, rngs=rngs)
        else:
            self.dense = DenseFFN(config, config.d_ff, rngs=rngs)

    def __call__(
        self,
        x: Array,
        segment_ids: Array,
        positions: Array,
        *,
        tokens: Array,
        routing: Routing | None,
        train: bool,
        rng: Array | None,
    ) -> tuple[Array, tuple[LayerReport, Routing] | None]:
        """[B,T,D] → [B,T,D]; see :class:`Transformer` for the arguments."""
        x = x + self.attention(self.attention_norm(x), segment_ids, positions)
        return self.feed_forward(x, segment_ids, tokens=tokens, routing=routing, train=train, rng=rng)

    def feed_forward(
        self, x: Array, segment_ids: Array, *, tokens: Array, routing: Routing | None, train: bool, rng: Array | None
    ) -> tuple[Array, tuple[LayerReport, Routing] | None]:
        """The second half: x + FFN(norm(x))."""
        h = self.ffn_norm(x)
        if not self.sparse:
            return sharding.constrain(x + self.dense(h), sharding.BATCH), None
        y, report, routing = self.moe(h, segment_ids > 0, token_ids=tokens, routing=routing, train=train, rng=rng)
        return sharding.constrain(x + y, sharding.BATCH), (report, routing)


def sparse_layers(config: ModelConfig) -> tuple[bool, ...]:
    """[L] which layers are MoE."""
    moe = config.moe
    if moe.gate != "none" and moe.layers:
        return tuple(layer in moe.layers for layer in range(config.num_layers))
    return tuple(
        moe.gate != "none" and layer >= moe.first_dense and (layer + 1) % moe.every == 0
        for layer in range(config.num_layers)
    )


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """[L] the kind of each layer."""
    windowed = config.sliding_window_layers or range(config.num_layers)
    return tuple(
        LayerKind(sparse, config.sliding_window if layer in windowed else 0)
        for layer, sparse in enumerate(sparse_layers(config))
    )


def segments(config: ModelConfig) -> list[tuple[tuple[LayerKind, ...], int]]:
    """The layers as (unit, repeats) runs: a unit is a pattern of blocks, repeated.

    Example: MoE in every second of 12 layers is [((dense, sparse), 6)]; all but the first of 4 is
    [((dense,), 1), ((sparse,), 3)].
    """
    layers = layer_kinds(config)
    runs: list[tuple[tuple[LayerKind, ...], int]] = []
    start = 0
    while start < len(layers):
        # The repeated unit that covers most layers from here; the shorter one where two cover the same.
        best_unit, best_repeats = layers[start : start + 1], 1
        for size in range(1, (len(layers) - start) // 2 + 1):
            unit = layers[start : start + size]
            repeats = 1
            while layers[start + size * repeats : start + size * (repeats + 1)] == unit:
                repeats += 1
            if repeats > 1 and size * repeats > len(best_unit) * best_repeats:
                best_unit, best_repeats = unit, repeats
        runs.append((best_unit, best_repeats))
        start += len(best_unit) * best_repeats
    return runs


def split_layers(config: ModelConfig, layers: Any) -> list[list[Any]]:
    """What belongs to each MoE layer, by segment and by MoE block of its unit, stacked over the repeats.

    Args:
        config: of the model.
        layers: a tree whose arrays lead with the number of MoE layers, in layer order; or None.
    """
    result, start = [], 0
    for unit, repeats in segments(config):
        sparse = sum(kind.sparse for kind in unit)
        # [L,...] → [R·unit,...], of which every unit-th: [R,...]
        stop = start + sparse * repeats
        result.append(
            [jax.tree.map(operator.itemgetter(slice(start + i, stop, sparse)), layers) for i in range(sparse)]
        )
        start = stop
    return result


def selection_biases(config: ModelConfig, layers: Array) -> dict[str, Any]:
    """The nested dict in which a model keeps one [E] of every MoE layer as its router's bias. layers: [L,E]."""
    biases: dict[str, Any] = {}
    for i, blocks in enumerate(split_layers(config, layers)):
        stacked = iter(blocks)
        for j, kind in enumerate(segments(config)[i][0]):
            if kind.sparse:
                biases.setdefault(f"segment_{i}", {})[f"block_{j}"] = {"moe": {"router": {"bias": next(stacked)}}}
    return biases


class Segment(nnx.Module):
    """Blocks of one unit, each with parameters stacked over the repeats (:func:`segments`)."""

    def __init__(self, config: ModelConfig, unit: tuple[LayerKind, ...], *, rngs: nnx.Rngs):
        self.size = len(unit)
        for i, kind in enumerate(unit):
            setattr(self, f"block_{i}", Block(config, kind, rngs=rngs))

    @staticmethod
    def stacked(config: ModelConfig, unit: tuple[LayerKind, ...], repeats: int, *, rngs: nnx.Rngs) -> Segment:
        """Every repeat drawn from its own key, then stacked along a new leading axis."""

        @nnx.vmap
        def create(key: Array) -> Segment:
            return Segment(config, unit, rngs=nnx.Rngs(params=key))

        return create(jax.random.split(rngs.params(), repeats))

    def blocks(self) -> list[Block]:
        """The blocks of the unit, in order."""
        return [getattr(self, f"block_{i}") for i in range(self.size)]


class Transformer(nnx.Module):
    """Embedding, L blocks, final norm, logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        for i, (unit, repeats) in enumerate(segments(config)):
            setattr(self, f"segment_{i}", Segment.stacked(config, unit, repeats, rngs=rngs))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = None if config.tie_embeddings else Unembedding(config, rngs=rngs)

    def __call__(
        self,
        tokens: Array,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        *,
        train: bool = False,
        rng: Array | None = None,
        routing: Routing | None = None,
        return_routing: bool = False,
    ) -> Output:
        """Logits of the next token at every position.

        Args:
            tokens: [B,T] int32.
            segment_ids: [B,T] int32, the document of each token, 0 for padding; None: one document a row.
            positions: [B,T] int32, positions within the documents; None: 0…T−1.
            train: picks training capacity factors.
            rng: key of the routing noise; None: deterministic.
            routing: of every MoE layer, as ``return_routing`` gave it, to use instead of the routers' own; it must be
                for tokens in the same groups, under whatever dispatch mode and mesh.
            return_routing: also return the Routing of every MoE layer.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x = self.embedding(tokens, jnp.dtype(self.config.dtype))
        records: list[tuple[LayerReport, Routing]] = []
        first = 0
        for i, replayed in enumerate(split_layers(self.config, routing)):
            segment, repeats = getattr(self, f"segment_{i}"), segments(self.config)[i][1]
            run = functools.partial(
                Block.__call__, segment_ids=segment_ids, positions=positions, tokens=tokens, train=train
            )
            x, segment_records = self._scan(segment, run, x, replayed, rng, first, repeats, return_routing)
            records += segment_records
            first += segment.size * repeats
        x = self.final_norm(x)
        # A caller that reads only `hidden` under jit, as the train step does, never pays for these.
        logits = sharding.constrain(x @ self.output_matrix(), sharding.LOGITS)
        if not records:
            return Output(logits, x, None, None)
        layers, recorded = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *records)
        return Output(logits, x, layers, recorded)

    def output_matrix(self) -> Array:
        """[D,V] in the compute dtype: from hidden states to logits."""
        dtype = jnp.dtype(self.config.dtype)
        return self.embedding.matrix(dtype).T if self.unembedding is None else self.unembedding.matrix(dtype)

    def _scan(self, segment, run, x, replayed, rng, first, repeats, return_routing):
        """Scans one segment; its records lead with its number of MoE layers, in layer order."""
        graphdef, stacked = nnx.split(segment)

        def repeat(x: Array, inputs: tuple[Any, Array, Any]) -> tuple[Array, Any]:
            variables, index, replayed = inputs
            records = []
            for i, block in enumerate(nnx.merge(graphdef, variables).blocks()):
                key = None if rng is None else jax.random.fold_in(rng, first + index * segment.size + i)
                x, record = run(block, x, routing=replayed[len(records)] if block.sparse else None, rng=key)
                if record is not None:
                    records.append(record if return_routing else (record[0], None))
            return x, records

        if self.config.remat != "none":
            repeat = jax.checkpoint(repeat, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        x, records = jax.lax.scan(
            repeat, x, (stacked, jnp.arange(repeats), replayed), unroll=1 if self.config.scan_layers else repeats
        )
        if not records:
            return x, []
        # unit of [R,...] each → [R,unit,...] → [R·unit,...]: layer order
        return x, [jax.tree.map(lambda *a: jnp.stack(a, 1).reshape(-1, *a[0].shape[1:]), *records)]
