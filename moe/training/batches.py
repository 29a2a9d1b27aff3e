"""Batches of a run: names and shapes of their arrays, their placement on the mesh, and the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from moe.config import Config
from moe.models.decoder import Output
from moe.models.factory import Model
from moe.parallel import partition_specs
from moe.routing.routing import Choices

#: Arrays by the names of :func:`batch_shapes` (see moe.data.pipeline)
Batch = dict[str, Array]

#: Arrays [B,T] of a batch, and [B,U] for an encoder, under the names of its keyword arguments.
TOKEN_KEYS = ("tokens", "targets", "segment_ids", "positions")
ENCODER_KEYS = ("encoder_tokens", "encoder_segment_ids", "encoder_positions")
PREFIX_KEY = "prefix"  # [B,T] of a decoder-only prefix LM
EXPERTS_KEY = "experts"  # [B,T,L,K] int16 of rollouts whose experts are replayed
#: Arrays of a batch that stay on the host.
_HOST_KEYS = ("domain",)


def batch_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name of each array of a batch → (shape of one row, dtype); the shape begins with T, or with U for arrays of the
    encoder."""
    length = config.data.sequence_length
    shapes: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(TOKEN_KEYS, ((length,), jnp.int32))
    if config.model.encoder_layers:
        shapes |= dict.fromkeys(ENCODER_KEYS, ((config.data.input_length,), jnp.int32))
    return shapes | config.objective.arrays(config)


def forward(model: Model, batch: Batch, **settings: Any) -> Output:
    """Run a model on a batch, with the experts that the batch records, if any; ``settings`` such as ``train`` go to the
    model's call."""
    inputs: dict[str, Any] = {key: batch[key] for key in (*ENCODER_KEYS, PREFIX_KEY) if key in batch}
    if EXPERTS_KEY in batch:
        inputs["routing"] = _recorded_choices(batch[EXPERTS_KEY], model.config.moe.group_size)
    return model(batch["tokens"], batch["segment_ids"], batch["positions"], **inputs, **settings)


def _recorded_choices(experts: Array, group_size: int) -> Choices:
    """[B,T,L,K] → choices [L,G,S,K]."""
    layers = jnp.moveaxis(experts.astype(jnp.int32), 2, 0)
    index = layers.reshape(len(layers), -1, group_size or experts.shape[1], experts.shape[3])
    return Choices(index, jnp.ones(index.shape, bool))


def joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One batch of the rows of several, such that the train step makes a microbatch of each again
    (:data:`moe.parallel.partition_specs.MICROBATCHES`), on any number of processes."""
    if len(parts) == 1:
        return parts[0]
    return {
        key: np.stack([part[key] for part in parts], axis=1).reshape(-1, *parts[0][key].shape[1:]) for key in parts[0]
    }


def place(batch: dict[str, Any], mesh: Mesh) -> Batch:
    """Assemble each process's rows of a batch (NumPy) into global arrays [B,T,...] on the mesh, without those that the
    step does not use."""
    sharding = partition_specs.shardings(mesh, partition_specs.BATCH)
    return {
        key: jax.make_array_from_process_local_data(sharding, values)
        for key, values in batch.items()
        if key not in _HOST_KEYS
    }
