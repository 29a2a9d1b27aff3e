"""Quantised factors in experts and dense FFNs: values by hand, dequantised oracles, compiled programs, refusals."""

import collections
import dataclasses
import importlib.util
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import ConfigError, MeshConfig
from moe.dispatch import quantized
from moe.dispatch.backends import backend, gpu, grouped_ffn, tpu
from moe.dispatch.ffn import ExpertWeights, batched_ffn
from moe.layers.moe_layer import MoELayer
from moe.models.factory import abstract_model
from moe.parallel import target
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings
from moe.planner import arithmetic, kernels
from moe.planner.chips import CHIPS
from moe.planner.gpus import GPUS
from moe.planner.records import GroupedMatmul
from tests.helpers import random_parameters, rounded, slow_case, tiny_model

pytest.importorskip("qwix")

SIZES = np.array([5, 0, 9, 4], np.int32)


def test_a_product_by_hand():
    """[4,2] has scale 4/127.5 and values 127 and 64 (63.75); [1,1/2] the same values and scale 1/127.5."""
    y = quantized.matmul(jnp.array([[4.0, 2.0]]), jnp.array([[1.0], [0.5]]), "int8")
    np.testing.assert_allclose(y, [[(127 * 127 + 64 * 64) * 4 / 127.5**2]], rtol=1e-6)
    # The largest float8 value is 448: 4 and 1 both become 448, 2 and 1/2 exactly half of it.
    y = quantized.matmul(jnp.array([[4.0, 2.0]]), jnp.array([[1.0], [0.5]]), "float8")
    np.testing.assert_allclose(y, [[5.0]], rtol=1e-6)


@pytest.mark.parametrize("precision", ["int8", slow_case("float8")])  # test_quantized_kernels.py has float8
def test_products_and_gradients_are_those_of_rounded_factors(precision, rng):
    """y has rounded rows and matrices, the rows' gradient a rounded output gradient and matrices; the gradient of the
    matrices has unrounded factors."""
    rows, gradient = (rng.normal(size=(18, d)).astype(np.float32) for d in (16, 24))
    matrices = rng.normal(size=(4, 16, 24)).astype(np.float32) * np.array([1, 9, 0.1, 3], np.float32)[:, None, None]
    groups = np.repeat(np.arange(4), SIZES)
    d_matrices = np.stack([rows[groups == e].T @ gradient[groups == e] for e in range(4)])
    expected = (
        np.einsum("rd,rdf->rf", rounded(rows, -1, precision), rounded(matrices, 1, precision)[groups]),
        np.einsum("rf,rdf->rd", rounded(gradient, -1, precision), rounded(matrices, 2, precision)[groups]),
        d_matrices,
    )

    each = {e: np.flatnonzero(groups == e) for e in (0, 2, 3)}

    @jax.jit
    def run(rows, matrices, gradient):
        """Results of all rows, and of the dense product of one expert's rows."""

        def results(product, rows, matrices, gradient):
            y, backward = jax.vjp(product, rows, matrices)
            return (y, *backward(gradient))

        def grouped(*arguments):
            return tpu.quantized_matmul(*arguments, jnp.asarray(SIZES), precision)

        def dense(rows, matrix):
            return quantized.matmul(rows[None], matrix, precision)[0]

        one = {e: results(dense, rows[index], matrices[e], gradient[index]) for e, index in each.items()}
        return results(grouped, rows, matrices, gradient), one

    grouped, dense = run(*map(jnp.asarray, (rows, matrices, gradient)))
    for ours, reference in zip(grouped, expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())
    for e, index in each.items():
        for ours, reference in zip(dense[e], (expected[0][index], expected[1][index], d_matrices[e]), strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())


def _in_blocks(array, axis):
    """float64 numbers in blocks of 32: the nearest of e4m3's values, ties to even, times the least power of two with
    which none exceeds 448."""
    wide, result = np.moveaxis(np.asarray(array, np.float64), axis, -1), []
    for first in range(0, wide.shape[-1], 32):
        block = wide[..., first : first + 32]
        largest = np.abs(block).max(-1, keepdims=True)
        scale = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest, 448.0) / 448.0))
        sizes = np.abs(block) / scale
        step = 2.0 ** (np.floor(np.log2(np.maximum(sizes, 2.0**-6))) - 3)  # 3 bits after the first, 2^-9 below 2^-6
        result.append(np.sign(block) * np.round(sizes / step) * step * scale)
    return np.moveaxis(np.concatenate(result, -1), -1, axis)


def test_blocks_of_32_by_hand():
    """The scale of 1.1 and 300 is 1 (2^-1 would make 300 into 600, above 448): 300 is between 288 and 320, steps of 32,
    and 1.1 between 1 and 1.125. 1.1 in the next block has scale 2^-8: 281.6 becomes 288, so 1.125. The last, shorter
    block is 449, whose scale is 2: 224.5 becomes 224."""
    x = np.zeros(65, np.float32)
    x[0], x[1], x[40], x[64] = 1.1, 300.0, 1.1, 449.0
    found = quantized.round_blocks(jnp.asarray(x), 0)
    np.testing.assert_array_equal(found[np.array([0, 1, 40, 64])], [1.125, 288.0, 1.125, 448.0])
    assert np.count_nonzero(found) == 4


def test_products_in_blocks_of_32_equal_those_in_float64(rng):
    """Values and the rows' gradient; 1e-4 to 1e4 in one matrix, where one scale for a vector would lose the small."""
    rows, gradient = rng.normal(size=(2, 5, 70)), rng.normal(size=(2, 5, 40))
    matrices = rng.normal(size=(2, 70, 40)) * 10.0 ** rng.integers(-4, 4, (2, 70, 1))
    arrays = [jnp.asarray(array, jnp.float32) for array in (rows, matrices, gradient)]
    y, back = jax.vjp(lambda rows, matrices: quantized.matmul(rows, matrices, "mxfp8"), *arrays[:2])
    d_rows, d_matrices = back(arrays[2])
    rows, matrices, gradient = (np.asarray(array) for array in arrays)
    turned = matrices.swapaxes(1, 2)
    for ours, expected in (
        (y, _in_blocks(rows, -1) @ _in_blocks(matrices, -2)),
        (d_rows, _in_blocks(gradient, -1) @ _in_blocks(turned, -2)),
        (d_matrices, np.asarray(rows, np.float64).swapaxes(1, 2) @ gradient),
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-6 * np.abs(expected).max())


def test_experts_in_buffers_and_sorted_rows_are_one_function(rng):
    """With biases, whose product with 1 is exact. A hidden activation near the boundary between two quantisation steps
    may be rounded differently."""
    up, gate, down = (jnp.asarray(rng.normal(size=(4, *s)), jnp.float32) for s in ((16, 24), (16, 24), (24, 16)))
    biases = tuple(jnp.asarray(rng.normal(size=(4, 24)), jnp.float32) for _ in range(2))
    weights = ExpertWeights(up, gate, down, biases, activation="swiglu", precision="int8")
    rows = jnp.asarray(rng.normal(size=(4, 6, 16)), jnp.float32)
    sizes = jnp.full(4, 6, jnp.int32)
    batched = jax.jit(lambda rows: batched_ffn(rows, weights))(rows)
    grouped = jax.jit(lambda rows: grouped_ffn(rows, sizes, backend().pack(weights)))(rows.reshape(24, 16))
    grouped = grouped.reshape(4, 6, 16)
    same = np.isclose(grouped, batched, rtol=1e-5, atol=1e-4).all(axis=-1)
    assert np.mean(same) > 0.8
    np.testing.assert_allclose(grouped, batched, atol=0.01 * np.abs(batched).max())
    plain = batched_ffn(rows, dataclasses.replace(weights, precision="none"))
    error = np.sqrt(np.mean((batched - plain) ** 2) / np.mean(plain**2))
    assert 1e-3 < error < 0.03


def _products(jaxpr, types=None):
    """Number of matrix products by the types of their factors, in a program and in those it calls."""
    types = collections.Counter() if types is None else types
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot_general", "ragged_dot"):
            types["x".join(str(variable.aval.dtype) for variable in equation.invars[:2])] += 1
        for inner in arithmetic._inner_jaxprs(equation.params):
            _products(inner, types)
    return types


#: Settings of multi-head latent attention.
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "head_dim": 8, "rope_dim": 4, "value_dim": 4, "num_kv_heads": 4}


@pytest.mark.parametrize(
    ("dispatch", "attention", "settings"),
    [
        ("gather", 0, {}),
        slow_case("dropless", 0, {}),
        # Queries, keys, values and outputs of two layers.
        slow_case("dropless", 2 * 4, {"low_precision_in": "all"}),
        # Both latents, the rotated and the other part of queries, and outputs.
        ("dropless", 2 * 5, {"low_precision_in": "all"} | LATENT),
    ],
)
def test_every_product_is_quantised_where_asked(dispatch, attention, settings, monkeypatch):
    """Products with up, gate and down of a dense layer, a shared expert and the experts, and attention's projections,
    are quantised forward and for the rows' gradients in a trace for TPUs; others, including the router's, are not."""
    low = {"dtype": "bfloat16", "low_precision": "int8"}
    config = tiny_model(dispatch=dispatch, shared_d_ff=8, first_dense=1, capacity_factor=4.0, **low, **settings)
    graphdef, parameters = random_parameters(config)
    tokens = jnp.arange(16).reshape(2, 8)
    monkeypatch.setattr(target, "current", lambda: target.Target("tpu", "TPU v5 lite"))

    def loss(parameters):
        return jnp.sum(_logits(graphdef, parameters, tokens).astype(jnp.float32) ** 2)

    types = _products(jax.make_jaxpr(jax.grad(loss))(parameters).jaxpr)
    experts = 2 if dispatch == "dropless" else 3  # up and gate as one matrix
    assert types["int8xint8"] == 2 * (3 + 3 + experts + attention)
    plain = dataclasses.replace(config, low_precision="none", low_precision_in="ffn")
    assert not _products(
        jax.make_jaxpr(lambda p: _logits(nnx.graphdef(abstract_model(plain)), p, tokens))(parameters).jaxpr
    )["int8xint8"]


def _logits(graphdef, parameters, tokens):
    return nnx.merge(graphdef, parameters)(tokens).logits


@pytest.mark.slow
def test_a_mesh_changes_neither_loss_nor_gradients():
    """Experts over 4 devices, with an exchange, and weights over 2: scales do not depend on the mesh. A value near the
    boundary between two quantisation steps may be rounded differently, by 1/127 of it."""
    layer = MoELayer(tiny_model(dispatch="dropless", low_precision="int8", gate="mixtral"), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    parameters = nnx.to_pure_dict(state)
    x, target_of_x = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(1).normal(size=(2, 8, 8, 16)))

    def loss(parameters, x):
        return jnp.mean(nnx.merge(graphdef, parameters)(x)[0] * target_of_x)

    gradients = jax.value_and_grad(loss, argnums=(0, 1))
    alone = jax.jit(gradients)(parameters, x)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4), jax.devices()[:8])
    with jax.set_mesh(mesh):
        placed = jax.device_put(parameters, parameter_shardings(mesh, state))
        spread = jax.jit(gradients)(placed, x)
    assert float(spread[0]) == pytest.approx(float(alone[0]), rel=1e-4)
    for ours, theirs in zip(*map(jax.tree.leaves, (spread[1], alone[1])), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())


def test_packed_rows_are_the_quantised_rows():
    """Bytes of 5 values and a scale; packing rows a second time does not change them."""
    precision = "float8"
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)), jnp.bfloat16)
    sent = quantized.pack(rows, precision)
    assert (sent.shape, sent.dtype) == ((7, 5 + 4), jnp.uint8)
    arrived = quantized.unpack(sent, precision, jnp.float32)
    numbers, scales = quantized.quantize(rows, -1, precision)
    np.testing.assert_array_equal(arrived, numbers.astype(jnp.float32) * scales)
    again = quantized.unpack(quantized.pack(arrived, precision), precision, jnp.float32)
    np.testing.assert_allclose(again, arrived, rtol=1e-6)


@pytest.mark.slow
def test_rows_between_hosts_in_8_bits_change_only_gradients():
    """The experts quantise their rows in any case; gradients of matrices become sums of quantised rows."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, expert=8), jax.devices()[:8])
    generator, results = np.random.default_rng(0), []
    x, target_of_x = (jnp.asarray(generator.normal(size=(8, 12, 16)), jnp.float32) for _ in range(2))
    for where in ("ffn", "all"):
        moe = {"dispatch": "dropless", "exchange_hosts": 2, "num_experts": 8, "gate": "mixtral"}
        layer = MoELayer(tiny_model(low_precision="float8", low_precision_in=where, **moe), rngs=nnx.Rngs(0))
        graphdef, parameters = nnx.split(layer)

        def loss(parameters, x, graphdef=graphdef):
            y = nnx.merge(graphdef, parameters)(x)[0]
            return jnp.sum(y * target_of_x), y

        with jax.set_mesh(mesh):
            gradients = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
            (*found,), y = gradients(nnx.to_pure_dict(parameters), x)
        results.append((y, jax.tree.leaves(found)))
    (y, gradients), (packed_y, packed_gradients) = results
    np.testing.assert_allclose(packed_y, y, atol=1e-5 * np.abs(y).max())
    errors = [
        float(jnp.sqrt(jnp.mean((packed - plain) ** 2) / jnp.mean(plain**2)))
        for packed, plain in zip(packed_gradients, gradients, strict=True)
    ]
    assert max(errors) < 0.05
    assert max(errors) > 1e-3


@pytest.mark.parametrize(
    ("kind", "precision", "words"),
    [
        ("TPU v6 lite", "float8", "must be int8 or none on TPU v6 lite"),
        ("TPU7x", "int8", "must be float8 or none on TPU7x"),
        ("TPU v4", "int8", "must be none on TPU v4"),
        ("NVIDIA H100 80GB HBM3", "int8", "must be float8 or none on NVIDIA H100"),
        ("NVIDIA A100-SXM4-80GB", "float8", "must be none on NVIDIA A100"),
        ("NVIDIA B200", "mxfp8", "runs on CPUs only"),
    ],
)
def test_hardware_without_such_products_is_refused(kind, precision, words, monkeypatch):
    platform = "gpu" if "NVIDIA" in kind else "tpu"
    monkeypatch.setattr(target, "current", lambda: target.Target(platform, kind, 100))
    with pytest.raises(ConfigError, match=f"model.low_precision={precision}: {words}"):
        quantized.matmul(jnp.ones((2, 4)), jnp.ones((4, 3)), precision)


def test_experts_whose_sizes_fit_no_kernel_are_refused(monkeypatch):
    monkeypatch.setattr(target, "current", lambda: target.Target("gpu", "NVIDIA H100 80GB HBM3", 132))
    arguments = jnp.ones((128, 128)), jnp.ones((2, 128, 192)), jnp.array([64, 64], jnp.int32)
    with pytest.raises(ConfigError, match="sides of a device's expert matrices must be multiples of 128"):
        gpu.grouped_matmul(*arguments, precision="float8")


@pytest.mark.parametrize("name", ["h100", "b200"])
def test_the_planner_prices_float8_on_gpus_by_analogy(name):
    """At the same share of the roofline as the bfloat16 kernel and far from the memory bound: half of its time."""
    sizes = (65536, 4096, 4096, 8)
    wide, narrow = (GroupedMatmul("rows", sizes, (0, 0, 0), item, 1, "mosaic") for item in (2, 1))
    prices = [kernels.price(matmul, 65536, GPUS[name]) for matmul in (wide, narrow)]
    assert prices[1].seconds == pytest.approx(prices[0].seconds / 2)
    assert prices[1].high / prices[1].seconds > prices[0].high / prices[0].seconds
    assert [price.basis for price in prices] == ["measured", "by analogy"]


def test_the_planner_prices_products_of_bytes_at_twice_the_peak():
    """Far from the memory bound, half of the time in bfloat16; marked as by analogy."""
    sizes = (32768, 4096, 4096, 8)
    wide, narrow = (GroupedMatmul("rows", sizes, (512, 4096, 1024), item, 1) for item in (2, 1))
    made = kernels.price(narrow, 32768, CHIPS["v6e"])
    assert made.basis == "by analogy"
    assert made.seconds == pytest.approx(kernels.price(wide, 32768, CHIPS["v6e"]).seconds / 2)


_SCRIPT = """
import sys
from moe.system import process
process.use_tpu_compiler()
import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from moe.dispatch.backends import backend, grouped_ffn
from moe.dispatch.ffn import ExpertWeights
from moe.planner.topology import get_topology

mesh = jax.sharding.Mesh(get_topology(sys.argv[1]).devices[:1], ("data",))
place = NamedSharding(mesh, PartitionSpec())
def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
matrix = array(4, 256, 256)
weights = ExpertWeights(matrix, matrix, matrix, activation="swiglu", precision=sys.argv[2])
def gradients(rows, sizes, weights):
    return jax.grad(lambda *a: jnp.sum(grouped_ffn(a[0], sizes, backend().pack(a[1])) ** 2), (0, 1))(rows, weights)
with jax.set_mesh(mesh):
    print(jax.jit(gradients).lower(array(1024, 256), array(4, dtype=jnp.int32), weights).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "precision", "name", "compiler"),
    [
        ("v6e:2x2", "int8", "s8", "libtpu"),
        ("tpu7x:2x2x1", "float8", "f8e4m3fn", "libtpu"),
        ("h100:1x8", "float8", "f8e4m3fn", "jax_cuda13_plugin"),
        ("b200:1x8", "float8", "f8e4m3fn", "jax_cuda13_plugin"),
    ],
)
def test_compiled_experts_are_quantised(topology, precision, name, compiler):
    """Compiled for absent devices, the products with up and gate as one and with down, forward and for the rows'
    gradients, have factors of one byte; the two weight gradients do not."""
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    command = [sys.executable, "-c", _SCRIPT, topology, precision]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    named = re.compile('ragged_dot_tiling|custom_call_target="(mosaic_gpu|__gpu[$]xla.gpu.triton)')
    kernels = [line for line in text.splitlines() if named.search(line) and "custom-call(" in line]
    factors = [re.findall(rf"{name}\[", line.partition("operand_layout_constraints=")[2]) for line in kernels]
    assert sorted(map(len, factors)) == [0, 0, 2, 2, 2, 2]
