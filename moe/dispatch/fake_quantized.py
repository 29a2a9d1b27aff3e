"""Expert matrices rounded to 4 bits in the forward pass, with the gradient of the matrices as they are stored.

Training with rounded weights and a straight-through gradient (Jacob et al. 2018, section 3) is how gpt-oss (2025) and
Kimi K2 Thinking (2025) fit their experts to 4 bits. The values are those that an export in the same form holds:
:class:`moe.interop.quantized.MXFP4` and :class:`moe.interop.quantized.PackedInt4` encode a matrix as it is rounded
here, and decode it to the same numbers, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

#: Inputs of one output that share a scale (OCP Microscaling 1.0, section 5.2; Kimi K2's groups).
BLOCK = 32
#: Largest exponent of E2M1: its values are up to 1.5·2².
_LARGEST_EXPONENT = 2
#: Step of integers from −8 to 7 over the largest absolute value of a group: its range over their 15 steps.
INT4_STEP = np.float32(2 / 15)


def _mxfp4(blocks: Float[Array, "*batch 32 outputs"]) -> Float[Array, "*batch 32 outputs"]:
    """E2M1 times a power of two, 2^(⌊log2(largest)⌋ − 2) (OCP Microscaling 1.0, section 6.3), ties to the even code."""
    largest = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    exponent = jnp.maximum((bits >> 23) - _LARGEST_EXPONENT, 1)  # of a normal number, with float32's bias
    scale = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    quotients = blocks / scale
    size = jnp.minimum(jnp.abs(quotients), 6.0)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    return jnp.copysign(jnp.round(size / step) * step, quotients) * scale


def _int4(blocks: Float[Array, "*batch 32 outputs"]) -> Float[Array, "*batch 32 outputs"]:
    """Integers from −8 to 7 times a bfloat16 scale, rounded to bfloat16 (compressed-tensors, symmetric, in groups)."""
    largest = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    scale = (largest * INT4_STEP).astype(jnp.bfloat16).astype(jnp.float32)
    quotients = blocks / jnp.where(scale > 0, scale, 1.0)
    integers = jnp.clip(jnp.round(quotients), -8, 7).astype(jnp.int8)  # which have no −0
    return (integers * scale).astype(jnp.bfloat16).astype(jnp.float32)


#: Rounding of blocks by the value of ``model.fake_quantize``.
ROUNDINGS: Mapping[str, Callable[[Array], Array]] = {"mxfp4": _mxfp4, "int4": _int4}


@jax.custom_jvp
def _straight_through(stored: Array, rounded: Array) -> Array:
    """``rounded``, with the gradient of ``stored``."""
    del stored
    return rounded


@_straight_through.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[1], tangents[0]


def fake_quantize(matrices: Float[Array, "E inputs outputs"], form: str) -> Float[Array, "E inputs outputs"]:
    """Round float32 matrices in blocks of 32 inputs, with a straight-through gradient.

    Args:
        matrices: inputs are divisible by 32, which a config checks.
        form: a key of :data:`ROUNDINGS`.
    """
    stopped = jax.lax.stop_gradient(matrices)
    blocks = stopped.reshape(len(matrices), -1, BLOCK, matrices.shape[-1])
    return _straight_through(matrices, ROUNDINGS[form](blocks).reshape(matrices.shape))


@functools.cache
def rounding(form: str) -> Callable[[Array], Array] | None:
    """:func:`fake_quantize` in the form of ``model.fake_quantize``; None for none. The same object for equal forms, as
    modules that hold it are compared."""
    return None if form == "none" else functools.partial(fake_quantize, form=form)
