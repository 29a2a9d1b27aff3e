"""PartitionSpecs of all parameters and activations."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moe.parallel.axes import AXES as AXES
from moe.parallel.axes import ROW_AXES as ROW_AXES
from moe.parallel.axes import TOKEN_AXES as TOKEN_AXES
from moe.parallel.axes import axis_size, on_mesh

# Activations.
ROWS = P(ROW_AXES)  # [B]
BATCH = P(ROW_AXES, "context")  # [B,T,...]
GROUPS = P(TOKEN_AXES)  # [G,...]
MICROBATCHES = P(None, ROW_AXES, "context")  # [A,B/A,T]
HEADS = P(ROW_AXES, "context", "tensor")  # [B,T,N,H]
CACHE = P(None, ROW_AXES, None, "tensor")  # [R,B,W,M,H]
SINKS = P("tensor")  # [N]


CACHE_OF_ONE_HEAD = P(None, ROW_AXES)  # [R,B,W,1,H]
TABLE = P("tensor", None)  # [V,D] during the embedding lookup
LOGITS = P(ROW_AXES, "context", "tensor")  # [B,T,V]
CHUNK_LOGITS = P(TOKEN_AXES, None, "tensor")  # [G,P,V]
PARTIAL_LOGITS_MATRIX = P(TOKEN_AXES, None, "tensor")  # [X,D,V], gradient summed over each of X shards of the tokens
GROUPED_SLOTS = P(None, TOKEN_AXES)  # [E,G,C,D] before dispatch, sharded as tokens
EXPERT_SLOTS = P("expert", ("data", "fsdp", "context"))  # [E,G,C,D] after dispatch, sharded as experts

EXPERT_BIASES = P("expert", None, "tensor")  # [E,1,F], an operand of matmuls

REPLICATED = P()

#: Axes over which D of a weight that all tokens use is stored: all row axes except data.
STORED = ("fsdp", "expert")

#: Storage of each parameter, by the last two names of its path; stacked layers add an unsharded leading axis.
PARAMETERS: Mapping[str, P] = types.MappingProxyType(
    {
        "embedding.table": P("tensor", STORED),  # [V,D]
        "unembedding.kernel": P(STORED, "tensor"),  # [D,V]
        "attention.query": P(STORED, "tensor", None),  # [D,N,H]
        "attention.key": P(STORED, "tensor", None),  # [D,M,H]
        "attention.value": P(STORED, "tensor", None),  # [D,M,H]
        "attention.out": P("tensor", None, STORED),  # [N,H,D]
        "attention.query_down": P(STORED, None),  # [D,q_lora_rank]
        "attention.query_up": P(STORED, "tensor", None),  # [q_lora_rank,N,H]
        "attention.kv_down": P(STORED, None),  # [D,kv_lora_rank + rope_dim]
        "attention.kv_up": P(STORED, "tensor", None),  # [kv_lora_rank,N,unrotated and value dims]
        "attention.query_bias": P("tensor", None),  # [N,H]
        "attention.key_bias": P("tensor", None),  # [M,H]
        "attention.value_bias": P("tensor", None),  # [M,H]
        "attention.sinks": SINKS,
        "dense.gate": P(STORED, "tensor"),  # [D,F]
        "dense.up": P(STORED, "tensor"),  # [D,F]
        "dense.down": P("tensor", STORED),  # [F,D]
        "experts.gate": P("expert", "fsdp", "tensor"),  # [E,D,F]
        "experts.up": P("expert", "fsdp", "tensor"),  # [E,D,F]
        "experts.down": P("expert", "tensor", "fsdp"),  # [E,F,D]
        "experts.gate_bias": P("expert", "tensor"),  # [E,F]
        "experts.up_bias": P("expert", "tensor"),  # [E,F]
        "experts.down_bias": P(None, "fsdp"),  # [E,D]
        "router.kernel": P(None, None),  # [D,E]
        "router.noise": P(None, None),  # [D,E]
        "router.bias": P(None),  # [E]
        "router.logit_bias": P(None),  # [E]
        "shared.gate": P(None, None),  # [D,1]
        "latent.down": P(STORED, None),  # [D,latent_dim]
        "latent.up": P(None, STORED),  # [latent_dim,D]
    }
)


#: Number of axes of a matrix that its input has, where it is not one.
INPUT_AXES: Mapping[str, int] = types.MappingProxyType({"attention.out": 2})

#: Names of a matrix's low-rank factors (moe.models.adapters): A, one for all experts of a layer, and B.
ADAPTER_A, ADAPTER_COMMON_A, ADAPTER_B = "lora_a", "lora_common_a", "lora_b"


def _storage(names: Sequence[str]) -> P | None:
    """Storage of a parameter, or of a factor of one as the axes that it has in common with the matrix."""
    if names[-1] not in (ADAPTER_A, ADAPTER_COMMON_A, ADAPTER_B):
        return PARAMETERS.get(".".join(names[-2:]))
    matrix = ".".join(names[-3:-1])
    spec, experts = tuple(PARAMETERS[matrix]), int(matrix.startswith("experts."))
    inputs = experts + INPUT_AXES.get(matrix, 1)
    if names[-1] == ADAPTER_B:
        return P(*spec[:experts], None, *spec[inputs:])
    return P(*spec[experts if names[-1] == ADAPTER_COMMON_A else 0 : inputs], None)


def axis_names(axes: Any) -> tuple[str, ...]:
    """Mesh axes in one entry of a PartitionSpec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def without(axes: Any, dropped: Sequence[str]) -> Any:
    """Remove axes from one entry of a PartitionSpec."""
    kept = tuple(axis for axis in axis_names(axes) if axis not in dropped)
    return kept if len(kept) > 1 else kept[0] if kept else None


def fit(spec: P, shape: Sequence[int]) -> P:
    """Storage of a weight whose D does not divide by fsdp x expert (1024 over 2048 cores): ``expert`` splits another
    dimension instead, or none."""

    def divides(dim: int, axes: Any) -> bool:
        return dim % axis_size(*axis_names(axes)) == 0

    if STORED not in tuple(spec) or all(divides(dim, axes) for dim, axes in zip(shape, spec, strict=True)):
        return spec
    entries = ["fsdp" if axes == STORED else axes for axes in spec]
    for i, dim in enumerate(shape):
        wider = (*axis_names(entries[i]), "expert")
        if spec[i] != STORED and divides(dim, wider):
            entries[i] = wider
            break
    return P(*entries)


def parameter_specs(tree: Any) -> Any:
    """PartitionSpecs of a tree of parameters, or of any tree that contains such trees (optimizer state, gradients).

    Leaves are looked up by the last two names of their path; those not in the table (norm scales, counters) are
    replicated.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # nnx.State wraps arrays in Param
            path = path[:-1]
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        found = _storage(names) if names else None
        if found is None:
            return REPLICATED
        stacked = jnp.ndim(leaf) - len(found)
        return P(*(None,) * stacked, *fit(found, jnp.shape(leaf)[stacked:]))

    return jax.tree_util.tree_map_with_path(spec, tree)


def optimizer_specs(parameters: Any, optimizer: Any) -> Any:
    """PartitionSpecs of an optimizer state: those of the parameter for arrays of its shape, such as moments, and those
    of the remaining axes for arrays that lack one, such as Adafactor's factored moments. Counters are replicated.

    Args:
        parameters: arrays or ShapeDtypeStructs.
        optimizer: state whose arrays have paths that end with their parameter's.
    """

    def names(path: tuple[Any, ...]) -> tuple[str, ...]:
        keys = [getattr(key, "key", None) for key in path]
        start = max((i + 1 for i, key in enumerate(keys) if not isinstance(key, str)), default=0)
        return tuple(str(key) for key in keys[start:])

    shapes = {names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    specs = {
        names(path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(
            parameter_specs(parameters), is_leaf=lambda leaf: isinstance(leaf, P)
        )
    }

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        shape = shapes.get(names(path), ())
        entries = (*specs.get(names(path), ()), *(None,) * len(shape))[: len(shape)]
        if shape == leaf.shape:
            return P(*entries)
        for axis in range(len(shape)):
            if (*shape[:axis], *shape[axis + 1 :]) == leaf.shape:
                return P(*entries[:axis], *entries[axis + 1 :])
        return REPLICATED

    return jax.tree_util.tree_map_with_path(spec, optimizer)


def parameter_shardings(mesh: Mesh | None, tree: Any) -> Any:
    """Where each parameter of a tree is stored: split over the mesh, or whole on this process's first device."""
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: device, tree)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return shardings(mesh, parameter_specs(tree))


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Convert a tree of PartitionSpecs to NamedShardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, on_mesh(spec, mesh.axis_names)),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, P),
    )
