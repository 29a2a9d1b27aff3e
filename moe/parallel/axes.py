"""Mesh axes by their roles, in our meshes and in a user's own.

The table of PartitionSpecs names five roles: data, fsdp, expert, tensor and context. In our meshes axes have these
names. In another mesh, roles that no axis has are not split, axes that have no role are ignored, and
:func:`mesh_roles` says which axis has which role where the names differ.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from moe.config import ConfigError

#: Roles; those over which rows are split; those over which tokens are. Positions of a row are split over context.
AXES = ("data", "fsdp", "expert", "tensor", "context")
ROW_AXES = ("data", "fsdp", "expert")
TOKEN_AXES = (*ROW_AXES, "context")

_NO_NAMES: Mapping[str, str] = types.MappingProxyType({})
_names: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("mesh roles", default=_NO_NAMES)


@contextlib.contextmanager
def mesh_roles(names: Mapping[str, str]) -> Iterator[None]:
    """While programs are traced in this context, the axis ``names[role]`` of the mesh has that role.

    Raises:
        ConfigError: an unknown role.
    """
    for role in names:
        if role not in AXES:
            raise ConfigError(f"mesh_roles={dict(names)!r}: roles are {', '.join(AXES)}")
    token = _names.set({**_names.get(), **names})
    try:
        yield
    finally:
        _names.reset(token)


def axis_of(role: str) -> str:
    """Name of the mesh axis that has this role."""
    return _names.get().get(role, role)


def axis_size(*roles: str) -> int:
    """Number of shards that the axes with these roles make in the mesh in context; 1 without such axes."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis_of(role), 1) for role in roles)


def on_mesh(spec: P, axis_names: tuple[str, ...] | None = None) -> P:
    """The spec with roles replaced by axes of a mesh, without those that it does not have.

    Args:
        spec: in roles.
        axis_names: of the mesh; None: of the mesh in context.
    """
    present = jax.sharding.get_abstract_mesh().axis_names if axis_names is None else axis_names

    def entry(roles: Any) -> Any:
        if roles is None:
            return None
        axes = tuple(axis_of(role) for role in ((roles,) if isinstance(roles, str) else roles))
        kept = tuple(axis for axis in axes if axis in present)
        return kept if len(kept) > 1 else kept[0] if kept else None

    return P(*map(entry, spec))
