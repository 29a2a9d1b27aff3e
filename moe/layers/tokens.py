"""Groups of tokens of an MoE layer: split, padded, and matched with a routing to replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.routing.interface import Gate
from moe.routing.routing import Choices, Routing


class Keys(NamedTuple):
    """A key for each kind of noise; None: deterministic."""

    jitter: PRNGKeyArray | None = None
    gate: PRNGKeyArray | None = None
    drop: PRNGKeyArray | None = None
    dropout: PRNGKeyArray | None = None

    @classmethod
    def split(cls, rng: PRNGKeyArray | None) -> Keys:
        """Keys of a layer's key."""
        return cls() if rng is None else cls(*jax.random.split(rng, 4))


class Tokens(NamedTuple):
    """Tokens in groups, runs of S tokens in row order, whatever the mesh.

    Attributes:
        x: [G,S,D], 0 for padding.
        mask: [G,S], real tokens.
        shape: [B,T,D] of the activations.
        read: pytrees of [G,S,...] that gates read, by name in :class:`moe.routing.interface.GateInputs`.
    """

    x: Array
    mask: Array
    shape: tuple[int, ...]
    read: Mapping[str, Any]

    @classmethod
    def of(cls, x: Array, mask: ArrayLike | None, read: Mapping[str, Any], *, group_size: int, d_model: int) -> Tokens:
        """Split a batch.

        Args:
            x: [B,T,D].
            mask: [B,T]; None: all tokens are real.
            read: pytrees of [B,T,...]; None is left out.
            group_size: S; 0: T.
            d_model: D.
        """
        if x.ndim != 3 or x.shape[2] != d_model:
            raise ValueError(f"x of shape {x.shape}: must be [batch, sequence, d_model={d_model}]")
        size = group_size or x.shape[1]
        if x.shape[0] * x.shape[1] % size:
            raise ValueError(f"group_size={size}: must divide the {x.shape[0]} x {x.shape[1]} tokens of x")
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        mask = jnp.asarray(mask).reshape(-1, size)
        grouped = constrain(x.reshape(-1, size, x.shape[-1]), partition_specs.GROUPS)
        # Zeroed, since a NaN in padding would reach others even through a weight or a gradient of 0.
        grouped = jnp.where(mask[..., None], grouped, 0)
        given = {name: values for name, values in read.items() if values is not None}
        split = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(-1, size, *jnp.shape(leaf)[2:]), given)
        return cls(grouped, mask, x.shape, split)

    def ungrouped(self, y: Float[Array, "G S D"], dtype: Any) -> Float[Array, "B T D"]:
        """Outputs of the experts as rows of the batch."""
        return constrain(y.astype(dtype).reshape(self.shape), partition_specs.BATCH)

    def check_replay(self, routing: Routing | Choices | None, gate: Gate) -> None:
        """Refuse a routing that cannot be replayed for these tokens. Raises ValueError."""
        if routing is None:
            return
        if isinstance(routing, Choices) and not gate.reweighs:
            raise ValueError(f"choices cannot be replayed: the gate {gate.name!r} weighs only its own choices")
        if routing.chosen.shape[:2] != self.mask.shape:
            raise ValueError(
                f"a routing of {routing.chosen.shape[:2]} groups and tokens cannot be replayed here: "
                f"groups and tokens are {self.mask.shape}"
            )
