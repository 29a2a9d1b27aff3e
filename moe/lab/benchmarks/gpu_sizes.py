"""Sizes of the measurements on a GPU."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of all measurements: T tokens, D, F, E, N heads of H, and those of the train step's model."""

    tokens: int = 4096
    d_model: int = 4096
    d_ff: int = 14336
    experts: int = 8
    heads: int = 32
    head_dim: int = 128
    rows: int = 4  # of the attention and the train step
    model_dim: int = 1024
    model_ff: int = 3584
    vocab_size: int = 32000
    dtype: str = "bfloat16"
    side: int = 8192  # of the square matmul with whose rate the others are compared
