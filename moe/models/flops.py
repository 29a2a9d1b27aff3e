"""Parameter counts and training FLOPs of a model, the numerator of MFU.

FLOPs follow PaLM (2022, appendix B): 6 per active matmul parameter, plus attention scores, forward and backward
together; recomputation does not count.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe.config import ModelConfig, layer_kinds, sparse_layers
from moe.dispatch.plan import expert_capacity
from moe.models.decoder import Transformer
from moe.routing.registry import find_gate
from moe.routing.router import SelectionBias


def abstract_parameters(config: ModelConfig) -> dict[str, Any]:
    """ShapeDtypeStructs of all parameters, as a nested dict; nothing is allocated."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def abstract_selection_biases(config: ModelConfig) -> dict[str, Any]:
    """ShapeDtypeStructs of the routers' selection biases, as a nested dict; empty for gates without them."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, SelectionBias))


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active): active leaves out the experts that a token does not visit; both count all embeddings, and
    selection biases, as the published counts do."""
    others, experts = _count(config)
    return others + experts, others + experts * config.moe.experts_per_token // config.moe.num_experts


@functools.cache
def _count(config: ModelConfig) -> tuple[int, int]:
    """Parameters outside the experts, and of all experts of all layers."""
    others = experts = 0
    trees = (abstract_parameters(config), abstract_selection_biases(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        size = int(np.prod(leaf.shape))
        if any(getattr(key, "key", None) == "experts" for key in path):
            experts += size
        else:
            others += size
    return others, experts


def expert_rows_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Rows that the experts of one layer compute for each token: K, or what the slots or capacity of a group make
    where tokens do not choose."""
    moe = config.moe
    gate, group_size = find_gate(moe.gate), moe.group_size or sequence_length
    if gate.router == "slots":
        return moe.num_experts * moe.slots_per_expert / group_size
    if gate.experts_choose:
        capacity = expert_capacity(moe.capacity_factor, moe.experts_per_token, group_size, moe.num_experts)
        return moe.num_experts * capacity / group_size
    return moe.experts_per_token


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of forward and backward, per token.

    6 × active parameters, without the embedding table unless it is tied to the logits, since a look-up multiplies
    nothing; an expert's parameters count once for each row it computes (:func:`expert_rows_per_token`). Plus, in each
    layer, 2 matmuls × 2 FLOPs × 3 (forward and twice backward) × N·H for every key a causal query sees: (T+1)/2 on
    average, or the layer's window. Document boundaries inside a row are not subtracted. Soft MoE's mixing of tokens
    into slots and back is 2 matmuls of D for every slot.
    """
    active, experts = _count(config)
    mixing = 0
    if config.moe.gate != "none":
        active += experts * expert_rows_per_token(config, sequence_length) / config.moe.num_experts
        if find_gate(config.moe.gate).router == "slots":
            slots = config.moe.num_experts * config.moe.slots_per_expert
            mixing = 12 * slots * (config.moe.latent_dim or config.d_model) * sum(sparse_layers(config))
    if not config.tie_embeddings:
        active -= config.vocab_size * config.d_model
    keys = 0.0  # per query, summed over layers
    for kind in layer_kinds(config):
        window = min(kind.window or sequence_length, sequence_length)
        # The first `window` queries see 1..window keys, the others `window` each.
        keys += (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
    score_and_value_dims = config.head_dim + (config.value_dim or config.head_dim)
    return 6 * active + mixing + 6 * config.num_heads * score_and_value_dims * keys
