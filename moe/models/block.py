"""One Transformer block: parts on a residual stream."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from moe.config import ModelConfig
from moe.config.layer_kinds import LayerKind
from moe.layers.call import Call, Report
from moe.layers.norms import RMSNorm
from moe.layers.residuals.table import residual_kind
from moe.models.parts import create_parts
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain


class Block(nnx.Module):
    """A token mixer, then an FFN, dense or MoE, and what else :func:`moe.models.parts.create_parts` lists.

    Each part reads its input from the stream and writes its output to it, as its residual says; in the plain stream
    that is x + part(norm(x)). With ``model.norms="after"`` it is x + norm(part(x)) (OLMo 2), with ``both``
    x + norm'(part(norm(x))) (Trinity).
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.kind = kind
        self.norms = config.norms
        parts = []
        for part, layer in create_parts(config, kind, rngs):
            setattr(self, part.layer, layer)
            setattr(self, f"{part.layer}_residual", residual_kind(config).residual(config, rngs=rngs))
            if part.norm is not None:
                setattr(self, f"{part.norm}_norm", RMSNorm.of(config))
                if config.norms == "both":
                    setattr(self, f"{part.norm}_output_norm", RMSNorm.of(config))
            parts.append(part)
        self.parts = tuple(parts)

    def __call__(self, stream: Any, call: Call) -> tuple[Any, Report]:
        """Apply all parts.

        Args:
            stream: see :class:`moe.layers.residuals.interface.Stream`.
            call: of this layer.
        """
        stream = checkpoint_name(stream, partition_specs.LAYER_INPUT)
        report = Report()
        for part in self.parts:
            # The scopes name the parts of a layer in profiles and in plans.
            with jax.named_scope(part.scope):
                residual = getattr(self, f"{part.layer}_residual")
                x, kept = residual.read(stream)
                y, of_part = part.run(getattr(self, part.layer), self._normed(part.norm, x), call)
                y = self._normed_output(part.norm, y)
                stream = residual.write(kept, y if part.site is None else call.drop.at(part.site)(y))
                report |= of_part
        return constrain(stream, partition_specs.BATCH), report.asked(call.signals)

    def _normed(self, norm: str | None, x: Array) -> Array:
        """Input of a part: x, normalised unless norms come after alone."""
        return x if norm is None or self.norms == "after" else getattr(self, f"{norm}_norm")(x)

    def _normed_output(self, norm: str | None, y: Array) -> Array:
        """Output of a part: y, normalised if norms come after."""
        if norm is None or self.norms == "before":
            return y
        return getattr(self, f"{norm}_output_norm" if self.norms == "both" else f"{norm}_norm")(y)
