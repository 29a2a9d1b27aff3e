"""Multi-token prediction: layers after the last one that predict the tokens after the next (DeepSeek-V3 2024, arXiv
2412.19437, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.config.layer_kinds import stacks
from moe.layers.call import Call, Report
from moe.layers.inputs import Dropout, Rows
from moe.layers.norms import RMSNorm
from moe.layers.parameter import matrix
from moe.layers.residuals.table import residual_kind
from moe.models.block import Block
from moe.parallel.parameters import gather_for_matmul
from moe.parallel.partition_specs import IN, REMAT_POLICIES


class PredictionLayer(nnx.Module):
    """One depth: a block over a projection of the previous depth's hidden states and the embeddings of the tokens that
    they predicted (equations 21 and 22). The block is of the kind of the model's last layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d = config.d_model
        self.hidden_norm = RMSNorm.of(config)
        self.embedding_norm = RMSNorm.of(config)
        self.project = matrix(rngs, (2 * d, d), IN, fan_in=2 * d, scale=config.init_scale)
        kind = stacks(config)[""][-1]
        self.block = Block(config, kind, rngs=rngs)
        self.residual = residual_kind(config).stream(config, (kind,), rngs=rngs)
        self.output_norm = RMSNorm.of(config)

    def apply(self, x: Float[Array, "B T D"], call: Call) -> tuple[Float[Array, "B T D"], Report]:
        """The block alone: hidden states of the depth, before its norm, of :meth:`join`'s output."""
        stream, report = self.block(self.residual.first(x), call)
        return self.residual.last(stream), report

    def join(self, x: Float[Array, "B T D"], embedded: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Input of the block (equation 21; the published weights have the embedding first)."""
        joined = jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(x)], axis=-1)
        return joined @ gather_for_matmul(self.project, x.dtype)


def shift(values: Array, by: int, fill: int) -> Array:
    """``values[:, i + by]`` at i; [B,T]."""
    return jnp.pad(values, ((0, 0), (0, by)), constant_values=fill)[:, by:]


def further_targets(targets: Array, segment_ids: Array, depth: int) -> Array:
    """Targets of a depth [B,T]: those of ``depth`` tokens later in the same document, -1 where there are none."""
    same = shift(segment_ids, depth, 0) == segment_ids
    return jnp.where(same & (segment_ids > 0), shift(targets, depth, -1), -1)


def predict(
    layers: PredictionLayer,
    config: ModelConfig,
    embed: Callable[[Array], Array],
    x: Float[Array, "B T D"],
    call: Call,
) -> tuple[tuple[Float[Array, "B T D"], ...], Report]:
    """Normalised hidden states of every depth, and the reports of their layers, stacked.

    Where the document ends before the token that a depth needs, the hidden states are of some other token; such
    positions have no target, and no earlier position sees them.

    Args:
        layers: stacked.
        embed: token ids → vectors.
        x: final hidden states of the model.
        call: of the run.
    """
    graphdef, stacked = nnx.split(layers)
    rows, hidden, reports = call.rows, [], []
    for i in range(config.prediction_layers):
        own = Rows(shift(rows.token_ids, i + 1, 0), rows.segment_ids, rows.positions)
        key = None if call.rng is None else jax.random.fold_in(call.rng, config.num_layers + 1 + i)
        of_layer = Call(own, call.train, key, Dropout(config.dropout, key if call.train else None), call.signals)

        def step(variables, x, of_layer=of_layer):
            layer = nnx.merge(graphdef, variables)
            x, report = layer.apply(layer.join(x, embed(of_layer.rows.token_ids)), of_layer)
            return x, layer.output_norm(x), report

        if config.remat != "none":
            step = jax.checkpoint(step, policy=REMAT_POLICIES[config.remat])
        x, normalised, report = step(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), x)
        hidden.append(normalised)
        reports.append(report.replace(handed={}))
    return tuple(hidden), jax.tree.map(lambda *parts: jnp.stack(parts), *reports)
