"""Saliency of experts: what removing each costs a trained model, estimated or measured; and their mean outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moe.analysis.record import Records
from moe.analysis.surgery import moe_layers
from moe.config import ModelConfig
from moe.dispatch.ffn import ffn
from moe.layers.call import Call
from moe.layers.moe_layer import MoELayer
from moe.models.decoder import make_rows
from moe.models.segments import join_layers, restack_layers, unstack_layers
from moe.models.stack import Flow
from moe.routing.newer_gates import DocumentPools
from moe.system.fields import require
from moe.training.batches import PREFIX_KEY, Batch, forward, place
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
    totals = sums.sum(1, keepdims=True)
    return sums / np.where(totals > 0, totals, 1)  # 0 in a layer that no token uses


def _totals(
    sums: Callable[[dict[str, Any], Batch], Any],
    mesh: Mesh,
    variables: dict[str, Any],
    batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
) -> Any:
    """Sums of a program's results, a pytree, over the batches of each domain, in float64."""
    total: Any = None
    for batch in itertools.chain.from_iterable(batches.values()):
        with jax.set_mesh(mesh):
            found = sums(variables, place(dict(batch), mesh))
        found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)
        total = found if total is None else jax.tree.map(np.add, total, found)
    return total


#: (layer, its input [n,D], combine weights [n,E] and choices [n,E] of the tokens) → sum over tokens for each expert.
_Sum = Callable[[MoELayer, Array, Array, Array], Array]


class _TokenMean:
    """Mean of a quantity over the tokens that chose an expert, [L,E,...]; 0 for an expert that no token chose."""

    _sum: _Sum

    def __init__(self, program: Program):
        """Prepare the model's program; compiled at the first call. Raises a ConfigError where only the experts' sum has
        an output."""
        require(
            not program.config.model.moe.latent_norm,
            "model.moe.latent_norm",
            True,
            "must be False to measure outputs of single experts, since the norm is of their sum",
        )
        self._mesh = program.mesh
        self._layers = jax.jit(lambda variables, batch: _by_layer(program.model(variables), batch, self._sum))

    def __call__(
        self, variables: dict[str, Any], batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
    ) -> np.ndarray:
        """The mean on held-out batches of each domain."""
        sums, tokens = _totals(self._layers, self._mesh, variables, batches)
        return sums / np.maximum(tokens, 1).reshape(*tokens.shape, *[1] * (sums.ndim - tokens.ndim))


class Reap(_TokenMean):
    """Combine weight times norm of the output, [L,E] (REAP, Lasby et al. 2025, arXiv 2510.13999, equation 9)."""

    @staticmethod
    def _sum(layer: MoELayer, x: Array, weights: Array, mine: Array) -> Array:
        del mine  # the weights of other tokens are 0
        return for_each_expert(layer, x, lambda y, e: jnp.sum(weights[:, e] * jnp.linalg.norm(y, axis=-1)))


class OutputMoments(_TokenMean):
    """The output, with its squared norm appended, [L,E,D+1]."""

    @staticmethod
    def _sum(layer: MoELayer, x: Array, weights: Array, mine: Array) -> Array:
        del weights

        def one(y: Array, e: Array) -> Array:
            squares = jnp.sum(y**2, axis=-1, keepdims=True)
            return mine[:, e].astype(y.dtype) @ jnp.concatenate([y, squares], axis=-1)

        return for_each_expert(layer, x, one)


class PoolSums:
    """Sum over the tokens of the softmax over all experts, [L,E]: the pool of a document has the experts with the
    largest (EMO 2026, arXiv 2605.06663)."""

    def __init__(self, program: Program):
        """Prepare the model's program; compiled at the first call. Raises a ConfigError for a gate without pools."""
        gate = program.config.model.moe.gate
        allowed = "must be emo, whose documents have pools, with --by=pool"
        require(isinstance(gate, DocumentPools), "model.moe.gate", program.config.model.moe.gate_name, allowed)
        self._mesh = program.mesh

        def sums(variables: dict[str, Any], batch: Batch) -> Array:
            routing: Any = forward(program.model(variables), batch, return_routing=True).routing
            real = (batch["segment_ids"] > 0).reshape(routing.router_logits.shape[1:3])
            probs = jax.nn.softmax(routing.router_logits, axis=-1)
            return jnp.sum(jnp.where(real[..., None], probs, 0.0), axis=(1, 2))  # [L,G,S,E] → [L,E]

        self._sums = jax.jit(sums)

    def __call__(
        self, variables: dict[str, Any], batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
    ) -> np.ndarray:
        """The sums over batches of each domain."""
        return _totals(self._sums, self._mesh, variables, batches)


def mean_output(moments: np.ndarray) -> np.ndarray:
    """Mean output of each expert, [L,E,D]: the vector of its novice (MoNE 2025, arXiv 2507.00390)."""
    return moments[..., :-1]


def deviation(moments: np.ndarray) -> np.ndarray:
    """Root of the mean squared distance of an expert's output from its mean, [L,E]."""
    return np.sqrt(np.maximum(moments[..., -1] - (mean_output(moments) ** 2).sum(-1), 0.0))


def _by_layer(model: Any, batch: Batch, sum_of: _Sum) -> tuple[Float[Array, "L E ..."], Float[Array, "L E"]]:
    """The sum, and the number of tokens, of each expert."""
    rows = make_rows(batch["tokens"], batch["segment_ids"], batch["positions"], prefix=batch.get(PREFIX_KEY))
    call = Call(model.with_bias(rows), signals=("routing", "input"))

    def body(block: Any, flow: Flow, state: Any, layer: Array) -> tuple[Flow, Any]:
        del state
        flow, report = model.apply(block, flow, call, layer)
        if "routing" not in report.signals:
            return flow, None
        routing, h = report.signals["routing"], report.signals["input"]
        h = h.reshape(-1, h.shape[-1])  # [n,D]
        index, amounts, chosen = (
            array.reshape(len(h), -1) for array in (routing.expert_index, routing.combine_weights, routing.chosen)
        )
        mine = (index[..., None] == jnp.arange(block.moe.config.num_experts)) & chosen[..., None]  # [n,K,E]
        weights = jnp.sum(jnp.where(mine, amounts[..., None], 0.0), axis=1)
        return flow, (sum_of(block.moe, h, weights, jnp.any(mine, axis=1)), jnp.sum(mine, axis=(0, 1)))

    _, states = model.scan(body, model.begin(model.embed(rows.token_ids)))
    return join_layers(states)


def for_each_expert(layer: MoELayer, x: Float[Array, "n D"], measure: Callable[[Array, Array], Array]) -> Array:
    """``measure(y, e)`` for each expert e of a layer, with y [n,D] its float32 outputs for all tokens, chosen or not.

    Experts run one after another, so that memory holds the outputs of only one.
    """
    rows = x if layer.latent is None else layer.latent.project_down(x)
    biases = layer.experts.down_bias

    def one(expert: tuple[Any, Array]) -> Array:
        weights, number = expert
        y = ffn(rows, weights, jnp.matmul)
        y = y if biases is None else y + biases[...][number]
        y = y if layer.latent is None else layer.latent.project_up(y, x.dtype)
        return measure(y.astype(jnp.float32), number)

    weights = layer.experts.weights.astype(x.dtype)
    return jax.lax.map(one, (weights, jnp.arange(weights.up.shape[0])))


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


def most_salient(saliency: np.ndarray, count: int, groups: int = 1) -> np.ndarray:
    """The experts to keep, [L,count] in ascending order: those of the highest saliency [L,E], equally many from each of
    the gate's groups; the lower index first among equals."""
    layers, size = saliency.shape
    order = np.argsort(-saliency.reshape(layers, groups, -1), axis=-1, kind="stable")[..., : count // groups]
    first = size // groups * np.arange(groups)[:, None]
    return np.sort((order + first).reshape(layers, -1), axis=1)
