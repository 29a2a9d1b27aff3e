"""Parameter counts and training FLOPs of a model, the numerator of MFU.

FLOPs follow PaLM (2022, appendix B): 6 per active matmul parameter, plus attention scores, forward and backward
together; recomputation does not count.
"""

from __future__ import annotations

import functools

import numpy as np
from flax import nnx

from moe.config import Config, LayerKind, ModelConfig, stacks
from moe.dispatch.buffers import layer_capacity
from moe.models.factory import abstract_model
from moe.parallel.parameters import flat_variables
from moe.routing.gates import SoftMoE


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active): active leaves out the experts that a token does not visit; both count all embeddings, and
    selection biases, as the published counts do."""
    others = sum(size for path, size in _sizes(config) if "experts" not in path)
    experts = sum(size for path, size in _sizes(config) if "experts" in path)
    return others + experts, others + experts * config.moe.experts_per_token // config.moe.num_experts


@functools.cache
def _sizes(config: ModelConfig) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Path and size of every parameter and selection bias."""
    variables = flat_variables(nnx.state(abstract_model(config)))
    return tuple((path, int(np.prod(variable.shape))) for path, variable in variables)


def expert_rows_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Rows that the experts of one layer compute for each token: K, less what experts without FFNs get at balance; for
    Soft MoE and expert choice, slots (or capacity) per token."""
    moe = config.moe
    gate, group_size = moe.gate, moe.group_size or sequence_length
    if isinstance(gate, SoftMoE):
        return moe.num_experts * gate.slots / group_size
    if gate is not None and gate.experts_choose:
        return buffer_rows_per_token(config, sequence_length)
    return moe.experts_per_token * moe.ffn_share


def buffer_rows_per_token(config: ModelConfig, sequence_length: int) -> float:
    """E·C/S: rows of one layer's expert buffers for each token, filled or not, at the capacity of training."""
    moe = config.moe
    group_size = moe.group_size or sequence_length
    return moe.num_experts * layer_capacity(moe, group_size) / group_size


def train_flops(config: Config, steps: int = 1) -> float:
    """Model FLOPs of a run's steps; see :func:`train_flops_per_token`."""
    data = config.data
    tokens = steps * config.tokens_per_step
    return tokens * train_flops_per_token(config.model, data.sequence_length, data.input_length)


def train_flops_per_token(config: ModelConfig, sequence_length: int, input_length: int = 0) -> float:
    """Model FLOPs of forward and backward, per token of the decoder.

    6 × active parameters, without the embedding table unless it is tied to the logits, since a look-up multiplies
    nothing; an expert's parameters count once for each row it computes (:func:`expert_rows_per_token`). Plus, in each
    layer, 2 matmuls × 2 FLOPs × 3 (forward and twice backward) × N·H for every key a query sees: (T+1)/2 on average
    if causal, or the layer's window; all U in an encoder and from decoder to encoder. Document boundaries inside a row
    are not subtracted. A gated DeltaNet has 3 products with the H x V memory of each of its N heads instead, whatever
    the length: to read what is replaced, to write, and to read for the query. Soft MoE's mixing of tokens into slots
    and back is 2 matmuls of D for every slot. What an encoder computes, for U tokens a row, is divided by T.
    """
    lengths = row_lengths(sequence_length, input_length)
    share = {stack: length / sequence_length for stack, length in lengths.items()}
    # Parameters, keys and numbers of memories, summed over layers, per token of the decoder.
    multiplied = sum(_multiplied(config, lengths).values())
    keys = memories = 0.0
    multiplied += config.prediction_layers * config.vocab_size * config.d_model  # each depth has logits
    if not config.tie_embeddings:
        multiplied -= config.vocab_size * config.d_model
    multiplied -= config.encoder_vocab_size * config.d_model * share["encoder"]
    slots = config.moe.num_experts * config.moe.gate.slots if isinstance(config.moe.gate, SoftMoE) else 0
    mixing, delta = 0.0, config.delta_net
    for stack, kinds in stacks(config).items():
        kinds = (*kinds, *kinds[-1:] * config.prediction_layers)  # each depth has a layer of the last one's kind
        mixing += 12 * slots * config.expert_dim * sum(kind.sparse for kind in kinds) * share[stack]
        for kind in kinds:
            if kind.mixer == "gated_delta_net":
                memories += delta.value_heads * delta.key_dim * delta.value_dim
            else:
                cross = input_length if kind.role == "cross" else 0
                keys += _keys_per_query(kind, lengths[stack]) * share[stack] + cross
    score_and_value_dims = config.head_dim + (config.value_dim or config.head_dim)
    return 6 * multiplied + mixing + 6 * config.num_heads * score_and_value_dims * keys + 18 * memories


def expert_flops_per_token(config: ModelConfig, sequence_length: int, input_length: int = 0) -> float:
    """The part of :func:`train_flops_per_token` that routed experts compute."""
    multiplied = _multiplied(config, row_lengths(sequence_length, input_length))
    return 6 * sum(count for path, count in multiplied.items() if "experts" in path)


def row_lengths(sequence_length: int, input_length: int) -> dict[str, int]:
    """Tokens of a row in each stack (:func:`moe.config.stacks`)."""
    return {"": sequence_length, "decoder": sequence_length, "encoder": input_length}


def _multiplied(config: ModelConfig, lengths: dict[str, int]) -> dict[tuple[str, ...], float]:
    """Parameters that multiply a token of the decoder and its share of the encoder's tokens, by path."""
    found = {}
    for path, size in _sizes(config):
        stack = path[0] if path[0] in lengths else ""
        rows = expert_rows_per_token(config, lengths[stack]) / config.moe.num_experts if "experts" in path else 1.0
        of_source = "cross" in path and path[-1].startswith(("key", "value"))
        found[path] = size * rows * lengths["encoder" if of_source else stack] / lengths["decoder"]
    return found


def _keys_per_query(kind: LayerKind, length: int) -> float:
    """Keys that a query of a row sees, on average."""
    if kind.role == "encoder":
        return length
    window = min(kind.window or length, length)
    # The first `window` queries see 1..window keys, the others `window` each.
    return (window * (window + 1) / 2 + (length - window) * window) / length
