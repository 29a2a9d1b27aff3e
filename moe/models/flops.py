"""Parameter counts and training FLOPs of a model, the numerator of MFU.

FLOPs follow PaLM (2022, appendix B): 6 per active matmul parameter, plus attention scores, forward and backward
together; recomputation does not count.
"""

from __future__ import annotations

import functools

import numpy as np
from flax import nnx

from moe.config import Config, ModelConfig, stacks
from moe.config.mixers import GroupedQuery
from moe.dispatch.buffers import layer_capacity
from moe.layers.residuals.table import residual_kind
from moe.models.factory import abstract_model
from moe.parallel.parameters import flat_variables


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active): active leaves out the experts that a token does not visit, and the rows of a memory's tables
    that it does not read; both count all embeddings, and selection biases, as the published counts do."""
    total = sum(size for _, size in _sizes(config))
    return total, total - sum(sparse_parameters(config))


def sparse_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters that are not active: of experts, and of tables of n-grams, whose part of both is 1 - rho of the paper
    on these memories (Engram 2026, equation 7)."""
    experts = sum(size for path, size in _sizes(config) if _is_of_one_expert(config, path))
    tables = sum(size for path, size in _sizes(config) if _is_table(path))
    read = len(config.memory.layers) * config.memory.joined_dim
    return experts - experts * config.moe.experts_per_token // config.moe.num_experts, tables - read


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
    if gate is not None and gate.slots_per_expert:
        return moe.num_experts * gate.slots_per_expert / group_size
    if gate is not None and gate.experts_choose:
        return buffer_rows_per_token(config, sequence_length)
    return moe.experts_per_token * moe.ffn_share


def buffer_rows_per_token(config: ModelConfig, sequence_length: int) -> float:
    """E·C/S: rows of one layer's expert buffers for each token, filled or not, at the capacity of training."""
    moe = config.moe
    group_size = moe.group_size or sequence_length
    return moe.num_experts * layer_capacity(moe, group_size) / group_size


def train_flops(config: Config, steps: int | None = None) -> float:
    """Model FLOPs of a run's first steps, or of one with the whole batch; see :func:`train_flops_per_token`."""
    data = config.data
    tokens = config.tokens_per_step if steps is None else config.tokens_until(steps)
    return tokens * train_flops_per_token(config.model, data.sequence_length, data.input_length)


def train_flops_per_token(config: ModelConfig, sequence_length: int, input_length: int = 0) -> float:
    """Model FLOPs of forward and backward, per token of the decoder.

    6 × active parameters, without the embedding table unless it is tied to the logits, since a look-up multiplies
    nothing; an expert's parameters count once for each row it computes (:func:`expert_rows_per_token`). Plus what each
    layer's mixer computes (:meth:`moe.config.mixers.Mixer.flops`), such as the scores of all keys that a query sees:
    (T+1)/2 on average if causal; all U in an encoder and from decoder to encoder. Document boundaries inside a row
    are not subtracted. Experts of low rank compute as much as others of their size; the products of their factors, once
    a call, are not counted. Soft MoE's mixing of tokens into slots and back is 2 matmuls of D for every slot. What an
    encoder computes, for U tokens a row, is divided by T. Residual streams add what their kind says
    (:meth:`moe.layers.residuals.interface.Stream.flops`).
    """
    lengths = row_lengths(sequence_length, input_length)
    share = {stack: length / sequence_length for stack, length in lengths.items()}
    # Parameters, summed over layers, per token of the decoder.
    multiplied = sum(_multiplied(config, lengths).values())
    multiplied += config.prediction_layers * config.vocab_size * config.d_model  # each depth has logits
    if not config.tie_embeddings:
        multiplied -= config.vocab_size * config.d_model
    multiplied -= config.encoder_vocab_size * config.d_model * share["encoder"]
    slots = 0 if config.moe.gate is None else config.moe.num_experts * config.moe.gate.slots_per_expert
    mixing, stream = 0.0, residual_kind(config).stream
    for stack, kinds in stacks(config).items():
        mixing += stream.flops(config, kinds) * share[stack]
        mixing += stream.flops(config, kinds[-1:]) * config.prediction_layers
        kinds = (*kinds, *kinds[-1:] * config.prediction_layers)  # each depth has a layer of the last one's kind
        mixing += 12 * slots * config.expert_dim * sum(kind.sparse for kind in kinds) * share[stack]
        for kind in kinds:
            mixing += kind.mixer.flops(lengths[stack]) * share[stack]
            if kind.role == "cross":
                mixing += GroupedQuery.of(config).score_flops(input_length)
    return 6 * multiplied + mixing


def expert_flops_per_token(config: ModelConfig, sequence_length: int, input_length: int = 0) -> float:
    """The part of :func:`train_flops_per_token` that routed experts compute."""
    multiplied = _multiplied(config, row_lengths(sequence_length, input_length))
    return 6 * sum(count for path, count in multiplied.items() if "experts" in path)


def row_lengths(sequence_length: int, input_length: int) -> dict[str, int]:
    """Tokens of a row in each stack (:func:`moe.config.stacks`)."""
    return {"": sequence_length, "decoder": sequence_length, "encoder": input_length}


def _is_of_one_expert(config: ModelConfig, path: tuple[str, ...]) -> bool:
    """Whether a parameter has a part for each expert; experts of low rank share the matrices of an FFN."""
    return "experts" in path and (config.moe.expert_rank == 0 or "pairs" in path)


def _is_table(path: tuple[str, ...]) -> bool:
    """Whether a parameter is a memory's table, of which a token reads a few rows and multiplies none."""
    return path[-2:] == ("memory", "vectors")


def _multiplied(config: ModelConfig, lengths: dict[str, int]) -> dict[tuple[str, ...], float]:
    """Parameters that multiply a token of the decoder and its share of the encoder's tokens, by path."""
    found = {}
    for path, size in _sizes(config):
        if _is_table(path):
            continue
        stack = path[0] if path[0] in lengths else ""
        rows = expert_rows_per_token(config, lengths[stack]) if "experts" in path else 1.0
        if config.moe.expert_rank:  # a row is multiplied by the sum of the shared matrix and the expert's product
            rows *= "pairs" not in path
        elif "experts" in path:
            rows /= config.moe.num_experts
        of_source = "cross" in path and path[-1].startswith(("key", "value"))
        found[path] = size * rows * lengths["encoder" if of_source else stack] / lengths["decoder"]
    return found
