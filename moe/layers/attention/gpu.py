"""cuDNN's fused attention kernel, for NVIDIA GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo
from jaxtyping import Float

from moe.parallel import target


def runs_cudnn(query: Float[Array, "B T N H"], block_size: int, head_dim: int) -> bool:
    """Whether cuDNN's kernel takes blocks of so many queries: an NVIDIA GPU from Ampere on, bfloat16 (in float16 its
    mask value is a finite -32768), even lengths (for its gradient under a mask), and heads in multiples of 8, sinks
    included, up to 128 on Ampere and 256 from Hopper on."""
    capability = target.current().compute_capability
    return (
        capability >= 8
        and query.dtype == jnp.bfloat16
        and head_dim % 8 == 0
        and head_dim <= (256 if capability >= 9 else 128)
        and query.shape[1] % 2 == block_size % 2 == 0
    )


@contextlib.contextmanager
def checked_for_target() -> Iterator[None]:
    """Let JAX check the limits of cuDNN's kernel for the target of the program that is traced, for absent GPUs: it asks
    the default device, and without a GPU refuses heads above 128."""
    check = fused_attention_stablehlo.check_compute_capability

    def check_target(capability: str) -> bool:
        return target.current().compute_capability >= int(capability.partition(".")[0])

    fused_attention_stablehlo.check_compute_capability = check_target
    try:
        yield
    finally:
        fused_attention_stablehlo.check_compute_capability = check
