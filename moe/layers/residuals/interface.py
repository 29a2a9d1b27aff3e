"""Interface of a residual stream: its ends, and how one part of a block reads and writes it."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.config.layer_kinds import LayerKind


class Stream(nnx.Module):
    """Ends of the stream of a stack of layers; its parameters, if it has any, are the stack's ``residual``.

    The stream is any pytree of [B,T,...] arrays, of the same structure in all layers; here one array [B,T,D].
    """

    def __init__(self, config: ModelConfig, kinds: tuple[LayerKind, ...], *, rngs: nnx.Rngs):
        """Draw the parameters.

        Args:
            kinds: of the stack's layers, in order.
        """

    def first(self, x: Float[Array, "B T D"]) -> Any:
        """The stream of embedded tokens."""
        return x

    def last(self, stream: Any) -> Float[Array, "B T D"]:
        """Input of the final norm."""
        return stream

    @classmethod
    def size(cls, config: ModelConfig, kinds: tuple[LayerKind, ...]) -> int:
        """Arrays [B,T,D] that pass from layer to layer."""
        del config, kinds
        return 1

    @classmethod
    def flops(cls, config: ModelConfig, kinds: tuple[LayerKind, ...]) -> float:
        """FLOPs of training, forward and backward, per token, of all reads and writes, without the 6 of each
        parameter."""
        del config, kinds
        return 0.0


class Residual(nnx.Module):
    """Rule by which one part of a block reads its input from the stream and writes its output to it; its parameters, if
    it has any, are the block's ``PART_residual``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draw the parameters."""

    def read(self, stream: Any) -> tuple[Float[Array, "B T D"], Any]:
        """Input of the part, before its norm, and what :meth:`write` needs of the stream."""
        raise NotImplementedError

    def write(self, kept: Any, y: Float[Array, "B T D"]) -> Any:
        """The stream after the part, whose output is y."""
        raise NotImplementedError
