"""The encoder-decoder Transformer (T5, Switch, GShard, ST-MoE)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe.config import ConfigError, ModelConfig
from moe.config.model_section import check_is_model
from moe.layers.call import Call, Report
from moe.layers.embedding import Embedding, Unembedding
from moe.layers.inputs import Rows
from moe.models.decoder import LanguageModel, Output, join_reports, make_rows, without_routing
from moe.models.stack import Stack
from moe.routing.routing import Routing

#: Part of the names of the encoder's operations in a program.
ENCODER_SCOPE = "encoder"


class EncoderDecoder(LanguageModel):
    """A bidirectional encoder, and a causal decoder that attends to its output; one embedding, or one each."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draw the parameters of all layers.

        Raises:
            ConfigError: ``encoder_layers`` is 0, or the config is not a ModelConfig.
        """
        check_is_model(config)
        self.config = config
        if config.encoder_layers < 1:
            raise ConfigError("model.encoder_layers=0: must be at least 1 in an encoder-decoder")
        self.embedding = Embedding(config, rngs=rngs)
        self.encoder = Stack(config, "encoder", rngs=rngs)
        if config.encoder_vocab_size:
            source = dataclasses.replace(config, vocab_size=config.encoder_vocab_size)
            self.encoder.embedding = Embedding(source, rngs=rngs)
        self.decoder = Stack(config, "decoder", rngs=rngs)
        self.unembedding = None if config.tie_embeddings else Unembedding(config, rngs=rngs)

    def __call__(
        self,
        token_ids: Int[ArrayLike, "B T"],
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        positions: Int[ArrayLike, "B T"] | None = None,
        *,
        encoder_tokens: Int[ArrayLike, "B U"],
        encoder_segment_ids: Int[ArrayLike, "B U"] | None = None,
        encoder_positions: Int[ArrayLike, "B U"] | None = None,
        encoder_mask: Bool[ArrayLike, "B U"] | Int[ArrayLike, "B U"] | None = None,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
        routing: tuple[Routing | None, Routing | None] | None = None,
        return_routing: bool = False,
        signals: tuple[str, ...] = ("layers",),
    ) -> Output:
        """Compute the logits of the next target at every position of the decoder.

        Args:
            token_ids: the decoder's input: a start token, then the targets up to the last but one.
            segment_ids: the document of each token, 0 for padding; None: one document a row.
            positions: positions within the documents; None: 0…T−1.
            encoder_tokens: the encoder's input.
            encoder_segment_ids: its documents; the decoder's document i attends to the encoder's document i.
            encoder_positions: as ``positions``.
            encoder_mask: instead of encoder_segment_ids, where a row is one document: 1 for its tokens, 0 for padding.
            train: see :class:`moe.models.decoder.Transformer`, as ``rng``, ``return_routing`` and ``signals``.
            routing: of the encoder's and of the decoder's MoE layers, to replay.

        Raises:
            ValueError: both a mask and segment ids.
        """
        replayed = routing or (None, None)
        source = encoder_rows(encoder_tokens, encoder_segment_ids, encoder_positions, encoder_mask)
        call = Call(source, train=train, rng=rng, signals=(*signals, "routing") if return_routing else signals)
        encoded, report = self.encode(call, replayed[0])
        of_encoder, first = without_routing(report)
        rows = make_rows(token_ids, segment_ids, positions)
        rows = dataclasses.replace(rows, encoded=encoded, encoded_segment_ids=source.as_keys)
        x, report = self.decoder.run(self.embed(rows.token_ids), call.replace(rows=rows), replayed[1])
        of_decoder, second = without_routing(report)
        hidden, recorded = self.scaled(x), (first, second) if return_routing else None
        return Output(self.logits(hidden), hidden, join_reports(of_encoder, of_decoder), recorded, encoded)

    def encode(self, call: Call, routing: Routing | None = None) -> tuple[Float[Array, "B U D"], Report]:
        """Run the encoder; see :meth:`moe.models.stack.Stack.run`."""
        embedding = self.encoder.embedding if self.config.encoder_vocab_size else self.embedding
        with jax.named_scope(ENCODER_SCOPE):
            return self.encoder.run(self.embed(call.rows.token_ids, embedding), call, routing)


def encoder_rows(
    token_ids: Int[ArrayLike, "B U"],
    segment_ids: Int[ArrayLike, "B U"] | None = None,
    positions: Int[ArrayLike, "B U"] | None = None,
    mask: Bool[ArrayLike, "B U"] | Int[ArrayLike, "B U"] | None = None,
) -> Rows:
    """The encoder's input. Under a mask, padding sees the tokens of its row, and nothing sees it; its position is 0,
    since rotary positions may depend on a row's length."""
    if mask is None:
        return make_rows(token_ids, segment_ids, positions)
    if segment_ids is not None:
        raise ValueError("give encoder_segment_ids or encoder_mask, not both")
    real = jnp.asarray(mask).astype(jnp.int32)
    positions = jnp.arange(real.shape[1], dtype=jnp.int32) * real if positions is None else positions
    return make_rows(token_ids, None, positions, key_segment_ids=real)
