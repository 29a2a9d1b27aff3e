"""Saliency of experts: how much a trained model loses without each, estimated or measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe.analysis.record import Records
from moe.analysis.surgery import moe_layers
from moe.config import ModelConfig
from moe.dispatch.ffn import ffn
from moe.layers.moe_layer import MoELayer
from moe.models.block import Block
from moe.models.decoder import make_rows
from moe.models.stack import join_moe_layers, restack_layers, unstack_layers
from moe.training.batches import PREFIX_KEY, Batch, place
from moe.training.step import Program


def frequency(records: Records) -> np.ndarray:
    """Share of a layer's assignments that each expert has, [L,E]."""
    return _shares(records, records.chosen.astype(np.float64))


def weight(records: Records) -> np.ndarray:
    """Share of a layer's combine weights that each expert has, [L,E]."""
    return _shares(records, np.where(records.chosen, records.combine_weights, 0.0))


def _shares(records: Records, amounts: np.ndarray) -> np.ndarray:
    layers, size = len(records.layers), records.num_experts
    sums = np.zeros((layers, size))
    for layer in range(layers):
        np.add.at(sums[layer], records.expert_index[layer], amounts[layer])
    return sums / sums.sum(1, keepdims=True)


class Reap:
    """Mean, over the tokens that chose an expert, of its combine weight times the norm of its output, [L,E] (REAP:
    Lasby et al. 2025, arXiv 2510.13999, equation 9); 0 for an expert that no token chose."""

    def __init__(self, program: Program):
        """Prepare the model's program; compiled at the first call."""
        self._mesh = program.mesh
        self._layers = jax.jit(lambda variables, batch: _by_layer(program.model(variables), batch))

    def __call__(
        self, variables: dict[str, Any], batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
    ) -> np.ndarray:
        """The saliency on held-out batches of each domain."""
        sums: Any = 0.0
        for batch in (batch for of_domain in batches.values() for batch in of_domain):
            with jax.set_mesh(self._mesh):
                sums = sums + np.asarray(self._layers(variables, place(dict(batch), self._mesh)), np.float64)
        return sums[:, 0] / np.maximum(sums[:, 1], 1)


def _by_layer(model: Any, batch: Batch) -> Float[Array, "L 2 E"]:
    """Sum of weight × norm, and number of tokens, of each expert."""
    rows = make_rows(batch["tokens"], batch["segment_ids"], batch["positions"], prefix=batch.get(PREFIX_KEY))
    buckets = model.config.relative_buckets
    bias = model.relative_bias.by_distance(rows.token_ids.shape[1]) if buckets else None

    def body(block: Block, x: Array, state: Any, layer: Array) -> tuple[Array, Any]:
        del state, layer
        x = block.mix(x, rows, bias)
        h = block.input_of(block.ffn_norm, x)
        x, record = block.feed_forward(x, rows)
        if record is None:
            return x, None
        routing, norms = record[1], output_norms(block.moe, h.reshape(-1, h.shape[-1]))  # [E,n]
        index, amounts = (
            array.reshape(norms.shape[1], -1) for array in (routing.expert_index, routing.combine_weights)
        )
        chosen = routing.chosen.reshape(index.shape)
        mine = (index[..., None] == jnp.arange(len(norms))) & chosen[..., None]  # [n,K,E]
        weights = jnp.sum(jnp.where(mine, amounts[..., None], 0.0), axis=1)
        return x, jnp.stack([jnp.sum(weights * norms.T, axis=0), jnp.sum(mine, axis=(0, 1))])

    _, states = model.scan(body, model.embed(rows.token_ids))
    return join_moe_layers(states)


def output_norms(layer: MoELayer, x: Float[Array, "n D"]) -> Float[Array, "E n"]:
    """Euclidean norm of what each expert of a layer makes of each token, chosen or not."""
    rows = x if layer.latent is None else layer.latent.project_down(x)
    biases = layer.experts.down_bias

    def norm(expert: tuple[Any, Array]) -> Array:
        weights, number = expert
        y = ffn(rows, weights, layer.experts.activation, None, jnp.matmul)
        y = y if biases is None else y + biases[...][number]
        y = y if layer.latent is None else layer.latent.project_up(y, x.dtype)
        return jnp.linalg.norm(y.astype(jnp.float32), axis=-1)

    weights = layer.experts.weights.astype(x.dtype)
    return jax.lax.map(norm, (weights, jnp.arange(weights.up.shape[0])))


def ablation(model: ModelConfig, parameters: dict[str, Any], loss: Callable[[dict[str, Any]], float]) -> np.ndarray:
    """Rise of the loss where one expert returns zero, [L,E] nats: exact, by L·E evaluations.

    Args:
        model: of the parameters.
        parameters: of the whole model.
        loss: parameters → mean loss on held-out text.
    """
    flat, whole, rises = unstack_layers(model, parameters), loss(parameters), []
    for layer in moe_layers(model):
        of_layer = []
        for expert in range(model.moe.num_experts):
            changed = dict(flat)
            for name in ("down", "down_bias"):
                path = ("moe", "experts", name)
                if (layer, path) in flat:
                    array = np.array(flat[layer, path])
                    array[expert] = 0.0
                    changed[layer, path] = array
            of_layer.append(loss(restack_layers(model, parameters, changed)) - whole)
        rises.append(of_layer)
    return np.asarray(rises)


def most_salient(saliency: np.ndarray, count: int) -> np.ndarray:
    """The experts to keep, [L,count] in their order: those of the highest saliency [L,E]; of equals, the first."""
    order = np.argsort(-saliency, axis=1, kind="stable")
    return np.sort(order[:, :count], axis=1)
