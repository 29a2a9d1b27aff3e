"""Quantised checkpoints: FP8 with block scales, MXFP4 and packed INT4, read as floats; FP8 written back.

tests/data/checkpoints/*_fp8, *_mxfp4 and *_int4 were made from random models; their outputs are those of Hugging Face
transformers for the weights as that library dequantises them, in float32.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from moe.config import ConfigError
from moe.dispatch.fake_quantized import fake_quantize
from moe.interop import export_checkpoint, import_checkpoint, load_huggingface
from moe.interop.quantization_config import read_quantization
from moe.interop.quantized import MXFP4, FP8Blocks, PackedInt4, pack_scales, unpack_scales
from moe.interop.tensor_files import StoredTensors
from moe.layers.moe_layer import MoELayer
from tests.helpers import slow_case, tiny_model
from tests.interop.test_interop import HERE, check_parity

FP8, BF16, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu
FLOAT32 = np.dtype(np.float32)
PATHS = [HERE / name for name in ("deepseek_v3_fp8", "gpt_oss_mxfp4", "kimi_k2_int4")]


class Arrays(dict[str, np.ndarray]):
    """In-memory source of tensors, which counts the elements that are read."""

    count = 0

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        part = self[name][index]
        self.count += part.size
        return part.copy()


def _folder(path: Path) -> dict[str, np.ndarray]:
    stored = StoredTensors()
    stored.add_file(path / "model.safetensors")
    return {name: stored.read(name, ()) for name in stored.headers}


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in PATHS])
def test_parity(path):
    check_parity(path)


# --- By hand ---------------------------------------------------------------------------------------------------------
def test_fp8_blocks_by_hand():
    """3 x 3 in blocks of 2 x 2: the last row and column have blocks of their own."""
    # E4M3: 0x38 is 1 (exponent 7 - 7), 0x44 is 2^1 · 1.5 = 3, 0xB8 is -1, 0x01 is 2^-9, 0x7E is 2^8 · 1.75 = 448
    codes = np.array([[0x38, 0x44, 0x7E], [0xB8, 0x01, 0x38], [0x44, 0x38, 0x38]], np.uint8).view(FP8)
    arrays = Arrays({"w": codes, "s": np.array([[2.0, 0.5], [10.0, -3.0]], np.float32)})
    form = FP8Blocks("w", "s", (3, 3), (2, 2))
    want = [[2, 6, 224], [-2, 2 * 2**-9, 0.5], [30, 10, -3]]
    np.testing.assert_array_equal(form.read(arrays, (), FLOAT32), want)


def test_every_code_of_fp8():
    codes = np.arange(256, dtype=np.uint8).view(FP8)
    codes = codes[np.isfinite(codes.astype(np.float32))].reshape(1, 254)
    form = FP8Blocks("w", "s", (1, 254), (128, 128))
    ours = form.read(Arrays({"w": codes, "s": np.ones((1, 2), np.float32)}), (), FLOAT32)
    assert ours.tobytes() == codes.astype(np.float32).tobytes()  # the sign of zero too


def test_the_product_is_rounded_once():
    """1.125 · (1 + 2^-8) = 144.5625 · 2^-7 rounds to 145 · 2^-7; a scale rounded first would give 144 · 2^-7."""
    arrays = Arrays({"w": np.full((1, 1), 1.125).astype(FP8), "s": np.full((1, 1), 1 + 2**-8, np.float32)})
    got = FP8Blocks("w", "s", (1, 1), (128, 128)).read(arrays, (), np.dtype(BF16))
    assert float(got[0, 0]) == 145 * 2**-7


def test_compressed_tensors_rounds_products_to_the_type_of_the_scales():
    """A bfloat16 scale per row: 1.125 · (1 + 2^-7) = 145.125 · 2^-7 becomes 145 · 2^-7, except in experts."""
    arrays = Arrays({"w": np.full((2, 3), 1.125).astype(FP8), "s": np.array([[1 + 2**-7], [2]]).astype(BF16)})
    for rounded, first in ((True, 145 * 2**-7), (False, 145.125 * 2**-7)):
        got = FP8Blocks("w", "s", (2, 3), (1, 3), rounded).read(arrays, (), FLOAT32)
        np.testing.assert_array_equal(got, [[first] * 3, [2.25] * 3])


def test_forms_of_compressed_tensors_in_fp8():
    headers = {name: ((8, 6), "F8_E4M3") for name in ("a.weight", "a.experts.0.weight")}
    for strategy, shape, block in (("channel", (8, 1), (1, 6)), ("tensor", (1,), (8, 6)), ("block", (2, 2), (4, 3))):
        weights = {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": [4, 3]}
        fields = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"g": {"weights": weights}},
        }
        quantization = read_quantization({"quantization_config": fields})
        assert quantization is not None
        forms = quantization.forms(headers | {f"{name}_scale": (shape, "BF16") for name in headers})
        assert forms["a.weight"] == FP8Blocks("a.weight", "a.weight_scale", (8, 6), block, True)
        assert not forms["a.experts.0.weight"].rounded_to_scales


@pytest.mark.parametrize("kind", [E8M0, np.uint8])
def test_exponents_as_scales(kind):
    """Bytes are exponents of two plus 127: 124 is an eighth."""
    arrays = Arrays({"w": np.full((1, 1), 3).astype(FP8), "s": np.full((1, 1), 124, np.uint8).view(kind)})
    assert FP8Blocks("w", "s", (1, 1), (128, 128)).read(arrays, (), FLOAT32)[0, 0] == 3 / 8


def test_mxfp4_by_hand():
    """E = 1, two outputs, 32 inputs, low half of a byte first. Code 1 is 0.5, 7 is 6, 10 is -1; scale 128 is 2."""
    blocks = np.zeros((1, 2, 1, 16), np.uint8)
    blocks[0, 0, 0, 0], blocks[0, 1, 0, 15] = 0x71, 0xA1
    arrays = Arrays({"b": blocks, "s": np.array([[[128], [126]]], np.uint8)})
    got = MXFP4("b", "s", (1, 32, 2)).read(arrays, (), FLOAT32)
    want = np.zeros((1, 32, 2))
    want[0, 0, 0], want[0, 1, 0] = 0.5 * 2, 6 * 2
    want[0, 30, 1], want[0, 31, 1] = 0.5 / 2, -1 / 2
    np.testing.assert_array_equal(got, want)


def test_int4_by_hand():
    """Eight values, each plus 8, in a word, the first in the lowest bits; one bfloat16 scale for four columns."""
    values = [-8, -1, 0, 7, 1, 2, 3, -3]
    word = sum((value + 8) << 4 * i for i, value in enumerate(values))
    arrays = Arrays(
        {
            "p": np.array([[word]], np.uint32).view(np.int32),
            "s": np.array([[0.5, 1 + 2**-7]]).astype(BF16),
            "n": np.array([1, 8]),
        }
    )
    form = PackedInt4("p", "s", "n", (1, 8), 4)
    # 3 · (1 + 2^-7) = 193.5 · 2^-6 lies halfway between two bfloat16 numbers and is rounded to the even one.
    want = [-4, -0.5, 0, 3.5, 1 + 2**-7, 2 + 2**-6, 194 * 2**-6, -194 * 2**-6]
    np.testing.assert_array_equal(form.read(arrays, (), FLOAT32)[0], want)
    arrays["n"] = np.array([8, 1])
    with pytest.raises(ConfigError, match=r"n: is \[8, 1\], must be \[1, 8\] as s says"):
        form.read(arrays, (), FLOAT32)


def test_rounding_to_4_bits_by_hand():
    """Largest 5: exponent ⌊log2 5⌋ − 2 = 0, values 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code. Largest 15: a
    scale of 15·2/15 = 2, integers from −8 to 7, ties to even."""
    numbers = np.zeros((1, 32, 2), np.float32)
    numbers[0, :7, 0] = [5, 0.75, -2.5, 0.2, 3.4, -0.25, 1.75]
    numbers[0, :5, 1] = np.array([5, 0.75, -2.5, 0.2, 3.4]) * 2**-9
    got = np.asarray(fake_quantize(jnp.asarray(numbers), "mxfp4"))
    np.testing.assert_array_equal(got[0, :7, 0], [4, 1, -2, 0, 3, 0, 2])
    np.testing.assert_array_equal(got[0, :5, 1], np.array([4, 1, -2, 0, 3]) * 2**-9)
    numbers[0, :6, 0] = [15, -15, 3, 1, -5, 0]
    got = np.asarray(fake_quantize(jnp.asarray(numbers), "int4"))
    np.testing.assert_array_equal(got[0, :7, 0], [14, -16, 4, 0, -4, 0, 2])
    for fields, message in (
        ({"moe_d_ff": 40}, r"needs model\.moe\.d_ff=40 divisible by 32"),
        ({"moe_d_ff": 32, "d_model": 40}, r"needs model\.d_model=40 divisible by 32"),
        ({"gate": "none"}, "must be none without experts"),
    ):
        with pytest.raises(ConfigError, match=f"model.fake_quantize='int4': {message}"):
            tiny_model(fake_quantize="int4", **fields)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("mxfp4", "dropless"), slow_case("int4", "gather"), *(slow_case(kind, "einsum") for kind in ("mxfp4", "int4"))],
)
def test_experts_trained_for_4_bits_compute_what_their_packed_export_does(kind, mode, rng):
    """Bit for bit in y and in gradients: of a layer that rounds, and of one with the weights that were packed and read
    back."""
    config = tiny_model(d_model=32, moe_d_ff=64, fake_quantize=kind)
    experts = {name: rng.normal(size=(4, *shape)).astype(np.float32) for name, shape in _SHAPES.items()}
    experts["up"][0, :32, 0] = 0  # a block of zeros
    packed = {name: _packed_and_read(kind, array) for name, array in experts.items()}
    assert all((packed[name] != experts[name]).mean() > 0.9 for name in experts)
    x, cotangent = rng.normal(size=(2, 2, 6, 32)).astype(np.float32)
    results = []
    for form, matrices in ((kind, experts), ("none", packed)):
        moe = config.moe.with_dispatch(mode)
        layer = MoELayer(dataclasses.replace(config, fake_quantize=form, moe=moe), rngs=nnx.Rngs(0))
        for name, matrix in matrices.items():
            getattr(layer.experts, name)[...] = jnp.asarray(matrix)
        graphdef, parameters = nnx.split(layer)

        def loss(parameters, x, graphdef=graphdef):
            y = nnx.merge(graphdef, parameters)(x)[0]
            return jnp.sum(y * cotangent), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(parameters, jnp.asarray(x))
        results.append((y, gradients))
    jax.tree.map(np.testing.assert_array_equal, *results)


#: [inputs, outputs] of an expert of 64 hidden units at D = 32.
_SHAPES = {"up": (32, 64), "gate": (32, 64), "down": (64, 32)}


def _packed_and_read(kind: str, array: np.ndarray) -> np.ndarray:
    """Experts [E, inputs, outputs] as tensors of codes and scales hold them."""
    if kind == "mxfp4":
        form = MXFP4("b", "s", array.shape)
        return form.read(Arrays(form.write(array)), (), FLOAT32)
    forms = [PackedInt4("p", "s", "n", matrix.T.shape, 32) for matrix in array]
    read = [form.read(Arrays(form.write(matrix.T)), (), FLOAT32) for form, matrix in zip(forms, array, strict=True)]
    return np.stack([matrix.T for matrix in read])


def _random_forms(rng) -> list[tuple[Any, Arrays]]:
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    codes = rng.choice(finite, (3, 50, 70)).view(FP8)
    fp8 = {"w": codes, "s": rng.normal(size=(3, 4, 5)).astype(np.float32)}
    mxfp4 = {"b": rng.integers(0, 256, (3, 20, 4, 16), np.uint8), "s": rng.integers(100, 140, (3, 20, 4), np.uint8)}
    int4 = {
        "p": rng.integers(-(2**31), 2**31, (40, 12), np.int32),
        "s": rng.normal(size=(40, 3)).astype(BF16),
        "n": np.array([40, 96], np.int32),
    }
    return [
        (FP8Blocks("w", "s", (3, 50, 70), (16, 16)), Arrays(fp8)),
        (MXFP4("b", "s", (3, 128, 20)), Arrays(mxfp4)),
        (PackedInt4("p", "s", "n", (40, 96), 32), Arrays(int4)),
    ]


def test_parts_are_slices_of_the_whole_and_read_no_more_than_their_blocks(rng):
    for form, arrays in _random_forms(rng):
        whole = form.read(arrays, (), FLOAT32)
        assert whole.shape == form.shape
        for _ in range(20):
            bounds = [sorted(int(at) for at in rng.choice(size + 1, 2, replace=False)) for size in form.shape[-2:]]
            index = (*(1,) * (len(form.shape) - 2), *(slice(*pair) for pair in bounds))
            arrays.count = 0
            np.testing.assert_array_equal(form.read(arrays, index, FLOAT32), whole[index])
            rows, columns = (stop - start for start, stop in bounds)
            # Codes of the slice, up to a block more on either side, and a scale for each block that it touches.
            assert arrays.count <= 2 * (rows + 32) * (columns + 64) // 2 + 2


# --- FP8 exports -----------------------------------------------------------------------------------------------------
def _bytes(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[str, bytes]]:
    return {name: (f"{tensor.dtype}{tensor.shape}", tensor.tobytes()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", slow_case("bfloat16")])
def test_fp8_round_trip_is_bit_identical(dtype, tmp_path):
    source = PATHS[0]
    import_checkpoint(source, tmp_path / "run", dtype=dtype)
    export_checkpoint(tmp_path / "run", tmp_path / "fp8", quantized=True)
    assert _bytes(_folder(tmp_path / "fp8")) == _bytes(_folder(source))
    original = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "fp8" / "config.json").read_text()) == original

    export_checkpoint(tmp_path / "run", tmp_path / "floats")
    written = json.loads((tmp_path / "floats" / "config.json").read_text())
    assert written.keys() == original.keys() - {"quantization_config"}
    kinds = {str(tensor.dtype) for name, tensor in _folder(tmp_path / "floats").items() if "proj" in name}
    assert kinds == {dtype}
    if dtype == "float32":
        again, model = (load_huggingface(path)[0] for path in (tmp_path / "floats", source))
        jax.tree.map(np.testing.assert_array_equal, again, model)


@pytest.mark.parametrize("kind", [np.float32, E8M0])
def test_a_block_that_changed_gets_a_scale_of_its_own(kind, rng):
    """It is the largest magnitude over 448, rounded up if scales are powers of two; other blocks keep theirs."""
    form = FP8Blocks("w", "s", (3, 5), (2, 2))
    codes = rng.integers(0, 126, (3, 5), np.uint8).view(FP8)
    scales = np.exp2(rng.integers(-4, 4, (2, 3))).astype(kind)
    weights = form.read(Arrays({"w": codes, "s": scales}), (), FLOAT32)
    same = form.write(weights, scales)
    assert _bytes(same) == _bytes({"w": codes, "s": scales})
    weights[2, 0], weights[2, 1] = 1000.0, 0.0
    changed = form.write(weights, scales)
    difference = changed["s"].astype(np.float32) != scales.astype(np.float32)
    assert difference.tolist() == [[False] * 3, [True, False, False]]
    assert float(changed["s"][1, 0]) == pytest.approx(4.0 if kind is E8M0 else 1000 / 448)
    assert float(form.read(Arrays(changed), (), FLOAT32)[2, 0]) == pytest.approx(1000, rel=2**-4)


def test_weights_that_were_read_in_bfloat16_keep_codes_and_scales_in_float32(rng):
    """A run trains float32 parameters, of which those of frozen experts are still the import's."""
    form = FP8Blocks("w", "s", (4, 6), (2, 2))
    codes, scales = rng.integers(1, 126, (4, 6), np.uint8).view(FP8), rng.uniform(0.1, 2, (2, 3)).astype(np.float32)
    stored = {"w": codes, "s": scales}
    weights = form.read(Arrays(stored), (), np.dtype(BF16)).astype(np.float32)
    assert (weights != form.read(Arrays(stored), (), FLOAT32)).any()
    assert _bytes(form.write(weights, scales)) == _bytes(stored)
    weights[0, 0] += 2.0**-12 * weights[0, 0]
    difference = form.write(weights, scales)["s"] != scales
    assert difference.tolist() == [[True, False, False], [False] * 3]


def test_scales_survive_packing():
    scales = {"a": np.ones((2, 1), np.float32), "b": np.arange(3, dtype=np.uint8).view(E8M0), "c": np.ones(1, BF16)}
    assert _bytes(unpack_scales(pack_scales(scales))) == _bytes(scales)


def test_fp8_is_refused_where_the_import_had_none(tmp_path):
    import_checkpoint(HERE / "mistral", tmp_path / "plain")
    with pytest.raises(ConfigError, match="must be False for a model that was not imported in FP8"):
        export_checkpoint(tmp_path / "plain", tmp_path / "out", quantized=True)
    import_checkpoint(PATHS[0], tmp_path / "run")
    with pytest.raises(ConfigError, match="of the import is not a tensor of deepseek_v3 in this layout"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", quantized=True, fused=True)
    assert not (tmp_path / "out").exists()


# --- Refusals --------------------------------------------------------------------------------------------------------
_UP = "model.layers.1.mlp.experts.0.up_proj.weight"
_BLOCKS, _SCALES = (f"model.layers.0.mlp.experts.down_proj_{name}" for name in ("blocks", "scales"))


def _replaced(name: str, change: Any) -> Any:
    def apply(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        del config
        tensors[name] = change(tensors[name])

    return apply


def _dropped(name: str) -> Any:
    return lambda tensors, config: tensors.pop(name)


def _added(name: str) -> Any:
    return lambda tensors, config: tensors.update({name: np.zeros((4, 2), np.int32)})


def _configured(**fields: Any) -> Any:
    return lambda tensors, config: config["quantization_config"].update(fields)


def _with(array: np.ndarray, value: Any) -> np.ndarray:
    array.reshape(-1)[:1] = value
    return array


_INT4_WEIGHTS = {"num_bits": 4, "strategy": "group", "group_size": 32}
REFUSED = [
    (0, _dropped(f"{_UP}_scale_inv"), rf"{_UP}: is FP8, and {_UP}_scale_inv is missing"),
    (
        0,
        _replaced(f"{_UP}_scale_inv", lambda a: a[:1]),
        r"has shape \[1, 2\], must be \[2, 2\] for .*blocks of \[16, 16\]",
    ),
    (0, _replaced(f"{_UP}_scale_inv", lambda a: a.astype(np.int32)), r"is I32, must be F32 or BF16"),
    (0, _replaced(_UP, lambda a: a.astype(np.float32)), rf"{_UP}_scale_inv: scales of {_UP}, which is not FP8"),
    (0, _replaced(_UP, lambda a: _with(a, np.nan)), r"holds NaN codes"),
    (0, _replaced(f"{_UP}_scale_inv", lambda a: _with(a, np.inf)), r"holds scales that are not finite"),
    (0, _configured(weight_block_size=[16]), r"quantization_config: weight_block_size=\[16\]"),
    (0, _configured(fmt="e5m2"), r"quantization_config: fmt='e5m2': must be 'e4m3'"),
    (0, _configured(quant_method="gptq"), r"quant_method='gptq': must be one of fp8, mxfp4, compressed-tensors"),
    (0, lambda tensors, config: config.pop("quantization_config"), r"weight: is F8_E4M3; only F32, F16, BF16 are"),
    (1, _dropped(_SCALES), rf"{_SCALES}: is missing, but needed for {_BLOCKS}"),
    (1, _replaced(_SCALES, lambda a: a[:, :1]), r"has shape \[4, 1, 1\], must be \[4, 64, 1\]"),
    (1, _replaced(_SCALES, lambda a: _with(a, 255)), r"holds NaN scales"),
    (1, _replaced(_BLOCKS, lambda a: a.astype(np.int32)), rf"{_BLOCKS}: is I32, must be U8"),
    (1, _replaced(_BLOCKS, lambda a: a[..., :8]), r"must be \[experts, outputs, inputs / 32, 16\]"),
    (2, _added(f"{_UP}_zero_point"), rf"{_UP}_zero_point: is not read; quantization_config says symmetric"),
    (2, _dropped(f"{_UP}_scale"), rf"{_UP}_packed: needs {_UP}_scale"),
    (2, _dropped(f"{_UP}_shape"), rf"{_UP}_shape: is missing, but needed for {_UP}_packed"),
    (
        2,
        _replaced(f"{_UP}_packed", lambda a: a[:, :4]),
        r"has shape \[32, 4\], must be \[32, 8\] for .* in groups of 32",
    ),
    (2, _configured(format=["pack-quantized"]), r"format=\['pack-quantized'\]: must be one of"),
    (2, _configured(sparsity_config={"format": "sparse-24-bitmask"}), r"quantization_config: sparsity_config="),
    (2, _configured(transform_config={"config_groups": {}}), r"quantization_config: transform_config="),
    (
        2,
        _configured(config_groups={"a": {"weights": _INT4_WEIGHTS | {"actorder": "group"}}}),
        r"actorder='group': must",
    ),
    (2, _configured(format="nvfp4"), r"format='nvfp4': must be one of pack-quantized, float-quantized"),
    (2, _configured(format="float-quantized"), r"config_groups\.group_0\.weights\.num_bits=4: must be 8"),
    (2, _configured(config_groups={"a": {"weights": _INT4_WEIGHTS | {"num_bits": 8}}}), r"num_bits=8: must be 4"),
    (
        2,
        _configured(config_groups={"a": {"weights": _INT4_WEIGHTS | {"symmetric": False}}}),
        r"symmetric=False: must be",
    ),
    (
        2,
        _configured(
            config_groups={n: {"weights": _INT4_WEIGHTS | {"group_size": g}} for n, g in (("a", 32), ("b", 64))}
        ),
        r"config_groups have group_size \[32, 64\], must have one for all groups",
    ),
]


@pytest.mark.parametrize(("number", "change", "pattern"), REFUSED)
def test_broken_files_are_refused_in_one_sentence(number, change, pattern, tmp_path):
    shutil.copytree(PATHS[number], tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    tensors = _folder(tmp_path / "source")
    change(tensors, config)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, tmp_path / "source/model.safetensors"
    )
    with pytest.raises(ConfigError, match=pattern) as error:
        import_checkpoint(tmp_path / "source", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


# --- The other libraries ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.transformers
def test_values_are_the_other_libraries_bit_for_bit(dtype, rng):
    """Needs torch, transformers 5 and compressed-tensors: python -m pytest -m transformers."""
    import torch
    from compressed_tensors import compressors as packed
    from compressed_tensors import quantization
    from transformers.integrations import finegrained_fp8 as fp8
    from transformers.integrations import mxfp4

    kind, ours = getattr(torch, dtype), np.dtype(BF16 if dtype == "bfloat16" else np.float32)

    def tensor(array: np.ndarray) -> Any:
        bits = torch.from_numpy(array.view(f"i{array.itemsize}") if array.dtype in (FP8, BF16) else array)
        return bits.view({FP8: torch.float8_e4m3fn, BF16: torch.bfloat16}.get(array.dtype.type, bits.dtype))

    arguments = quantization.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    for form, arrays in _random_forms(rng):
        if isinstance(form, FP8Blocks):  # transformers reads whole blocks only
            form = FP8Blocks("w", "s", (3, 48, 64), (12, 16))
            arrays = Arrays(w=arrays["w"][:, :48, :64].copy(), s=arrays["s"][:, :, :4].copy())
            theirs = fp8.Fp8Dequantize(None)._dequantize_one(tensor(arrays["w"]), tensor(arrays["s"]), kind)
        elif isinstance(form, MXFP4):
            theirs = mxfp4.convert_moe_packed_tensors(tensor(arrays["b"]), tensor(arrays["s"]), dtype=kind)
        else:
            state = {
                f"weight_{name}": tensor(arrays[key]) for name, key in (("packed", "p"), ("scale", "s"), ("shape", "n"))
            }
            theirs = packed.PackedQuantizationCompressor.decompress(state, scheme)["weight"].to(kind)
        want = theirs.contiguous().view(torch.int32 if dtype == "float32" else torch.int16).numpy()
        np.testing.assert_array_equal(form.read(arrays, (), ours).view(want.dtype), want)

    # An edge block: of 24 rows in blocks of 16 the library scales 12 and 12, DeepSeek's code and we 16 and 8.
    edge = Arrays(w=np.ones((24, 16), FP8), s=np.array([[0.5], [2.0]], np.float32))
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(tensor(edge["w"]), tensor(edge["s"]), kind).float().numpy()
    read = FP8Blocks("w", "s", (24, 16), (16, 16)).read(edge, (), FLOAT32)
    assert (theirs[:, 0].tolist(), read[:, 0].tolist()) == ([0.5] * 12 + [2.0] * 12, [0.5] * 16 + [2.0] * 8)

    (_, arrays), *_ = _random_forms(rng)
    arrays = Arrays(w=arrays["w"][0].copy(), s=np.abs(arrays["s"][0, :1, :1]).repeat(50, 0).astype(BF16))
    arguments = quantization.QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = packed.BaseCompressor.get_value_from_registry("float-quantized")
    state = {"weight": tensor(arrays["w"]), "weight_scale": tensor(arrays["s"])}
    theirs = compressor.decompress(state, scheme)["weight"].float().numpy()
    np.testing.assert_array_equal(FP8Blocks("w", "s", (50, 70), (1, 70), True).read(arrays, (), FLOAT32), theirs)
