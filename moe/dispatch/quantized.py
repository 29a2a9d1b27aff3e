"""Products of quantised factors: int8 with sums in int32, or float8 (e4m3) with sums in float32, with a scale for each
vector or, as ``mxfp8``, for each block of 32 numbers.

The recipe is SwitchBack's (Wortsman et al. 2023, section 2.2): the forward product and the gradient of the rows have
quantised factors; the gradient of the matrices, a sum over all rows, does not. The scale of a vector along the
contracted axis is its largest absolute value divided by the type's (``absmax`` of qwix), so that no scale depends on
other rows, on other experts or, except for the shards of ``tensor``, on the mesh. Blocks are those of Microscaling (OCP
MX 1.0), their scale the least power of two with which no number exceeds e4m3's largest: rounded down, as the standard
says, training can diverge (Mishra et al. 2025, arXiv 2506.08027).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, custom_vjp, lax
from jaxtyping import Float

from moe.config import ConfigError
from moe.parallel import target
from moe.parallel.mesh import axis_of

#: Types of factors and of sums by the value of ``model.low_precision``.
TYPES: dict[str, tuple[Any, Any]] = {
    "int8": (jnp.int8, jnp.int32),
    "float8": (jnp.float8_e4m3fn, jnp.float32),
}

#: Numbers that share a scale in ``mxfp8``.
BLOCK = 32
_E4M3 = jnp.float8_e4m3fn
#: Largest value of e4m3.
_LARGEST = 448.0

#: Vectors without a larger number than this become zeros, as qwix's do.
_SMALLEST = 1e-17


def check_target(precision: str) -> None:
    """Refuse a precision that the hardware of the program being traced would not make faster.

    Raises:
        ConfigError: see above, or qwix is not installed.
    """
    where = f"model.low_precision={precision}"
    device = target.current()
    if precision not in device.low_precisions:
        if precision == "mxfp8":
            raise ConfigError(f"{where}: runs on CPUs only, for its numerics; no kernel here has scales of blocks")
        allowed = " or ".join([*device.low_precisions, "none"])
        raise ConfigError(f"{where}: must be {allowed} on {device.device_kind}, where {precision} is not faster")
    if precision == "mxfp8":  # rounded here, not by qwix
        return
    try:
        import qwix  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(f"{where} needs qwix: pip install qwix") from error


def quantize(
    array: Array, axis: int, precision: str, *, split_over: str | None = None, largest: Array | None = None
) -> tuple[Array, Array]:
    """Quantised numbers, and the float32 scale of each vector along an axis; scales have length 1 on that axis.

    Args:
        array: numbers.
        axis: axis of the vectors.
        precision: a value of ``model.low_precision`` other than ``none``.
        split_over: role of the mesh axis over which the vectors are split, within ``shard_map``; None: not split.
        largest: largest absolute value of each vector, if it is known.
    """
    import qwix  # noqa: PLC0415  # optional

    bound = jnp.max(jnp.abs(array), axis, keepdims=True) if largest is None else largest
    if split_over is not None:
        bound = lax.pmax(bound, axis_of(split_over))
    bound = bound.astype(jnp.float32)
    bound = jnp.where(bound < _SMALLEST, 1.0, bound)
    found = qwix.quantize(array / bound, TYPES[precision][0], calibration_method="fixed,-1,1")
    return found.qvalue, bound * found.scale


def round_blocks(array: Array, axis: int) -> Array:
    """float32 numbers rounded to e4m3 times the scale of their block along an axis; the last block may be shorter."""
    wide = jnp.moveaxis(array.astype(jnp.float32), axis, -1)
    size = wide.shape[-1]
    blocks = jnp.pad(wide, [(0, 0)] * (wide.ndim - 1) + [(0, -size % BLOCK)]).reshape(*wide.shape[:-1], -1, BLOCK)
    least = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / _LARGEST
    # The exponent of the next power of two, from the bits of a normal float32.
    bits = lax.bitcast_convert_type(least, jnp.int32)
    exponent = jnp.maximum((bits >> 23) + (bits & 0x7FFFFF > 0), 1)
    scale = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    values = jnp.clip(blocks / scale, -_LARGEST, _LARGEST).astype(_E4M3).astype(jnp.float32) * scale
    return jnp.moveaxis(values.reshape(*wide.shape[:-1], -1)[..., :size], -1, axis)


def pack(rows: Float[Array, "R D"], precision: str) -> Array:
    """Rows to send: as bytes [R,D+4] of quantised numbers and of each row's scale, or as they are for ``none``."""
    if precision == "none":
        return rows
    parts = (lax.bitcast_convert_type(part, jnp.uint8) for part in quantize(rows, -1, precision))
    return jnp.concatenate([part.reshape(rows.shape[0], -1) for part in parts], axis=-1)


def unpack(sent: Array, precision: str, dtype: Any) -> Float[Array, "R D"]:
    """Rows that :func:`pack` made, in the compute dtype."""
    if precision == "none":
        return sent
    numbers = lax.bitcast_convert_type(sent[:, :-4], TYPES[precision][0])
    scales = lax.bitcast_convert_type(sent[:, -4:], jnp.float32)
    return (numbers.astype(jnp.float32) * scales[:, None]).astype(dtype)


@functools.partial(custom_vjp, nondiff_argnums=(2,))
def matmul(rows: Array, matrices: Array, precision: str) -> Array:
    """Rows [*batch, ..., K] times matrices [*batch, K, N], as quantised factors."""
    return _product(rows, matrices, precision)


def matmul_in(precision: str, plain: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """:func:`matmul` of factors in this precision, or ``plain`` for ``none``."""
    return plain if precision == "none" else functools.partial(matmul, precision=precision)


def _product(rows: Array, matrices: Array, precision: str) -> Array:
    check_target(precision)
    batch = tuple(range(matrices.ndim - 2))
    contracted = (rows.ndim - 1,), (matrices.ndim - 2,)
    if precision == "mxfp8":
        sums = lax.dot_general(round_blocks(rows, -1), round_blocks(matrices, -2), (contracted, (batch, batch)))
        return sums.astype(rows.dtype)
    values, scales = quantize(rows, -1, precision)
    factors, factor_scales = quantize(matrices, -2, precision)
    device = target.current()
    exact = lax.Precision.HIGHEST if device.sums_float8_coarsely else None
    sums_dtype = TYPES[precision][1]
    if not device.has_low_precision_products:  # these sums are exact too, up to 1,000 terms of int8
        values = values.astype(jnp.float32)
        factors = factors.astype(jnp.float32)
        sums_dtype = jnp.float32
    sums = lax.dot_general(values, factors, (contracted, (batch, batch)), exact, preferred_element_type=sums_dtype)
    return (sums * scales * factor_scales).astype(rows.dtype)


def _matmul_fwd(rows: Array, matrices: Array, precision: str) -> tuple[Array, tuple[Array, Array]]:
    return matmul(rows, matrices, precision), (rows, matrices)


def _matmul_bwd(precision: str, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    rows, matrices = residuals
    d_rows = _product(gradient, matrices.swapaxes(-1, -2), precision)
    batch = tuple(range(matrices.ndim - 2))
    summed = tuple(range(len(batch), rows.ndim - 1))
    d_matrices = lax.dot_general(rows, gradient, ((summed, summed), (batch, batch)))
    return d_rows, d_matrices.astype(matrices.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)
