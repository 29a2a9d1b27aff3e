"""The one table of PartitionSpecs: how every parameter and activation lies on the mesh."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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


def axis_names(axes: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def without(axes: Any, dropped: Sequence[str]) -> Any:
    """One entry of a PartitionSpec without some of its axes."""
    kept = tuple(axis for axis in axis_names(axes) if axis not in dropped)
    return kept if len(kept) > 1 else kept[0] if kept else None


def fit(spec: P, shape: Sequence[int]) -> P:
    """How a weight is stored where D does not divide by fsdp x expert, as 1024 by 2048 cores: ``expert`` then splits
    another of its dimensions, or none."""
    sizes = jax.sharding.get_abstract_mesh().shape

    def divides(dim: int, axes: Any) -> bool:
        return dim % int(np.prod([sizes.get(axis, 1) for axis in axis_names(axes)])) == 0

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
        return P(*(None,) * stacked, *fit(found, jnp.shape(leaf)[stacked:]))

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))
