"""The mesh, and the one table that says how every array lies on it.

Axes: ``data`` (rows), ``fsdp`` (rows; parameters split over D), ``expert`` (rows; experts split over E), ``tensor``
(heads, F and V split). Tokens are spread over the first three. Nothing else in the code names a mesh axis.

Letters: see :mod:`moe.transformer`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert", "tensor")
TOKEN_AXES = ("data", "fsdp", "expert")

BATCH = P(TOKEN_AXES)  # [B,...] and [G,...]
MICROBATCHES = P(None, TOKEN_AXES)  # [A,B/A,T]
HEADS = P(TOKEN_AXES, None, "tensor")  # [B,T,N,H]
CACHE = P(None, TOKEN_AXES, None, "tensor")  # [R,B,W,M,H]
TABLE = P("tensor", None)  # [V,D] while tokens are looked up
LOGITS = P(TOKEN_AXES, None, "tensor")  # [B,T,V]
PARTIAL_LOGITS_MATRIX = P(TOKEN_AXES, None, "tensor")  # [X,D,V], what each of X parts of the tokens adds to a gradient
GROUPED_SLOTS = P(None, TOKEN_AXES)  # [E,G,C,D] where the tokens are
EXPERT_SLOTS = P("expert", ("data", "fsdp"))  # [E,G,C,D] where the experts are
#: ((up, and gate if any) [E,D,F], down [E,F,D]) as the experts' matmuls take them
EXPERT_MATRICES = (P("expert", None, "tensor"), P("expert", "tensor", None))
REPLICATED = P()
STORED = ("fsdp", "expert")  # D of a weight that every token needs: split over all that have tokens but data

#: How each parameter is stored, by its last two names; stacked over layers it gains an unsharded leading axis.
PARAMETERS: Mapping[str, P] = types.MappingProxyType(
    {
        "embedding.table": P("tensor", STORED),  # [V,D]
        "unembedding.kernel": P(STORED, "tensor"),  # [D,V]
        "attention.query": P(STORED, "tensor", None),  # [D,N,H]
        "attention.key": P(STORED, "tensor", None),  # [D,M,H]
        "attention.value": P(STORED, "tensor", None),  # [D,M,H]
        "attention.out": P("tensor", None, STORED),  # [N,H,D]
        "attention.query_bias": P("tensor", None),  # [N,H]
        "attention.key_bias": P("tensor", None),  # [M,H]
        "attention.value_bias": P("tensor", None),  # [M,H]
        "dense.gate": P(STORED, "tensor"),  # [D,F]
        "dense.up": P(STORED, "tensor"),  # [D,F]
        "dense.down": P("tensor", STORED),  # [F,D]
        "experts.gate": P("expert", "fsdp", "tensor"),  # [E,D,F]
        "experts.up": P("expert", "fsdp", "tensor"),  # [E,D,F]
        "experts.down": P("expert", "tensor", "fsdp"),  # [E,F,D]
        "router.kernel": P(None, None),  # [D,E]
        "router.noise": P(None, None),  # [D,E]
        "router.bias": P(None),  # [E]
        "shared.gate": P(None, None),  # [D,1]
    }
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, with -1 filled in.

    Raises:
        ConfigError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        given = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in AXES)
        raise ConfigError(
            f"{given}: the sizes must multiply to the number of devices, {len(devices)}; "
            "set one of them to -1 to fill it"
        )
    return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices as an array of the mesh's sizes, neighbours on the network being neighbours on an axis.

    A torus axis may be shared by two mesh axes: 8 x 8 on a 4x4x4 torus is otherwise refused. Between TPU slices there
    is only the data-center network, so ``data`` is the axis that crosses it.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ConfigError(f"mesh.data={sizes[0]}: must be a multiple of the {slices} TPU slices, which it spans")
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )


def constrain(x: Array, spec: P) -> Array:
    """Pins how x lies on the mesh in context (``jax.set_mesh``); without one, as on a laptop, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Numbers [b] of those of a batch's rows that this process's devices hold; where ``tensor`` spans processes, two
    hold the same."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


def axis_size(*axes: str) -> int:
    """Into how many parts these axes of the mesh in context split an array; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return int(np.prod([sizes.get(axis, 1) for axis in axes]))


def use(name: str, parameter: Array, dtype: Any) -> Array:
    """A parameter as a matmul wants it: cast, then gathered where it is stored split; its gradient is scattered back.

    Said explicitly because XLA, left to itself, may move the tokens instead of the weights.

    Args:
        name: key of :data:`PARAMETERS`.
        parameter: one layer's array, without the leading layer axis.
        dtype: of the computation.
    """
    stored = _fit(PARAMETERS[name], parameter.shape)
    # One axis after the other: over both at once XLA for TPUs makes an all-reduce of it, of the whole weight padded
    # with zeros, and sums the gradient by another; that is twice the traffic, and code that takes long to compile.
    parts, whole = [stored], stored
    for axis in ("fsdp",) if name.startswith("experts.") else reversed(STORED):
        whole = P(*(_without(axes, (axis,)) for axes in whole))
        parts.append(whole)

    @jax.custom_vjp
    def gather(weights: Array) -> Array:
        return functools.reduce(constrain, parts[1:], weights)

    gather.defvjp(
        lambda weights: (gather(weights), None),
        lambda _, gradient: (functools.reduce(constrain, parts[-2::-1], gradient),),
    )
    with jax.named_scope(f"weights.{name}"):  # by this a compiled program's exchanges of weights are told apart
        return gather(parameter.astype(dtype))


def _names(axes: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _without(axes: Any, dropped: Sequence[str]) -> Any:
    kept = tuple(axis for axis in _names(axes) if axis not in dropped)
    return kept if len(kept) > 1 else kept[0] if kept else None


def _fit(spec: P, shape: Sequence[int]) -> P:
    """How a weight is stored where D does not divide by fsdp x expert, as 1024 by 2048 cores: ``expert`` then splits
    another of its dimensions, or none."""
    sizes = jax.sharding.get_abstract_mesh().shape

    def divides(dim: int, axes: Any) -> bool:
        return dim % int(np.prod([sizes.get(axis, 1) for axis in _names(axes)])) == 0

    if STORED not in tuple(spec) or all(divides(dim, axes) for dim, axes in zip(shape, spec, strict=True)):
        return spec
    entries = ["fsdp" if axes == STORED else axes for axes in spec]
    for i, dim in enumerate(shape):
        wider = (*_names(entries[i]), "expert")
        if spec[i] != STORED and divides(dim, wider):
            entries[i] = wider
            break
    return P(*entries)


def parameter_specs(tree: Any) -> Any:
    """PartitionSpecs of a tree of parameters, or of any tree that holds such trees (an optimizer's state, gradients).

    A leaf is looked up by the last two names of its path; one that is not in the table (norm scales, counters) is
    replicated.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # an nnx.State wraps each array in its Param
            path = path[:-1]
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        found = PARAMETERS.get(".".join(names[-2:]))
        if found is None:
            return REPLICATED
        stacked = jnp.ndim(leaf) - len(found)
        return P(*(None,) * stacked, *_fit(found, jnp.shape(leaf)[stacked:]))

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))
