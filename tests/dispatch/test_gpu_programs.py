"""Programs for NVIDIA GPUs: kernels interpreted on CPU, and programs compiled for absent GPUs."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import math
import multiprocessing
import re
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu

from moe.config import MeshConfig
from moe.dispatch import quantized
from moe.dispatch.backends import gpu, tiles
from moe.dispatch.buffers import make_plan
from moe.dispatch.ffn import ExpertWeights
from moe.dispatch.modes import dispatch
from moe.layers.attention.attend import attend, checked_for_target
from moe.layers.attention.scoring import Scoring
from moe.layers.ffn import Experts
from moe.layers.moe_layer import MoELayer
from moe.parallel import target
from moe.parallel.mesh import make_mesh
from tests.helpers import routed, slow_case, tiny_model

TARGETS = Path(__file__).parents[2] / "moe" / "planner" / "targets"


@pytest.mark.parametrize(
    ("sizes", "num_rows", "dtype", "tolerance", "transposed"),
    [
        ([0, 37, 3, 90], 160, "float32", 1e-5, False),  # an empty group, shared tiles, rows of no group
        ([40, 0, 200, 16], 256, "bfloat16", 1e-2, True),  # groups over several tiles, no row to spare
        ([0, 0, 0], 16, "float32", 1e-5, False),
    ],
)
def test_kernels_equal_one_matmul_per_group(sizes, num_rows, dtype, tolerance, transposed, rng):
    """Values and both gradients; rows that belong to no group hold NaN."""
    x, gradient = (np.full((num_rows, d), np.nan) for d in (32, 48))
    x[: sum(sizes)], gradient[: sum(sizes)] = rng.normal(size=(sum(sizes), 32)), rng.normal(size=(sum(sizes), 48))
    x, gradient = jnp.asarray(x, dtype), jnp.asarray(gradient, dtype)
    matrices = jnp.asarray(rng.normal(size=(len(sizes), 32, 48)), dtype)

    def multiply(x, matrices, sizes):
        stored = matrices.swapaxes(1, 2) if transposed else matrices
        return gpu.grouped_matmul(x, stored, sizes, True, transposed)

    @jax.jit
    def ours(x, matrices, gradient, sizes):
        y, backward = jax.vjp(lambda x, matrices: multiply(x, matrices, sizes), x, matrices)
        return y, *backward(gradient)[:2]

    y, d_x, d_matrices = (np.asarray(a, np.float32) for a in ours(x, matrices, gradient, jnp.asarray(sizes, jnp.int32)))
    x, matrices, gradient = (np.asarray(a, np.float32) for a in (x, matrices, gradient))
    ends = np.cumsum(sizes)
    for group, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows = slice(start, end)
        for actual, expected in (
            (y[rows], x[rows] @ matrices[group]),
            (d_x[rows], gradient[rows] @ matrices[group].T),
            (d_matrices[group], x[rows].T @ gradient[rows]),
        ):
            np.testing.assert_allclose(
                actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(initial=0.0), 1e-6)
            )


@pytest.mark.skipif(not hasattr(mosaic_gpu, "force_gpu_interpret_mode"), reason="this JAX cannot interpret the kernel")
@pytest.mark.parametrize("transposed", [False, True])
def test_hoppers_kernel_equals_one_matmul_per_group(transposed, rng, monkeypatch):
    """JAX's Mosaic kernel as called for Hopper: a product, and the gradient of the rows."""
    sizes, num_rows = [50, 0, 70], 128  # tiles of 64 rows shared by two groups, an empty group, rows of no group
    x = jnp.asarray(rng.normal(size=(num_rows, 64)), jnp.bfloat16)
    matrices = jnp.asarray(rng.normal(size=(3, 128, 64) if transposed else (3, 64, 128)), jnp.bfloat16)
    monkeypatch.setattr(gpu.target, "current", lambda: types.SimpleNamespace(compute_capability=9))
    with mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams()):
        given = jnp.asarray(sizes, jnp.int32)
        y = np.asarray(gpu._multiply(x, matrices, given, transposed=transposed, interpret=False), np.float32)
    x, matrices = (np.asarray(a, np.float32) for a in (x, matrices))
    for group, rows in ((0, slice(0, 50)), (2, slice(50, 120))):
        expected = x[rows] @ (matrices[group].T if transposed else matrices[group])
        np.testing.assert_allclose(y[rows], expected, atol=0.01 * np.abs(expected).max())


#: Sixteen groups of 384 rows: empty ones, tiles that several groups share, groups over several tiles, rows of no group.
_SIXTEEN = [50, 0, 1, 2, 97, 0, 0, 3, 5, 7, 11, 64, 32, 63, 0, 33]


@pytest.mark.skipif(not hasattr(mosaic_gpu, "force_gpu_interpret_mode"), reason="this JAX cannot interpret the kernel")
@pytest.mark.parametrize(
    ("terms", "columns", "transposed", "cores"),
    [
        (320, 64, False, 2),  # more loads than buffers, tiles alternate between two cores
        slow_case(64, 384, True, 1),  # all tiles on one core, as those of float8 below
        slow_case(192, 576, True, 5),
        slow_case(128, 512, False, 3),
    ],
)
def test_blackwells_kernel_equals_one_matmul_per_group(terms, columns, transposed, cores, rng, monkeypatch):
    """The kernel as called for Blackwell, under the interpreter's race detection; rows of no group hold NaN."""
    ends = np.cumsum(_SIXTEEN)
    x = np.full((384, terms), np.nan)
    x[: ends[-1]] = rng.normal(size=(ends[-1], terms))
    x = jnp.asarray(x, jnp.bfloat16)
    shape = (16, columns, terms) if transposed else (16, terms, columns)
    matrices = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    blackwell = types.SimpleNamespace(compute_capability=10, num_cores=cores)
    monkeypatch.setattr(gpu.target, "current", lambda: blackwell)
    with mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams(detect_races=True)):
        sizes = jnp.asarray(_SIXTEEN, jnp.int32)
        y = np.asarray(gpu._multiply(x, matrices, sizes, transposed=transposed, interpret=False), np.float32)
    x, matrices = (np.asarray(a, np.float32) for a in (x, matrices))
    for matrix, size, end in zip(matrices, _SIXTEEN, ends, strict=True):
        rows = slice(end - size, end)
        expected = x[rows] @ (matrix.T if transposed else matrix)
        np.testing.assert_allclose(y[rows], expected, atol=0.01 * np.abs(expected).max(initial=1e-6))


@pytest.mark.skipif(not hasattr(mosaic_gpu, "force_gpu_interpret_mode"), reason="this JAX cannot interpret the kernel")
@pytest.mark.parametrize(
    ("capability", "sides", "transposed", "cores"),
    [
        slow_case(9, (256, 128), False, 2),  # more loads than buffers, tiles alternate between two cores
        (10, (256, 128), True, 1),
        slow_case(9, (768, 256), True, 5),
        slow_case(10, (128, 640), False, 3),
    ],
)
def test_products_of_float8_and_their_gradients(capability, sides, transposed, cores, rng, monkeypatch):
    """Both kernels, under the interpreter's race detection, multiply factors rounded to float8; rows of no group hold
    NaN. The gradient of the matrices is another kernel's, of unrounded factors."""
    pytest.importorskip("qwix")
    device = types.SimpleNamespace(platform="gpu", device_kind="", compute_capability=capability, num_cores=cores)
    device.low_precisions = ("float8",)
    each = [50, 0, 97, 3, 64]
    groups, total = np.repeat(np.arange(5), each), sum(each)
    rows, gradient = (np.full((256, side), np.nan) for side in sides)
    for array in (rows, gradient):
        array[:total] = rng.normal(size=(total, array.shape[1])) * rng.uniform(0.1, 10, (total, 1))
    rows, gradient = jnp.asarray(rows, jnp.bfloat16), jnp.asarray(gradient, jnp.bfloat16)
    matrices = jnp.asarray(rng.normal(size=(5, *sides)) * rng.uniform(0.1, 10, (5, 1, sides[1])), jnp.bfloat16)
    stored, given = matrices.swapaxes(1, 2) if transposed else matrices, jnp.asarray(each, jnp.int32)

    def outer_products(left: Any, right: Any, sizes: Any, *, interpret: bool) -> Any:
        one_hot = jax.nn.one_hot(jnp.asarray(groups), 5)
        return jnp.einsum("re,rd,rf->edf", one_hot, left[:total], right[:total])

    monkeypatch.setattr(gpu.target, "current", lambda: device)
    monkeypatch.setattr(gpu.triton, "outer_products", outer_products)

    def multiply(rows: Any, matrices: Any) -> Any:
        return gpu.grouped_matmul(rows, matrices, given, False, transposed, "float8")

    with mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams(detect_races=True)):
        product, backward = jax.vjp(multiply, rows, stored)
        d_rows, d_matrices = backward(gradient)

    def rounded(array: Any, axis: int) -> np.ndarray:
        values, scales = quantized.quantize(jnp.asarray(array), axis, "float8")
        return np.asarray(values.astype(jnp.float32) * scales)

    expected = np.einsum("rd,rdf->rf", rounded(rows[:total], 1), rounded(matrices, 1)[groups])
    np.testing.assert_allclose(product[:total], expected, atol=0.01 * np.abs(expected).max())
    expected = np.einsum("rf,rdf->rd", rounded(gradient[:total], 1), rounded(matrices, 2)[groups])
    np.testing.assert_allclose(d_rows[:total], expected, atol=0.01 * np.abs(expected).max())
    expected = np.asarray(outer_products(rows, gradient, given, interpret=True), np.float32)
    expected = expected.swapaxes(1, 2) if transposed else expected
    np.testing.assert_allclose(d_matrices, expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("draws", [6, slow_case(20)])
def test_schedule_visits_each_tile_of_each_group_once(draws, rng):
    schedule = jax.jit(tiles.schedule, static_argnums=(1, 2))
    for _ in range(draws):
        num_groups = int(rng.integers(1, 9))
        num_rows = 128 * int(rng.integers(1, 40))
        sizes = rng.multinomial(rng.integers(0, num_rows + 1), rng.dirichlet(np.full(num_groups, 0.5)))
        block = tiles.tile_rows(num_rows, num_groups)
        group, tile, start, end = (np.asarray(a) for a in schedule(np.asarray(sizes, np.int32), num_rows, block))
        used = end > start
        ends = np.cumsum(sizes)
        expected = [
            (e, t)
            for e, (first, last) in enumerate(zip(ends - sizes, ends, strict=True))
            for t in range(first // block, math.ceil(last / block) if last > first else first // block)
        ]
        assert list(zip(group[used].tolist(), tile[used].tolist(), strict=True)) == expected
        assert used.sum() * block <= _computed_rows(num_rows, num_groups)


def _computed_rows(num_rows: int, num_groups: int) -> int:
    """Upper bound of the rows that one of the three matmuls computes for R rows, shared tiles counted twice."""
    return num_rows + tiles.tile_rows(num_rows, num_groups) * (num_groups - 1)


def test_shared_tiles_add_at_most_a_tenth():
    # 8 experts: 10240 rows in tiles of 128 (7 shared tiles are 896 rows, 8.75 %), 8192 in tiles of 64 (448, 5.5 %).
    assert tiles.tile_rows(10240, 8) == 128
    assert tiles.tile_rows(8192, 8) == 64
    assert _computed_rows(8192, 8) / 8192 == 1 + 448 / 8192


# --- Compiled for absent GPUs ----------------------------------------------------------------------------------------

needs_plugin = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason='needs JAX\'s CUDA plugin: pip install "jax[cuda13]"',
    ),
]


def _mesh(name: str) -> jax.sharding.Mesh:
    """Mesh of one absent GPU."""
    text = (TARGETS / f"{name}.textproto").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    return make_mesh(MeshConfig(data=1), topology.devices)


def _compile(function: Any, mesh: jax.sharding.Mesh, *arguments: Any) -> str:
    """Text of the program compiled for these argument shapes."""
    with jax.set_mesh(mesh), checked_for_target():
        sharding = jax.NamedSharding(mesh, jax.P())
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
        return jax.jit(function).lower(*shapes).compile().as_text() or ""


def _matmul_flops(text: str) -> float:
    """FLOPs of all dots and cuBLAS calls in a program: [B,M,K] · [B,K,N] is 2 BMNK = 2 sqrt(BMK · BKN · BMN / B)."""
    types = dict(re.findall(r"%([\w.\-]+) = \(?(\w+\[[\d,]*\])", text))
    total = 0.0
    pattern = r"%([\w.\-]+) = [^=]*?(?:\bdot|custom-call)\(%([\w.\-]+), %([\w.\-]+)[^)]*\)([^\n]*)"
    for name, left, right, rest in re.findall(pattern, text):
        if "custom_call_target" in rest and "__cublas" not in rest:
            continue
        arrays = [_dims(types[operand]) for operand in (name, left, right)]
        batch = math.prod(arrays[0][:-2]) if all(dims[:-2] == arrays[0][:-2] for dims in arrays) else 1
        total += 2 * math.sqrt(math.prod(math.prod(dims) for dims in arrays) / batch)
    return total


def _dims(array: str) -> tuple[int, ...]:
    return tuple(int(dim) for dim in re.findall(r"\d+", array.partition("[")[2]))


def _compile_layer(mode: str, capacity: int, name: str, *, e: int, d: int, f: int, tokens: int) -> str:
    """Forward and all gradients of top-2 dispatch to e experts on one device."""
    config = tiny_model(num_experts=e, experts_per_token=2, d_model=d, moe_d_ff=f)
    graphdef, parameters = nnx.split(nnx.eval_shape(lambda: Experts(config, rngs=nnx.Rngs(0))))
    routing = jax.eval_shape(
        lambda: routed("mixtral", jnp.zeros((1, tokens, e)), mask=jnp.ones((1, tokens), bool), k=2)
    )

    def loss(x, parameters, weights, routing):
        sent = dataclasses.replace(routing, combine_weights=weights)
        experts = nnx.merge(graphdef, parameters)
        return jnp.sum(dispatch(mode, x, sent, make_plan(sent, capacity), experts.weights))

    x = jax.ShapeDtypeStruct((1, tokens, d), jnp.bfloat16)
    gradients = jax.value_and_grad(loss, (0, 1, 2))
    return _compile(gradients, _mesh(name), x, parameters, routing.combine_weights, routing)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_plugin) for name in ("a100", "h100", "b200")])
def test_dropless_costs_its_active_flops(name):
    """Eight experts on a device, 4096 tokens, top-2: forward and both gradients compute only the tiles of 8192 rows."""
    e, d, f, tokens = 8, 256, 512, 4096
    text = _compile_layer("dropless", 2 * tokens, name, e=e, d=d, f=f, tokens=tokens)
    kernels = re.findall(r'custom_call_target="(mosaic_gpu_v2|__gpu\$xla.gpu.triton)"', text)
    # Up and gate as one matrix, and down: product, gradient of rows, gradient of the matrix.
    assert len(kernels) == 6, kernels
    active = 9 * 2 * 8192 * d * f
    of_kernels = active * _computed_rows(8192, e) / 8192
    assert (of_kernels + _matmul_flops(text)) / active <= 1.1
    widest = max(math.prod(_dims(array)) for array in re.findall(r"\w+\[8192,[\d,]*\]", text))
    assert widest == 8192 * 2 * f


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_plugin) for name in ("a100", "h100", "b200")])
def test_large_groups_are_plain_matmuls(name):
    """Where hidden activations are recomputed, the program has neither our kernels nor an array of all rows' hidden
    activations; where they are kept, it has the kernels."""
    num_rows, d, f = 65536, 1024, 4096
    kernels = {}
    for keeps_hidden in (False, True):

        def loss(rows, up, gate, down, keeps_hidden=keeps_hidden):
            weights = ExpertWeights(up, gate, down, activation="swiglu", keeps_hidden=keeps_hidden)
            return jnp.sum(gpu.grouped_ffn(rows, jnp.full(1, 50_000), gpu.pack(weights)).astype(jnp.float32))

        shapes = (num_rows, d), (1, d, f), (1, d, f), (1, f, d)
        arrays = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
        text = _compile(jax.value_and_grad(loss, (0, 1, 2, 3)), _mesh(name), *arrays)
        kernels[keeps_hidden] = re.findall(r'custom_call_target="(mosaic_gpu_v2|__gpu\$xla.gpu.triton)"', text)
        assert bool(re.search(rf"\[{num_rows},({f}|{2 * f})\]", text)) == keeps_hidden
    assert (len(kernels[False]), len(kernels[True])) == (0, 6)


@pytest.mark.parametrize("name", [pytest.param("b200", marks=needs_plugin)])
def test_many_experts_on_blackwell_take_its_own_kernel(name):
    """With 32 experts, both products and both gradients of rows are Mosaic kernels, the gradients of matrices Triton's.
    A separate process compiles them, since a process compiles Mosaic kernels for one architecture only."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        text = pool.submit(_compile_layer, "dropless", 8192, name, e=32, d=256, f=512, tokens=4096).result()
    kernels = re.findall(r'custom_call_target="(mosaic_gpu_v2|__gpu\$xla.gpu.triton)"', text)
    assert sorted(kernels) == [r"__gpu$xla.gpu.triton"] * 2 + ["mosaic_gpu_v2"] * 4


@pytest.mark.parametrize("name", [pytest.param("h100", marks=needs_plugin)])
def test_gather_multiplies_its_slots_once(name):
    e, d, f, tokens, capacity = 8, 256, 512, 4096, 1280
    text = _compile_layer("gather", capacity, name, e=e, d=d, f=f, tokens=tokens)
    assert _matmul_flops(text) == pytest.approx(9 * 2 * e * capacity * d * f, rel=0.01)


@pytest.mark.parametrize(
    ("name", "heads", "window"),
    [
        *(
            pytest.param(name, (64, 64), window, marks=needs_plugin)
            for name in ("a100", "h100", "b200")
            for window in (0, 1024)
        ),
        pytest.param("h100", (192, 128), 0, marks=needs_plugin),
    ],
)
def test_attention_is_cudnns_and_holds_no_array_of_all_scores(name, heads, window):
    """Packed documents of 4096 tokens, forward and gradient; MLA's heads of 192 and 128 on Hopper."""
    length = 4096

    def loss(query, key, value, segment_ids):
        y = attend(query, key, value, segment_ids, kind="blocked", scoring=Scoring(window))
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    shapes = (4, heads[0]), (2, heads[0]), (2, heads[1])
    query, key, value = (jax.ShapeDtypeStruct((1, length, *shape), jnp.bfloat16) for shape in shapes)
    segment_ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    text = _compile(jax.grad(loss, (0, 1, 2)), _mesh(name), query, key, value, segment_ids)
    # The backward kernel reads the forward kernel's results: each block calls both once.
    assert text.count('"__cudnn$fmhaScaleBiasSoftmaxBackward"') == text.count('"__cudnn$fmhaScaleBiasSoftmax"') > 0
    assert not re.search(rf"\[(\d+,)*{length},{length}\]", text)


@pytest.mark.parametrize("hosts", [1, 2])
def test_no_exchange_waits_for_gradients_of_matrices(hosts, monkeypatch):
    """In the backward pass as traced for H100s no exchange depends on an outer product of rows, so that these products
    can overlap the return of the rows' gradients."""
    monkeypatch.setattr(target, "current", lambda: target.Target("gpu", "NVIDIA H100 80GB HBM3", 132))
    sizes = {"d_model": 16, "moe_d_ff": 16, "num_experts": 8, "exchange_hosts": hosts, "dtype": "bfloat16"}
    config = tiny_model(dispatch="dropless", remat="full", **sizes)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=8))):
        graphdef, parameters = nnx.split(MoELayer(config, rngs=nnx.Rngs(0)))

        def loss(parameters, x):
            return jnp.sum(nnx.merge(graphdef, parameters)(x)[0])

        gradients = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))
        program = gradients(nnx.to_pure_dict(parameters), jnp.ones((8, 32, 16), jnp.bfloat16))
    *_, backward = [each.params["jaxpr"] for each in program.eqns if each.primitive.name == "shard_map"]
    products, exchanges, late = 0, 0, set()  # late: arrays that depend on an outer product
    for equation in backward.eqns:
        is_product = equation.params.get("name") == "grouped_outer_products"
        waits = is_product or not late.isdisjoint(map(id, equation.invars))
        late |= set(map(id, equation.outvars)) if waits else set()
        products += is_product
        # Further rounds, in loops, add to both.
        if "ragged_all_to_all" in str(equation) and equation.primitive.name != "while":
            exchanges += 1
            assert not waits
    assert products == 2
    assert exchanges == {1: 3, 2: 5}[hosts]
