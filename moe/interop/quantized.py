"""Quantised weights of open checkpoints: FP8 with block scales, MXFP4 and packed INT4, read as floats.

A :class:`Form` describes how one tensor of floats is stored in tensors of codes and scales. It reads any part of the
tensor, and from the files only what that part needs. Values are those of Hugging Face transformers' own dequantisation,
bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors.numpy import load, save

from moe.config import ConfigError
from moe.dispatch.fake_quantized import INT4_STEP
from moe.interop.layout import Reader

FP8_MAX = 448.0
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_FP8, _E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
MXFP4_BLOCK, INT4_PER_WORD = 32, 8
_ROWS_AT_ONCE = 128

Index = tuple[int | slice, ...]
Bounds = tuple[int, int]


class Form(Protocol):
    """How one tensor of floats is stored in others."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor of floats."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors in the files."""
        ...

    def read(self, stored: Reader, index: Index, dtype: np.dtype[Any]) -> np.ndarray:
        """A part of the tensor of floats, in this type."""
        ...


def _bounds(index: Index, shape: tuple[int, ...]) -> tuple[Index, Bounds, Bounds]:
    """The index in the leading axes, and the bounds in the last two."""
    index = index or (slice(None),) * len(shape)
    rows, columns = (
        at.indices(size)[:2] for at, size in zip(index[-2:], shape[-2:], strict=True) if isinstance(at, slice)
    )
    return index[:-2], rows, columns


def _cover(bounds: Bounds, block: int) -> slice:
    """The blocks that hold these rows or columns."""
    return slice(bounds[0] // block, -(-bounds[1] // block))


@dataclasses.dataclass(frozen=True)
class FP8Blocks:
    """E4M3 codes and one scale for each block of rows and columns (DeepSeek-V3); blocks at the edges may be smaller.

    Attributes:
        name: of the tensor; its codes have the same name.
        scales: name of their tensor.
        shape: of the tensor: a matrix, or with a leading axis of experts.
        block: rows and columns of one scale.
        rounded_to_scales: the product is rounded to the type of the scales first, as compressed-tensors does.
    """

    name: str
    scales: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    rounded_to_scales: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """See :class:`Form`."""
        return self.name, self.scales

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape that the scales must have."""
        sizes = (-(-size // block) for size, block in zip(self.shape[-2:], self.block, strict=True))
        return *self.shape[:-2], *sizes

    def read(self, stored: Reader, index: Index, dtype: np.dtype[Any]) -> np.ndarray:
        """See :class:`Form`."""
        lead, rows, columns = _bounds(index, self.shape)
        codes = stored.read(self.name, (*lead, slice(*rows), slice(*columns)))
        if np.any((codes.view(np.uint8) & 0x7F) == 0x7F):
            raise ConfigError(f"{self.name}: holds NaN codes")
        if int(np.prod(self.scale_shape)) == 1:
            grid = stored.read(self.scales, ()).reshape((1,) * codes.ndim)
        else:
            blocks = (_cover(bounds, size) for bounds, size in zip((rows, columns), self.block, strict=True))
            grid = stored.read(self.scales, (*lead, *blocks))
        first = grid.dtype if self.rounded_to_scales else dtype
        values = decode_fp8(codes, _as_scales(grid, self.scales), self.block, (rows[0], columns[0]), first)
        return values.astype(dtype, copy=False)

    def write(self, tensor: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
        """Encode a tensor of floats as tensors of codes and scales.

        Args:
            tensor: [..., rows, columns].
            scales: of the blocks, kept where they reproduce a block exactly, or rounded to bfloat16; any other block
                gets its largest absolute value over 448 (1 if it is all zeros), rounded up to a power of two if scales
                are exponents.
        """
        kept, lead = scales.reshape(self.scale_shape), (slice(None),) * (len(self.shape) - 2)
        codes, grid = np.empty(self.shape, _FP8), np.empty(self.scale_shape, kept.dtype)
        for i, row in enumerate(range(0, self.shape[-2], self.block[0])):
            rows = slice(row, row + self.block[0])
            part = (*lead, rows)
            codes[part], grid[..., i, :] = self._encode_row(tensor[part], kept[..., i, :])
        return {self.name: codes, self.scales: grid.reshape(scales.shape)}

    def _encode_row(self, tensor: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of one row of blocks."""
        codes = encode_fp8(tensor, _as_scales(kept, self.scales), self.block[1])
        again = decode_fp8(codes, _as_scales(kept, self.scales)[..., None, :], self.block, (0, 0), tensor.dtype)
        starts = range(0, tensor.shape[-1], self.block[1])
        # Float32 parameters of a run that began with an import in bfloat16 are rounded to that.
        missed = (again != tensor) & (again.astype(ml_dtypes.bfloat16).astype(tensor.dtype) != tensor)
        differ = np.logical_or.reduceat(np.any(missed, axis=-2), starts, axis=-1)
        if not differ.any():
            return codes, kept
        largest = np.maximum.reduceat(np.abs(tensor.astype(np.float32)).max(axis=-2), starts, axis=-1)
        fresh = np.where(largest > 0, largest / FP8_MAX, 1.0).astype(np.float32)
        if kept.dtype in (_E8M0, np.dtype(np.uint8)):
            fresh = np.exp2(np.ceil(np.log2(fresh))).astype(_E8M0).view(kept.dtype)
        scales = np.where(differ, fresh.astype(kept.dtype), kept)
        return encode_fp8(tensor, _as_scales(scales, self.scales), self.block[1]), scales


def encode_fp8(tensor: np.ndarray, scales: np.ndarray, width: int) -> np.ndarray:
    """Codes of one row of blocks of this width: numbers over the scale of their block, rounded to nearest."""
    wide = np.repeat(scales, width, axis=-1)[..., None, : tensor.shape[-1]]
    quotients = np.zeros(tensor.shape, np.float32)
    with np.errstate(over="ignore"):  # in a block that gets another scale afterwards
        np.divide(tensor.astype(np.float32), wide, out=quotients, where=wide != 0)
    return np.clip(quotients, -FP8_MAX, FP8_MAX).astype(_FP8)


def pack_scales(scales: Mapping[str, np.ndarray]) -> bytes:
    """Serialise scales; types are stored as prefixes of the names, since safetensors does not support them all."""
    return save({f"{array.dtype}/{name}": array.view(f"u{array.itemsize}") for name, array in scales.items()})


def unpack_scales(content: bytes) -> dict[str, np.ndarray]:
    """The reverse of :func:`pack_scales`."""
    scales = {}
    for key, bits in load(content).items():
        kind, name = key.split("/", 1)
        scales[name] = bits.view(getattr(ml_dtypes, kind, None) or np.dtype(kind))
    return scales


def _as_scales(array: np.ndarray, name: str) -> np.ndarray:
    """Scales as float32; bytes are E8M0 exponents."""
    scales = (array.view(_E8M0) if array.dtype == np.uint8 else array).astype(np.float32)
    if not np.isfinite(scales).all():
        raise ConfigError(f"{name}: holds scales that are not finite")
    return scales


def decode_fp8(
    codes: np.ndarray, grid: np.ndarray, block: tuple[int, int], start: tuple[int, int], dtype: np.dtype[Any]
) -> np.ndarray:
    """Codes times scales, computed in float32 and rounded once, about 128 rows at a time.

    Args:
        codes: [..., rows, columns] of E4M3.
        grid: [..., R, C] scales of the blocks that the codes touch.
        block: rows and columns of a block.
        start: row and column of the first code, counted from the start of its tensor.
        dtype: of the result.
    """
    result = np.empty(codes.shape, dtype)
    rows, columns = codes.shape[-2:]
    row_offset, column_offset = start[0] % block[0], start[1] % block[1]
    height = max(_ROWS_AT_ONCE // block[0], 1)  # blocks
    for i in range(0, grid.shape[-2], height):
        first, last = i * block[0] - row_offset, (i + height) * block[0] - row_offset
        part = slice(max(first, 0), min(last, rows))
        wide = np.repeat(grid[..., i : i + height, :], block[1], axis=-1)[..., column_offset : column_offset + columns]
        if height > 1:
            wide = np.repeat(wide, block[0], axis=-2)[..., part.start - first : part.stop - first, :]
        with np.errstate(over="ignore"):
            result[..., part, :] = _e4m3_to_float32(codes[..., part, :]) * wide
    return result


def _e4m3_to_float32(codes: np.ndarray) -> np.ndarray:
    """Values of finite codes: their bits shifted to float32's layout, times 2^120 for the different exponent bias."""
    bits = codes.view(np.uint8).astype(np.uint32)
    shifted = (bits & 0x7F) << 20 | (bits & 0x80) << 24
    return shifted.view(np.float32) * np.float32(2.0**120)


@dataclasses.dataclass(frozen=True)
class MXFP4:
    """4-bit floats in blocks of 32 along the inputs, each block with an exponent of two (gpt-oss).

    In the files the outputs come before the inputs; the tensor itself is [E, inputs, outputs].

    Attributes:
        blocks: name of the codes [E, outputs, inputs / 32, 16], two to a byte, the first in the lower half.
        scales: name of the exponents plus 127, [E, outputs, inputs / 32].
        shape: of the tensor.
    """

    blocks: str
    scales: str
    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """See :class:`Form`."""
        return self.blocks, self.scales

    def read(self, stored: Reader, index: Index, dtype: np.dtype[Any]) -> np.ndarray:
        """See :class:`Form`."""
        lead, inputs, outputs = _bounds(index, self.shape)
        cover = _cover(inputs, MXFP4_BLOCK)
        codes = stored.read(self.blocks, (*lead, slice(*outputs), cover, slice(None)))
        exponents = stored.read(self.scales, (*lead, slice(*outputs), cover))
        if np.any(exponents == 0xFF):
            raise ConfigError(f"{self.scales}: holds NaN scales")
        values = np.empty((*codes.shape[:-1], MXFP4_BLOCK), np.float32)
        values[..., 0::2], values[..., 1::2] = FP4_VALUES[codes & 0xF], FP4_VALUES[codes >> 4]
        with np.errstate(over="ignore"):
            np.ldexp(values, exponents.astype(np.int32)[..., None] - 127, out=values)
        first = inputs[0] % MXFP4_BLOCK
        values = values.reshape(*values.shape[:-2], -1)[..., first : first + inputs[1] - inputs[0]]
        return values.swapaxes(-1, -2).astype(dtype)

    def write(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Encode a tensor of floats whose inputs are divisible by 32, as :mod:`moe.dispatch.fake_quantized` rounds it:
        with the exponent ⌊log2(largest)⌋ − 2 of a block (OCP Microscaling 1.0, section 6.3), ties to the even code."""
        outputs_first = np.ascontiguousarray(tensor.swapaxes(-1, -2), np.float32)
        blocks = outputs_first.reshape(*outputs_first.shape[:-1], -1, MXFP4_BLOCK)
        largest = np.abs(blocks).max(axis=-1)
        exponents = np.maximum((largest.view(np.int32) >> 23) - 2, 1)
        sizes = np.minimum(np.abs(np.ldexp(blocks, 127 - exponents[..., None])), FP4_VALUES[7])
        steps = np.select([sizes < 2, sizes < 4], [0.5, 1.0], 2.0).astype(np.float32)
        codes = np.searchsorted(FP4_VALUES[:8], np.round(sizes / steps) * steps) + 8 * np.signbit(blocks)
        codes = codes.astype(np.uint8)
        return {self.blocks: codes[..., 0::2] | codes[..., 1::2] << 4, self.scales: exponents.astype(np.uint8)}


@dataclasses.dataclass(frozen=True)
class PackedInt4:
    """Integers from -8 to 7, eight to a word along the columns, and a scale for each group of columns (Kimi-K2).

    The product with the scale is rounded to the scale's type, as compressed-tensors does.

    Attributes:
        packed: name of the words [rows, columns / 8], of values plus 8, the first in the lowest bits.
        scales: name of the scales [rows, columns / group].
        sizes: name of the tensor's shape, stored as a tensor.
        shape: of the tensor.
        group: columns of one scale.
    """

    packed: str
    scales: str
    sizes: str
    shape: tuple[int, ...]
    group: int

    @property
    def parts(self) -> tuple[str, ...]:
        """See :class:`Form`."""
        return self.packed, self.scales, self.sizes

    def read(self, stored: Reader, index: Index, dtype: np.dtype[Any]) -> np.ndarray:
        """See :class:`Form`."""
        sizes = tuple(int(size) for size in stored.read(self.sizes, ()))
        if sizes != self.shape:
            raise ConfigError(f"{self.sizes}: is {list(sizes)}, must be {list(self.shape)} as {self.scales} says")
        _, rows, columns = _bounds(index, self.shape)
        words = stored.read(self.packed, (slice(*rows), _cover(columns, INT4_PER_WORD)))
        octets = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
        values = np.empty((len(words), octets.shape[1] * 2), np.float32)
        values[:, 0::2], values[:, 1::2] = octets & 0xF, octets >> 4
        first = columns[0] % INT4_PER_WORD
        values = values[:, first : first + columns[1] - columns[0]] - 8
        scales = stored.read(self.scales, (slice(*rows), _cover(columns, self.group)))
        first = columns[0] % self.group
        values *= np.repeat(_as_scales(scales, self.scales), self.group, 1)[:, first : first + values.shape[1]]
        return values.astype(scales.dtype).astype(dtype)

    def write(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Encode a matrix of floats whose columns are divisible by the group and by 8, as
        :mod:`moe.dispatch.fake_quantized` rounds it: with bfloat16 scales of 2/15 of a group's largest number."""
        groups = tensor.astype(np.float32).reshape(len(tensor), -1, self.group)
        scales = (np.abs(groups).max(axis=-1) * INT4_STEP).astype(ml_dtypes.bfloat16)
        wide = scales.astype(np.float32)[..., None]
        integers = np.clip(np.round(groups / np.where(wide > 0, wide, 1)), -8, 7)
        octets = (integers + 8).astype(np.uint8).reshape(len(tensor), -1)
        pairs = np.ascontiguousarray(octets[:, 0::2] | octets[:, 1::2] << 4)
        return {self.packed: pairs.view("<i4"), self.scales: scales, self.sizes: np.array(self.shape, np.int32)}
