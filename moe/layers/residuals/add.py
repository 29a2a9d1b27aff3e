"""The plain residual stream."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from moe.config import ModelConfig
from moe.layers.residuals.interface import Residual
from moe.parallel.parameters import times


class Add(Residual):
    """x + ``model.residual_scale`` · y."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.scale = config.residual_scale

    def read(self, stream: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """The stream itself."""
        return stream, stream

    def write(self, kept: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Add the part's output."""
        return kept + times(y, self.scale)
