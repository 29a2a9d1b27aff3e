"""``quantization_config`` of a ``config.json``: which quantised weights are read, and which tensors hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from moe.config import ConfigError
from moe.interop.quantized import INT4_PER_WORD, MXFP4, MXFP4_BLOCK, Form, FP8Blocks, PackedInt4
from moe.interop.schema import Count, Fields
from moe.system.foreign_files import Json, check

#: Endings of tensors that only quantised activations need.
ACTIVATION_SCALES = (".activation_scale", ".input_scale")
#: Name of a tensor in the files → (shape, type as safetensors names it).
Headers = Mapping[str, tuple[tuple[int, ...], str]]


class FP8Config(Fields):
    """``quantization_config`` of DeepSeek-V3, Qwen3-FP8 and MiniMax; no block size: one scale for a whole tensor."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3", "float8_e4m3fn"] = "e4m3"
    weight_block_size: Annotated[list[Count], pydantic.Field(min_length=2, max_length=2)] | None = None
    expert_dtype: Literal["fp8"] = "fp8"

    def form(self, name: str, shape: tuple[int, ...]) -> FP8Blocks:
        """The form of a tensor of this shape."""
        rows, columns = self.weight_block_size or shape[-2:]
        return FP8Blocks(name, f"{name}_scale_inv", shape, (rows, columns))

    def forms(self, headers: Headers) -> dict[str, Form]:
        """Name of each quantised tensor → its form. Raises ConfigError for codes without scales, and the reverse."""
        return _fp8_forms(headers, self.form, "_scale_inv")


def _fp8_forms(headers: Headers, form_of: Callable[[str, tuple[int, ...]], FP8Blocks], ending: str) -> dict[str, Form]:
    """Forms of all tensors of E4M3 codes, whose scales have the tensor's name plus this ending."""
    forms: dict[str, Form] = {}
    for name, (shape, kind) in headers.items():
        if kind != "F8_E4M3":
            continue
        scales = f"{name}{ending}"
        if scales not in headers:
            raise ConfigError(f"{name}: is FP8, and {scales} is missing")
        if len(shape) not in (2, 3):
            raise ConfigError(f"{name}: is FP8 of shape {list(shape)}, must be a matrix or one for each expert")
        form = form_of(name, shape)
        _expect_shape(headers, scales, form.scale_shape, f"{name} {list(shape)} in blocks of {list(form.block)}")
        _expect_type(headers, scales, "F32", "BF16", "F16", "F8_E8M0", "U8")
        forms[name] = form
    orphans = [name for name in headers if name.endswith(f"weight{ending}") and name[: -len(ending)] not in forms]
    if orphans:
        raise ConfigError(f"{orphans[0]}: scales of {orphans[0][: -len(ending)]}, which is not FP8")
    return forms


class MXFP4Config(Fields):
    """``quantization_config`` of gpt-oss."""

    quant_method: Literal["mxfp4"]

    def forms(self, headers: Headers) -> dict[str, Form]:
        """See :meth:`FP8Config.forms`."""
        forms: dict[str, Form] = {}
        for blocks, (shape, _) in headers.items():
            name = blocks.removesuffix("_blocks")
            if name == blocks:
                continue
            scales = f"{name}_scales"
            if len(shape) != 4 or shape[-1] != MXFP4_BLOCK // 2:
                raise ConfigError(f"{blocks}: has shape {list(shape)}, must be [experts, outputs, inputs / 32, 16]")
            _expect_shape(headers, scales, shape[:-1], f"{blocks} {list(shape)}")
            _expect_type(headers, blocks, "U8")
            _expect_type(headers, scales, "U8")
            forms[name] = MXFP4(blocks, scales, (shape[0], shape[2] * MXFP4_BLOCK, shape[1]))
        return forms


class _Int4(Fields):
    num_bits: Literal[4]
    type: Literal["int"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["group"]
    group_size: Count
    actorder: Literal["weight", "static", False] | None = None  # "group" has columns in another order


class _Float8(Fields):
    num_bits: Literal[8]
    type: Literal["float"]
    symmetric: Literal[True] = True
    strategy: Literal["channel", "tensor", "block"]
    block_structure: Annotated[list[Count], pydantic.Field(min_length=2, max_length=2)] | None = None

    def form(self, name: str, shape: tuple[int, ...]) -> FP8Blocks:
        """See :meth:`FP8Config.form`; compressed-tensors does not round the products of experts twice."""
        whole = {"channel": (1, shape[-1]), "tensor": shape[-2:], "block": self.block_structure or (128, 128)}
        rows, columns = whole[self.strategy]
        return FP8Blocks(name, f"{name}_scale", shape, (rows, columns), ".experts." not in name)


#: Field for changes of the weights beyond codes and scales; must be empty.
_Nothing = Annotated[dict[str, Any], pydantic.Field(max_length=0)] | None


class _Compressed(Fields):
    quant_method: Literal["compressed-tensors"]
    transform_config: _Nothing = None
    sparsity_config: _Nothing = None


class _IntGroup(Fields):
    weights: _Int4


class _FloatGroup(Fields):
    weights: _Float8


class FloatConfig(_Compressed):
    """``quantization_config`` of compressed-tensors for FP8 with a scale for each output, tensor or block (GLM-4.5)."""

    format: Literal["float-quantized"]
    config_groups: Annotated[dict[str, _FloatGroup], pydantic.Field(min_length=1, max_length=1)]

    def forms(self, headers: Headers) -> dict[str, Form]:
        """See :meth:`FP8Config.forms`."""
        weights = next(iter(self.config_groups.values())).weights
        return _fp8_forms(headers, weights.form, "_scale")


class PackedConfig(_Compressed):
    """``quantization_config`` of compressed-tensors for INT4 in groups (Kimi-K2-Thinking)."""

    format: Literal["pack-quantized"]
    config_groups: Annotated[dict[str, _IntGroup], pydantic.Field(min_length=1)]

    @pydantic.model_validator(mode="after")
    def _one_group_size(self) -> PackedConfig:
        sizes = sorted({group.weights.group_size for group in self.config_groups.values()})
        if len(sizes) > 1:
            raise ValueError(f"config_groups have group_size {sizes}, must have one for all groups")
        return self

    def forms(self, headers: Headers) -> dict[str, Form]:
        """See :meth:`FP8Config.forms`."""
        group = next(iter(self.config_groups.values())).weights.group_size
        forms: dict[str, Form] = {}
        for packed, (shape, _) in headers.items():
            name = packed.removesuffix("_packed")
            if name == packed:
                continue
            scales, sizes = f"{name}_scale", f"{name}_shape"
            for suffix in ("_zero_point", "_g_idx"):
                if f"{name}{suffix}" in headers:
                    raise ConfigError(f"{name}{suffix}: is not read; quantization_config says symmetric, in order")
            if len(shape) != 2 or scales not in headers or len(headers[scales][0]) != 2:
                raise ConfigError(f"{packed}: needs {scales}, and both must have two axes")
            rows, groups = headers[scales][0]
            columns = groups * group
            wanted = (rows, -(-columns // INT4_PER_WORD))
            _expect_shape(headers, packed, wanted, f"{scales} {[rows, groups]} in groups of {group}")
            _expect_shape(headers, sizes, (2,), packed)
            _expect_type(headers, packed, "I32")
            _expect_type(headers, scales, "BF16", "F16", "F32")
            _expect_type(headers, sizes, "I64", "I32")
            forms[name] = PackedInt4(packed, scales, sizes, (rows, columns), group)
        return forms


def _expect_shape(headers: Headers, name: str, shape: tuple[int, ...], reason: str) -> None:
    if name not in headers:
        raise ConfigError(f"{name}: is missing, but needed for {reason}")
    found = headers[name][0]
    single = int(np.prod(shape)) == 1 and int(np.prod(found)) == 1
    if found != shape and not single:
        raise ConfigError(f"{name}: has shape {list(found)}, must be {list(shape)} for {reason}")


def _expect_type(headers: Headers, name: str, *kinds: str) -> None:
    if headers[name][1] not in kinds:
        raise ConfigError(f"{name}: is {headers[name][1]}, must be {' or '.join(kinds)}")


Quantization = FP8Config | MXFP4Config | FloatConfig | PackedConfig
_METHODS: dict[str, type[FP8Config] | type[MXFP4Config] | type[FloatConfig] | type[PackedConfig]] = {
    "fp8": FP8Config,
    "mxfp4": MXFP4Config,
    "compressed-tensors": PackedConfig,
}


def read_quantization(source: Json) -> Quantization | None:
    """The quantisation of a ``config.json``; None: its weights are floats.

    Raises:
        ConfigError: a method, or a setting of one, that is not supported.
    """
    fields = source.get("quantization_config")
    if not fields:
        return None
    method = fields.get("quant_method") if isinstance(fields, dict) else fields
    if not isinstance(method, str) or method not in _METHODS:
        raise ConfigError(
            f"config.json: quantization_config: quant_method={method!r}: must be one of {', '.join(_METHODS)}: "
            "save other formats dequantised"
        )
    schema = _METHODS[method]
    if schema is PackedConfig:
        kinds = {"pack-quantized": PackedConfig, "float-quantized": FloatConfig}
        if not isinstance(fields.get("format"), str) or fields["format"] not in kinds:
            raise ConfigError(
                f"config.json: quantization_config: format={fields.get('format')!r}: must be one of {', '.join(kinds)}"
            )
        schema = kinds[fields["format"]]
    return check(fields, pydantic.TypeAdapter(schema), "config.json: quantization_config")
