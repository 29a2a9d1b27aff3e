"""One Transformer block."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe.config import ModelConfig
from moe.config.layer_kinds import LayerKind
from moe.layers.attention.attention import Attention
from moe.layers.attention.mla import LatentAttention
from moe.layers.ffn import DenseFFN
from moe.layers.moe_layer import MoELayer
from moe.layers.norms import RMSNorm
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.routing.balancing import LayerReport
from moe.routing.routing import Choices, Routing

#: An MoE layer's report and routing; None of a dense layer.
Record = tuple[LayerReport, Routing] | None


def attention_class(config: ModelConfig) -> type[Attention] | type[LatentAttention]:
    """Latent attention where ``model.kv_lora_rank`` is set, else grouped-query attention."""
    return LatentAttention if config.kv_lora_rank else Attention


class Block(nnx.Module):
    """x + attention(norm(x)), then x + FFN(norm(x)), the FFN dense or MoE."""

    def __init__(self, config: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = attention_class(config)(config, window=kind.window, rngs=rngs)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.sparse = kind.sparse
        if kind.sparse:
            self.moe = MoELayer(config, gate=kind.gate, rngs=rngs)
        else:
            self.dense = DenseFFN(config, config.d_ff, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        token_ids: Int[Array, "B T"],
        routing: Routing | Choices | None,
        train: bool,
        rng: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], Record]:
        """Apply both halves; :class:`moe.models.decoder.Transformer` describes the arguments."""
        x = x + self.attention(self.attention_norm(x), segment_ids, positions)
        return self.feed_forward(x, segment_ids, token_ids=token_ids, routing=routing, train=train, rng=rng)

    def feed_forward(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        *,
        token_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        routing: Routing | Choices | None = None,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], Record]:
        """The second half: x + FFN(norm(x)); ``positions`` are given when generating."""
        h = self.ffn_norm(x)
        if not self.sparse:
            return constrain(x + self.dense(h), partition_specs.BATCH), None
        y, report, routing = self.moe(
            h, segment_ids > 0, token_ids=token_ids, positions=positions, routing=routing, train=train, rng=rng
        )
        return constrain(x + y, partition_specs.BATCH), (report, routing)
