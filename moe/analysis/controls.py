"""Controls for what experts learn: the trained model with an untrained router, and routing by a hash of the token."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.analysis.record import Records
from moe.config import ModelConfig
from moe.routing.gates import Hash
from moe.routing.interface import GateInputs
from moe.routing.routing import route


def has_router(model: ModelConfig) -> bool:
    """Tell whether the model's gate uses a learned router."""
    return model.moe.gate is not None and model.moe.gate.router != "none"


def untrain_routers(variables: dict[str, Any], model: ModelConfig, seed: int) -> dict[str, Any]:
    """Replace the matrix of every router by a random one, and selection biases by zeros.

    All other parameters are kept. The activations of deeper layers change all the same, because tokens pass through
    other experts.

    Args:
        variables: the model's variables.
        model: its config; the random matrices have the scale of its initialisation.
        seed: seed of the matrices.
    """
    std = (model.init_scale / model.d_model) ** 0.5
    key = jax.random.key(seed)

    def replaced(path: tuple[Any, ...], x: Any) -> Any:
        names = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
        if "router" not in names:
            return x
        number = zlib.crc32(str(names).encode())  # a different key for every matrix
        if "kernel" in names:
            new = std * jax.random.truncated_normal(jax.random.fold_in(key, number), -2.0, 2.0, x.shape, x.dtype)
        else:
            new = jnp.zeros(x.shape, x.dtype)
        return jax.device_put(new, x.sharding) if isinstance(x, jax.Array) else np.asarray(new)

    return jax.tree_util.tree_map_with_path(replaced, variables)


def hash_routing(records: Records) -> Records:
    """Reroutes recorded tokens by a hash of their ids (Hash Layers 2021), the same in every layer."""
    layers, count, k = records.expert_index.shape
    routing = route(
        Hash(k=k),
        jnp.zeros((1, count, records.num_experts)),
        GateInputs(jnp.ones((1, count), bool), token_ids=jnp.asarray(records.tokens)[None]),
    )

    def repeated(x: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(x), (layers, count, x.shape[-1]))

    return dataclasses.replace(
        records,
        expert_index=repeated(routing.expert_index),
        combine_weights=repeated(routing.combine_weights),
        chosen=repeated(routing.chosen),
        router_probs=repeated(routing.router_probs),
    )
