"""Multi-token prediction: layers after the last one that predict the tokens after the next (DeepSeek-V3 2024, arXiv
2412.19437, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from moe.config import ModelConfig
from moe.config.layer_kinds import stacks
from moe.layers.inputs import Rows
from moe.layers.norms import RMSNorm
from moe.layers.parameter import matrix
from moe.models.block import Block, Record
from moe.parallel.parameters import gather_for_matmul
from moe.parallel.partition_specs import IN, REMAT_POLICIES
from moe.routing.balancing import LayerReport


class PredictionLayer(nnx.Module):
    """One depth: a block over a projection of the previous depth's hidden states and the embeddings of the tokens that
    they predicted (equations 21 and 22). The block is of the kind of the model's last layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d = config.d_model
        self.hidden_norm = RMSNorm.of(config)
        self.embedding_norm = RMSNorm.of(config)
        self.project = matrix(rngs, (2 * d, d), IN, fan_in=2 * d, scale=config.init_scale)
        self.block = Block(config, stacks(config)[""][-1], rngs=rngs)
        self.output_norm = RMSNorm.of(config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        rows: Rows,
        *,
        train: bool = False,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], Record]:
        """Hidden states of the next depth, before its norm.

        Args:
            x: hidden states of the previous depth; for the first depth, the model's final hidden states.
            embedded: embedding of the token that x predicted.
            rows: of the embedded tokens.
            train: see :meth:`moe.models.stack.Stack.run`.
            rng: key of this layer.
        """
        return self.block(self.join(x, embedded), rows, train=train, rng=rng)

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
    rows: Rows,
    *,
    train: bool,
    rng: PRNGKeyArray | None,
) -> tuple[tuple[Float[Array, "B T D"], ...], LayerReport | None]:
    """Normalised hidden states of every depth, and the reports of their MoE layers, stacked.

    Where the document ends before the token that a depth needs, the hidden states are of some other token; such
    positions have no target, and no earlier position sees them.

    Args:
        layers: stacked.
        embed: token ids → vectors.
        x: final hidden states of the model.
        train: see :meth:`moe.models.stack.Stack.run`.
        rng: key of the run's noise.
    """
    graphdef, stacked = nnx.split(layers)
    hidden, records = [], []
    for i in range(config.prediction_layers):
        own = Rows(shift(rows.token_ids, i + 1, 0), rows.segment_ids, rows.positions)
        key = None if rng is None else jax.random.fold_in(rng, config.num_layers + 1 + i)

        def step(variables, x, own=own, key=key):
            layer = nnx.merge(graphdef, variables)
            x, record = layer(x, embed(own.token_ids), own, train=train, rng=key)
            return x, layer.output_norm(x), record.report

        if config.remat != "none":
            step = jax.checkpoint(step, policy=REMAT_POLICIES[config.remat])
        x, normalised, report = step(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), x)
        hidden.append(normalised)
        records.append(report)
    reports = jax.tree.map(lambda *parts: jnp.stack(parts), *records)
    return tuple(hidden), reports
