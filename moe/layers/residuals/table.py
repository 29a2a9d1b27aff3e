"""Residual streams by name."""

from __future__ import annotations

from typing import NamedTuple

from moe.config import ModelConfig
from moe.layers.residuals.add import Add
from moe.layers.residuals.interface import Residual, Stream


class Kind(NamedTuple):
    """A kind of residual stream.

    Attributes:
        stream: class of its ends.
        residual: class of the rule of each part.
    """

    stream: type[Stream]
    residual: type[Residual]


def residual_kind(config: ModelConfig) -> Kind:
    """Kind of a model's residual streams."""
    del config
    return Kind(Stream, Add)
