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
has all layers. Nor does a record say at which position it begins: at 0, unless the request had vLLM's
``routed_experts_prompt_start`` or SGLang's ``routed_experts_start_len``.
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


def read_experts(
    engine: str,
    records: Any,
    model: ModelConfig,
    length: int,
    *,
    starts: int | Sequence[int] = 0,
    tokens: Sequence[int] | None = None,
) -> np.ndarray:
    """Recorded experts of some sequences, [B,T,L,K] int32 over the MoE layers, :data:`ABSENT` where there are none.

    Args:
        engine: a name of :data:`EngineName`.
        records: one for each sequence, in order, as the engine gives it; for ``tunix`` the array of all.
        model: its layers, experts and K must be those of the model that was served.
        length: T; sequences start at position 0.
        starts: position of the first token of all records, or of each.
        tokens: number of tokens of each sequence, without the last one sampled; None: records may end before their
            sequences. Not read for ``tunix``, whose padding says where a sequence ends.

    Raises:
        ConfigError: an unknown engine, a record of another shape or of other tokens, or an expert that the model does
            not have.
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
    first = _one_each("starts", [starts] * len(sequences) if isinstance(starts, int) else starts, len(sequences))
    ends = None if tokens is None or engine == "tunix" else _one_each("tokens", tokens, len(sequences))
    index = np.full((len(sequences), length, sum(sparse), k), ABSENT, np.int32)
    for i, (sequence, start) in enumerate(zip(sequences, first, strict=True)):
        experts = _moe_layers(sequence, i, sparse, k)
        end = length if ends is None else ends[i]
        inside = _within(experts, i, start, end, length)
        if ends is not None and start + len(experts) < end:
            raise ConfigError(
                f"record {i} has {len(experts)} tokens from position {start} on, and its sequence has {end}: pass "
                "tokens=, the number of tokens of each sequence, and starts=, where records begin (vLLM's "
                "routed_experts_prompt_start, SGLang's routed_experts_start_len)"
            )
        index[i, start : start + len(inside)] = inside
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


def _one_each(name: str, values: Sequence[int], count: int) -> list[int]:
    """Numbers from 0 on, one for each record."""
    numbers = [int(value) for value in values]
    if len(numbers) != count or min(numbers, default=0) < 0:
        raise ConfigError(f"{name}={numbers}: must be numbers from 0 on, one for each of the {count} records")
    return numbers


def _within(experts: np.ndarray, number: int, start: int, end: int, length: int) -> np.ndarray:
    """The part of a record that begins at ``start`` before ``end``, after which nothing may be recorded."""
    size = max(end - start, 0)
    if end > length:
        raise ConfigError(f"record {number} is of {end} tokens, but rows have {length}")
    if (experts[size:] != ABSENT).any():
        where = f" from position {start} on" if start else ""
        what = f"its sequence has {end}" if end < length else f"rows have {length}"
        raise ConfigError(f"record {number} has {len(experts)} tokens{where}, but {what}")
    return experts[:size]


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
