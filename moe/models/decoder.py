"""The decoder-only Transformer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe.config import ModelConfig
from moe.layers.embedding import Embedding, Unembedding
from moe.layers.norms import RMSNorm
from moe.models.block import Block
from moe.models.stack import Stack, join_moe_layers, split_moe_layers
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.routing.balancing import LayerReport
from moe.routing.routing import Choices, Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Result of one forward pass.

    Attributes:
        logits: in the compute dtype.
        hidden: final hidden states: logits = hidden @ ``Transformer.output_matrix()``.
        layers: a LayerReport whose arrays lead with the number of MoE layers; None in a dense model.
        routing: a Routing whose arrays do likewise; None unless asked for.
    """

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "B T D"]
    layers: LayerReport | None
    routing: Routing | None


class Transformer(Stack):
    """Embedding, L blocks, final norm, logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = Embedding(config, rngs=rngs)
        super().__init__(config, rngs=rngs)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembedding = None if config.tie_embeddings else Unembedding(config, rngs=rngs)

    def __call__(
        self,
        token_ids: Int[ArrayLike, "B T"],
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        positions: Int[ArrayLike, "B T"] | None = None,
        *,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
        routing: Routing | Choices | None = None,
        return_routing: bool = False,
    ) -> Output:
        """Compute the logits of the next token at every position.

        Args:
            token_ids: the input.
            segment_ids: the document of each token, 0 for padding; None: one document a row.
            positions: positions within the documents; None: 0…T−1.
            train: use training capacity factors and expert dropout.
            rng: key of the routing noise; None: deterministic.
            routing: the routing of every MoE layer, as ``return_routing`` gave it, to use instead of the routers' own,
                or its ``choices``, which the routers weigh anew, with a gradient; it must be for tokens in the same
                groups, under whatever dispatch mode and mesh.
            return_routing: also return the Routing of every MoE layer.
        """
        token_ids = jnp.asarray(token_ids)
        segment_ids = jnp.ones_like(token_ids) if segment_ids is None else jnp.asarray(segment_ids)
        columns = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
        positions = columns if positions is None else jnp.asarray(positions)

        def body(block: Block, x: Array, replayed: Routing | Choices | None, layer: Array) -> tuple[Array, Any]:
            key = None if rng is None else jax.random.fold_in(rng, layer)
            x, record = block(x, segment_ids, positions, token_ids=token_ids, routing=replayed, train=train, rng=key)
            return x, record if record is None or return_routing else (record[0], None)

        x, records = self.scan(
            body,
            self.embedding(token_ids, jnp.dtype(self.config.dtype)),
            split_moe_layers(self.config, routing),
            remat=self.config.remat,
            unroll=not self.config.scan_layers,
        )
        x = self.final_norm(x)
        # A caller that reads only `hidden` under jit, as the train step does, never pays for these.
        logits = constrain(x @ self.output_matrix(), partition_specs.LOGITS)
        layers, recorded = join_moe_layers(records) or (None, None)
        return Output(logits, x, layers, recorded)

    def output_matrix(self) -> Float[Array, "D V"]:
        """The matrix from hidden states to logits, in the compute dtype."""
        dtype = jnp.dtype(self.config.dtype)
        return self.embedding.matrix(dtype).T if self.unembedding is None else self.unembedding.matrix(dtype)
