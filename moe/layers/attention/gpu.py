"""cuDNN's fused attention kernel, for NVIDIA GPUs."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe.parallel import target


def runs_cudnn(query: Float[Array, "B T N H"], block_size: int) -> bool:
    """Whether cuDNN's kernel takes blocks of so many queries: an NVIDIA GPU from Ampere on, bfloat16 (in float16 its
    mask value is a finite -32768), H a multiple of 8 up to 128, even lengths (for its gradient under a mask)."""
    return (
        target.current().compute_capability >= 8
        and query.dtype == jnp.bfloat16
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 128
        and query.shape[1] % 2 == block_size % 2 == 0
    )
