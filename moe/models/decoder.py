"""The decoder-only Transformer, its layers scanned.

In: tokens [B,T]. Out: logits [B,T,V] and, for every MoE layer, what its router did. Equal neighbouring blocks are
stored stacked and run as one ``jax.lax.scan``, so that a model of 32 layers compiles as fast as one of 4.

Letters: B batch, T sequence, D model dim, V vocab, L layers, G groups, S tokens per group, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe.config import ModelConfig
from moe.layers.embedding import Embedding, Unembedding
from moe.layers.norms import RMSNorm
from moe.models.block import Block
from moe.models.stack import REMAT_POLICIES, Segment, segments, split_layers
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.routing.balancing import LayerReport
from moe.routing.routing import Routing


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
        logits = constrain(x @ self.output_matrix(), partition_specs.LOGITS)
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
