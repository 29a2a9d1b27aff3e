"""Attention from the decoder to the encoder's output."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.config.mixers import GroupedQuery
from moe.layers.call import Call, Report
from moe.layers.inputs import Site
from moe.layers.mixers.attention import Attention
from moe.layers.norms import RMSNorm

#: Name of the state in generation: key and value [B,U,M,H] of the encoder's output.
STATE = "cross"


class CrossAttention(nnx.Module):
    """Attention from the decoder to the encoder's output, and its norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.norm = RMSNorm.of(config)
        self.attention = Attention(config, GroupedQuery.of(config, causal=False), rngs=rngs)

    def run(self, x: Float[Array, "B T D"], call: Call) -> tuple[Float[Array, "B T D"], Report]:
        """Output for x, from the encoder's output or from keys and values of it that are kept."""
        rows = call.rows
        x = self.norm(x)
        if STATE in call.state:
            mask = rows.encoded_segment_ids
            assert mask is not None
            seen = jnp.broadcast_to(mask[:, None, None] > 0, (len(x), 1, x.shape[1], mask.shape[1]))
            key, value = call.state[STATE]
            heads = self.attention.attend_cached(self.attention.project_query(x, None), key, value, seen)
        else:
            assert rows.encoded is not None
            assert rows.encoded_segment_ids is not None
            documents = rows.segment_ids, rows.encoded_segment_ids
            heads = self.attention.attend_to(x, rows.encoded, *documents, call.drop.at(Site.CROSS_WEIGHTS))
        return call.drop.at(Site.CROSS_OUTPUT)(self.attention.join(heads, x)), Report()
