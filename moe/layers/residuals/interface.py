"""Interface of a residual stream."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from moe.config import ModelConfig


class Residual(nnx.Module):
    """Rule by which one part of a block reads its input from the stream and writes its output to it.

    A block makes one for each of its parts, and a stack one for the ends of the stream; its parameters, if it has any,
    are the block's ``PART_residual`` or the stack's ``residual``. The stream is any pytree of [B,T,...] arrays, of the
    same structure in all layers.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draw the parameters."""

    def first(self, x: Float[Array, "B T D"]) -> Any:
        """The stream of embedded tokens."""
        return x

    def read(self, stream: Any) -> Float[Array, "B T D"]:
        """Input of the part, before its norm."""
        raise NotImplementedError

    def write(self, stream: Any, y: Float[Array, "B T D"]) -> Any:
        """The stream after the part, whose output is y."""
        raise NotImplementedError

    def last(self, stream: Any) -> Float[Array, "B T D"]:
        """Input of the final norm."""
        return stream
