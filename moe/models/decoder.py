"""The decoder-only Transformer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe.config import ModelConfig
from moe.config.model_section import check_is_model
from moe.layers.call import Call, Report
from moe.layers.embedding import Embedding, Unembedding, with_one
from moe.layers.inputs import Rows
from moe.models.prediction import PredictionLayer, predict
from moe.models.stack import Stack
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import stacked, times
from moe.routing.balancing import LayerReport
from moe.routing.routing import Choices, Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Result of one forward pass.

    Attributes:
        logits: in the compute dtype.
        hidden: final hidden states: logits = hidden @ ``output_matrix()``.
        report: of all layers, an encoder's before the decoder's.
        routing: a Routing whose arrays have the MoE layers as leading axis; None unless asked for. For an
            encoder-decoder a pair, since groups differ: the encoder's, then the decoder's, each None for a stack
            without MoE layers.
        encoder_hidden: output of the encoder.
    """

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "B T inputs"]
    report: Report
    routing: Routing | tuple[Routing | None, Routing | None] | None = None
    encoder_hidden: Float[Array, "B U D"] | None = None

    @property
    def layers(self) -> LayerReport | None:
        """A LayerReport whose arrays have the MoE layers as leading axis; None in a dense model."""
        return self.report.signals.get("layers")


class LanguageModel(nnx.Module):
    """Base of all models: the embedding, and logits from final hidden states."""

    config: ModelConfig
    embedding: Embedding
    unembedding: Unembedding | None

    def embed(self, token_ids: Int[Array, "B T"], embedding: Embedding | None = None) -> Float[Array, "B T D"]:
        """Token vectors in the compute dtype, from this embedding; None: the model's."""
        vectors = (embedding or self.embedding)(token_ids, jnp.dtype(self.config.dtype))
        return times(vectors, self.config.embedding_scale)

    def output_matrix(self) -> Float[Array, "inputs V"]:
        """The matrix from hidden states to logits, in the compute dtype."""
        dtype = jnp.dtype(self.config.dtype)
        return self.embedding.matrix(dtype).T if self.unembedding is None else self.unembedding.matrix(dtype)

    def scaled(self, x: Float[Array, "B T D"]) -> Float[Array, "B T inputs"]:
        """Final hidden states: a stack's output times the factor of the logits, such as T5's 1/sqrt(D), with a 1
        appended for the bias of the logits where there is one."""
        x = times(x, self.config.logit_scale * (self.config.d_model**-0.5 if self.config.scale_logits else 1.0))
        return with_one(x) if self.config.logit_bias else x

    def logits(self, hidden: Float[Array, "B T inputs"]) -> Float[Array, "B T V"]:
        """Logits of final hidden states; under jit they cost nothing for a caller that reads only the hidden states, as
        the train step does."""
        return constrain(hidden @ self.output_matrix(), partition_specs.LOGITS)


class Transformer(LanguageModel, Stack):
    """Embedding, L blocks, final norm, logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draw the parameters of all layers. Raises ConfigError for anything but a ModelConfig."""
        check_is_model(config)
        self.embedding = Embedding(config, rngs=rngs)
        Stack.__init__(self, config, rngs=rngs)
        self.unembedding = None if config.tie_embeddings else Unembedding(config, rngs=rngs)
        if config.prediction_layers:
            self.prediction = stacked(functools.partial(PredictionLayer, config), config.prediction_layers, rngs)

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
        prefix: Int[ArrayLike, "B T"] | None = None,
        signals: tuple[str, ...] = ("layers",),
    ) -> Output:
        """Compute the logits of the next token at every position.

        Args:
            segment_ids: the document of each token, 0 for padding; None: one document a row.
            positions: positions within the documents; None: 0…T−1.
            train: use training capacity factors and dropout.
            rng: key of the routing noise and dropout; None: deterministic.
            routing: the routing of every MoE layer, as returned by ``return_routing``, to use instead of the routers'
                own, or its ``choices``, whose weights the routers recompute, with a gradient. The groups of tokens must
                be the same; dispatch mode and mesh may differ.
            return_routing: also return the Routing of every MoE layer.
            prefix: 1 for tokens that all tokens of their document see (prefix LM); None: attention is causal.
            signals: names of what layers report (:class:`moe.layers.call.Call`).
        """
        rows = make_rows(token_ids, segment_ids, positions, prefix=None if prefix is None else jnp.asarray(prefix))
        call = Call(rows, train=train, rng=rng, signals=(*signals, "routing") if return_routing else signals)
        x, report = self.run(self.embed(rows.token_ids), call, routing)
        return self.output(x, report, call)

    def output(self, x: Float[Array, "B T D"], report: Report, call: Call) -> Output:
        """Build the result from what :meth:`run` returned."""
        hidden = self.scaled(x)
        if call.train and self.config.prediction_layers:
            further, of_layers = predict(self.prediction, self.config, self.embed, x, call)
            handed = {"prediction": tuple(map(self.scaled, further))}
            report = join_reports(report, of_layers).replace(handed=report.handed | handed)
        report, routing = without_routing(report)
        return Output(self.logits(hidden), hidden, report, routing)


def without_routing(report: Report) -> tuple[Report, Any]:
    """A report, and the routing that it has; None without one."""
    rest = {name: value for name, value in report.signals.items() if name != "routing"}
    return report.replace(signals=rest), report.signals.get("routing")


def join_reports(first: Report, second: Report) -> Report:
    """Reports of two stacks' layers, one after the other."""

    def read(field: str, name: str) -> Any:
        parts = [part[name] for part in (getattr(first, field), getattr(second, field)) if name in part]
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)

    return Report.by_entry(read, first.entries() | second.entries())


def make_rows(
    token_ids: Int[ArrayLike, "B T"],
    segment_ids: Int[ArrayLike, "B T"] | None,
    positions: Int[ArrayLike, "B T"] | None,
    **fields: Array | None,
) -> Rows:
    """Rows with the defaults filled in: one document a row, positions 0…T−1."""
    token_ids = jnp.asarray(token_ids)
    segment_ids = jnp.ones_like(token_ids) if segment_ids is None else jnp.asarray(segment_ids)
    columns = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    return Rows(token_ids, segment_ids, columns if positions is None else jnp.asarray(positions), **fields)
