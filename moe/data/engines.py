"""Experts that a serving engine recorded while it generated.

Every engine records the experts of all tokens that its model processed: all but the last one sampled. Expert ids are
the model's own, before any copying of experts to balance devices. What differs is the order of the axes, and which
layers are there:

====================  ==========================================================================  ==================
engine                one sequence                                                                padding
====================  ==========================================================================  ==================
``vllm``              ``CompletionOutput.routed_experts``, int16 [tokens - 1, layers, K]          none
``sglang``            ``meta_info["routed_experts"]``, base64 of int32 [tokens - 1, layers, K]    -1: no experts
``tensorrt_llm``      ``CompletionOutput.routed_experts``, int [tokens - 1, MoE layers, K]        none
``tunix``             one array for all sequences, int [batch, layers, length, K]                 -1
====================  ==========================================================================  ==================

A record has all layers of the model or only its MoE layers; their number shows which. Base64 has no shape and always
has all layers.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from moe.config import ConfigError, ModelConfig, sparse_layers

EngineName = Literal["vllm", "sglang", "tensorrt_llm", "tunix"]
#: Entry of a token or layer without recorded experts.
ABSENT = -1


def read_experts(engine: str, records: Any, model: ModelConfig, length: int) -> np.ndarray:
    """Recorded experts of some sequences, [B,T,L,K] int32 over the MoE layers, :data:`ABSENT` where there are none.

    Args:
        engine: a name of :data:`EngineName`.
        records: one for each sequence, in order, as the engine gives it; for ``tunix`` the array of all.
        model: its layers, experts and K must be those of the model that was served.
        length: T; sequences start at position 0.

    Raises:
        ConfigError: an unknown engine, a record of another shape, or an expert that the model does not have.
    """
    if engine not in get_args(EngineName):
        raise ConfigError(f"engine={engine!r}: must be one of {', '.join(get_args(EngineName))}")
    if length < 1 or not isinstance(records, Iterable):
        raise ConfigError(f"length={length}: must be positive, and records one for each sequence")
    k, sparse = model.moe.experts_per_token, sparse_layers(model)
    if engine == "tunix":
        rows = _as_integers(records, "the record")
        if rows.ndim != 4:
            raise ConfigError(f"the record has shape {list(rows.shape)}, must be [batch, layers, length, {k}]")
        sequences = [row.swapaxes(0, 1) for row in rows]
    elif engine == "sglang":
        sequences = [_decoded(record, i, len(sparse), k) for i, record in enumerate(records)]
    else:
        sequences = [_as_integers(record, f"record {i}") for i, record in enumerate(records)]
    index = np.full((len(sequences), length, sum(sparse), k), ABSENT, np.int32)
    for i, sequence in enumerate(sequences):
        experts = _moe_layers(sequence, i, sparse, k)
        index[i, : len(experts)] = _within(experts, i, length)
    _check_ids(index, model.moe.num_experts + model.moe.null_experts)
    return index


def _as_integers(record: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(record)
    except ValueError as error:
        raise ConfigError(f"{name} has lists of different lengths") from error
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{name} is of type {array.dtype}, must be integers")
    narrow = array.astype(np.int32)
    if (narrow != array).any():
        raise ConfigError(f"{name} has the expert {array[narrow != array][0]}, beyond 32 bits")
    return narrow


def _decoded(record: Any, number: int, layers: int, k: int) -> np.ndarray:
    """An SGLang record, base64 of a flat array of all layers, as [tokens, layers, K]; arrays are taken as they are."""
    if not isinstance(record, str | bytes):
        return _as_integers(record, f"record {number}")
    try:
        flat = np.frombuffer(base64.b64decode(record, validate=True), "<i4")
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"record {number}: is not base64 of int32: {error}") from error
    if flat.size % max(layers * k, 1):
        raise ConfigError(f"record {number}: {flat.size} experts are not a multiple of {layers} layers of {k}")
    return flat.reshape(-1, layers, k)


def _moe_layers(sequence: np.ndarray, number: int, sparse: Sequence[bool], k: int) -> np.ndarray:
    """[tokens, MoE layers, K]."""
    counts = sorted({len(sparse), sum(sparse)})
    if sequence.ndim != 3 or sequence.shape[1] not in counts or sequence.shape[2] != k:
        layers = " or ".join(map(str, counts))
        raise ConfigError(f"record {number} has shape {list(sequence.shape)}, must be [tokens, {layers} layers, {k}]")
    return sequence[:, np.asarray(sparse)] if sequence.shape[1] == len(sparse) else sequence


def _within(experts: np.ndarray, number: int, length: int) -> np.ndarray:
    beyond = experts[length:]
    if (beyond != ABSENT).any():
        raise ConfigError(f"record {number} has {len(experts)} tokens, but rows have {length}")
    return experts[:length]


def _check_ids(index: np.ndarray, num_experts: int) -> None:
    wrong = np.argwhere((index < ABSENT) | (index >= num_experts))
    if len(wrong):
        row, token, layer, choice = (int(at) for at in wrong[0])
        expert = int(index[row, token, layer, choice])
        raise ConfigError(
            f"record {row}: expert {expert} at token {token}, MoE layer {layer}: must be below {num_experts}"
        )
    ordered = np.sort(index, axis=-1)
    twice = np.argwhere((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != ABSENT))
    if len(twice):
        row, token, layer, _ = (int(at) for at in twice[0])
        raise ConfigError(f"record {row}: one expert twice at token {token}, MoE layer {layer}")
