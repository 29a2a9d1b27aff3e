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

from moe.config import ModelConfig, layer_kinds
from moe.models.decoder import Transformer


def abstract_parameters(config: ModelConfig) -> dict[str, Any]:
    """ShapeDtypeStructs of all parameters, as a nested dict; nothing is allocated."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.cache
def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active): active leaves out the experts that a token does not visit; both count all embeddings."""
    total = active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_parameters(config)):
        size = int(np.prod(leaf.shape))
        total += size
        if any(key.key == "experts" for key in path):
            size = size * config.moe.experts_per_token // config.moe.num_experts
        active += size
    return total, active


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of forward and backward, per token.

    6 × active parameters, without the embedding table unless it is tied to the logits, since a look-up multiplies
    nothing; plus, in each layer, 2 matmuls × 2 FLOPs × 3 (forward and twice backward) × N·H for every key a causal
    query sees: (T+1)/2 on average, or the layer's window. Document boundaries inside a row are not subtracted.
    """
    _, active = count_parameters(config)
    if not config.tie_embeddings:
        active -= config.vocab_size * config.d_model
    keys = 0.0  # per query, summed over layers
    for _, window in layer_kinds(config):
        window = min(window or sequence_length, sequence_length)
        # The first `window` queries see 1..window keys, the others `window` each.
        keys += (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
    score_and_value_dims = config.head_dim + (config.value_dim or config.head_dim)
    return 6 * active + 6 * config.num_heads * score_and_value_dims * keys
