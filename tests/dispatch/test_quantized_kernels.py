"""TPU kernels for quantised factors, interpreted on CPU, and shards that are quantised before they are gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import MeshConfig
from moe.dispatch import quantized
from moe.dispatch.backends import gated, tpu, tpu_tiles, tpu_weights
from moe.dispatch.backends.packed import PackedWeights
from moe.dispatch.backends.tpu_kernel import Factors, grouped_products
from moe.dispatch.ffn import ExpertWeights, activate
from moe.layers.moe_layer import MoELayer
from moe.parallel import target
from moe.parallel.mesh import make_mesh
from tests.dispatch.test_gated_kernels import SIZES
from tests.helpers import rounded, slow_case, tiny_model

pytest.importorskip("qwix")


@pytest.mark.parametrize(
    ("precision", "transposed", "tile_k"),
    [
        slow_case("int8", False, 256),
        slow_case("int8", True, 128),
        slow_case("float8", True, 256),
        ("float8", False, 128),
    ],
)
def test_values_and_gradients(precision, transposed, tile_k, rng, monkeypatch):
    """Values and gradients are those of rounded factors. The 200 columns are one block and part of another, K is one
    block or two, and the rows' gradient contracts all 200 columns as one block."""
    monkeypatch.setattr(tpu, "grouped_products", functools.partial(tpu.grouped_products, interpret=True))
    tiles = {256: (128, tile_k, 128), 200: (128, 200, 128)}
    monkeypatch.setattr(tpu, "_tiles", lambda kind, _, shape: tiles[shape[1]] if kind == "rows" else None)
    filled, groups = SIZES.sum(), np.repeat(np.arange(3), SIZES)
    rows = rng.normal(size=(512, 256)).astype(np.float32)
    rows[filled:] = np.nan
    gradient = rng.normal(size=(filled, 200)).astype(np.float32)
    matrices = rng.normal(size=(3, 256, 200)).astype(np.float32) * np.array([1, 9, 0.1], np.float32)[:, None, None]

    def product(rows, matrices):
        stored = matrices.swapaxes(1, 2) if transposed else matrices
        return tpu.quantized_matmul(rows, stored, jnp.asarray(SIZES), precision, transposed)[:filled]

    @jax.jit
    def run(rows, matrices, gradient):
        y, backward = jax.vjp(product, rows, matrices)
        return y, *backward(gradient)

    y, d_rows, d_matrices = run(rows, matrices, gradient)
    rows = rows[:filled]
    expected = (
        np.einsum("rd,rdf->rf", rounded(rows, -1, precision), rounded(matrices, 1, precision)[groups]),
        np.einsum("rf,rdf->rd", rounded(gradient, -1, precision), rounded(matrices, 2, precision)[groups]),
        _of_groups(rows, gradient),
    )
    for ours, reference in zip((y, d_rows[:filled], d_matrices), expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize(
    ("precision", "biases", "turned", "scaled"),
    [("int8", False, True, True), ("float8", True, False, False), ("int8", True, True, True)],
)
@pytest.mark.slow
def test_the_nonlinearity_in_kernels(precision, biases, turned, scaled, rng, monkeypatch):
    """Values and gradients are those of rounded factors, with results rounded to bfloat16 where kernels write them."""
    for module, name in ((gated, "activated"), (gated, "activation_gradients"), (tpu, "grouped_products")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    monkeypatch.setattr(target.Target, "runs_tpu_kernels", True)
    # 200 columns are padded to 256, whole lanes that alternate between the two halves.
    tiles = {"activated": (128, 256, 256), "gradients": (128, 256, 128), "rows": (128, 256, 128)}
    monkeypatch.setattr(tpu, "_tiles", lambda kind, *_: tiles.get(kind))
    up, gate, down = (jnp.asarray(rng.normal(size=(3, 256, 200)) / 16, jnp.bfloat16) for _ in range(3))
    both = tuple(jnp.asarray(rng.normal(size=(3, 200)), jnp.bfloat16) for _ in range(2)) if biases else None
    weights = ExpertWeights(up, gate, down, both, activation="swiglu", precision=precision)
    weights = PackedWeights(**vars(weights) | {"down": down if turned else down.swapaxes(1, 2)}, down_transposed=turned)
    filled, groups = SIZES.sum(), np.repeat(np.arange(3), SIZES)
    rows = jnp.asarray(rng.normal(size=(512, 256)), jnp.bfloat16)
    gradient = jnp.asarray(rng.normal(size=(filled, 256)), jnp.bfloat16)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, size=512), jnp.float32) if scaled else None

    def product(rows, weights, scale):
        return tpu.grouped_ffn(rows, jnp.asarray(SIZES), tpu.pack(weights), scale)[:filled]

    @jax.jit
    def run(rows, weights, scale, gradient):
        y, backward = jax.vjp(product, rows, weights, scale)
        return y, *backward(gradient)

    y, d_rows, d_weights, d_scale = run(rows, weights, scale, gradient)

    def exact(array):
        return np.asarray(array, np.float32)

    def stored(array):
        return exact(jnp.asarray(array, jnp.bfloat16))

    x, factor = exact(rows)[:filled], 1.0 if scale is None else exact(scale)[:filled, None]
    joined, down, gradient = np.concatenate([exact(up), exact(gate)], -1), exact(down), exact(gradient)
    products = np.einsum("rd,rdj->rj", rounded(x, -1, precision), rounded(joined, 1, precision)[groups])
    if both is not None:
        products += np.concatenate([exact(bias) for bias in both], -1)[groups]
    products = stored(products)
    hidden, activated = jax.vjp(functools.partial(activate, "swiglu"), products[:, :200], products[:, 200:])
    scaled_hidden = stored(hidden * factor)
    outputs = np.einsum("rf,rdf->rd", rounded(scaled_hidden, -1, precision), rounded(down, 2, precision)[groups])
    d_hidden = np.einsum("rd,rdf->rf", rounded(gradient, -1, precision), rounded(down, 1, precision)[groups])
    d_products = stored(np.concatenate(activated(jnp.asarray(d_hidden * factor)), -1))
    expected = [
        (y, outputs),
        (
            d_rows[:filled],
            np.einsum("rj,rdj->rd", *(rounded(d_products, -1, precision), rounded(joined, 2, precision)[groups])),
        ),
        (d_weights.down if turned else d_weights.down.swapaxes(1, 2), _of_groups(gradient, scaled_hidden)),
        (jnp.concatenate([d_weights.up, d_weights.gate], -1), _of_groups(x, d_products)),
    ]
    if scale is not None:
        expected.append((d_scale[:filled], np.sum(d_hidden * hidden, axis=-1)))
    if both is not None:
        found = jnp.concatenate(d_weights.biases, -1)
        expected.append((found, _of_groups(np.ones((filled, 1), np.float32), d_products)[:, 0]))
    for ours, reference in expected:
        np.testing.assert_allclose(exact(ours), reference, atol=1e-2 * np.abs(reference).max())
        assert np.sqrt(np.mean((exact(ours) - reference) ** 2) / np.mean(reference**2)) < 4e-3


def _of_groups(left, right):
    """For each group, the transpose of its rows times the same rows of the other array."""
    ends = np.cumsum(SIZES)
    return np.stack([left[end - size : end].T @ right[end - size : end] for end, size in zip(ends, SIZES, strict=True)])


@pytest.mark.parametrize("precision", ["int8", slow_case("float8")])
def test_what_kernels_with_the_nonlinearity_write(precision, rng):
    """They write the same products as the kernel without it, and the largest hidden activation, or gradient, of each
    row."""
    sizes, filled, tiles = jnp.asarray(SIZES), SIZES.sum(), (128, 256, 256)
    rows, gradient = (jnp.asarray(rng.normal(size=(512, 256)), jnp.bfloat16) for _ in range(2))
    joined, down = (jnp.asarray(rng.normal(size=(3, 256, columns)), jnp.bfloat16) for columns in (768, 384))

    def factors(rows, matrices):
        (rows, of_rows), (matrices, of_matrices) = (
            quantized.quantize(array, axis, precision) for array, axis in ((rows, -1), (matrices, 1))
        )
        return Factors(rows, matrices, scales=(of_rows, of_matrices), sums_dtype=quantized.TYPES[precision][1])

    @jax.jit
    def run(rows, gradient, joined, down):
        both = factors(rows, joined)
        forward = gated.activated(both, None, None, sizes, "swiglu", jnp.bfloat16, tiles, interpret=True)
        alone = grouped_products(both, sizes, jnp.bfloat16, tiles, interpret=True)
        backward = gated.activation_gradients(
            factors(gradient, down), forward[0], None, sizes, "swiglu", tiles, interpret=True
        )
        return forward, alone, backward

    (products, hidden, largest), alone, (d_products, again, d_scale, largest_gradient) = run(
        rows, gradient, joined, down
    )
    np.testing.assert_array_equal(products[:filled], alone[:filled])
    np.testing.assert_array_equal(largest[:filled], jnp.max(jnp.abs(hidden), -1)[:filled])
    assert d_scale is None
    np.testing.assert_array_equal(again[:filled], hidden[:filled])
    np.testing.assert_array_equal(largest_gradient[:filled], jnp.max(jnp.abs(d_products), -1)[:filled])


@pytest.mark.parametrize(
    ("precision", "mesh"),
    [
        ("float8", MeshConfig(data=1, fsdp=4, tensor=2)),
        slow_case("int8", MeshConfig(data=2, fsdp=4)),
        slow_case("int8", MeshConfig(data=1, fsdp=4, tensor=2)),
        slow_case("float8", MeshConfig(data=2, fsdp=4)),
    ],
    ids=str,
)
def test_shards_are_quantised_before_they_are_gathered(precision, mesh, rng, monkeypatch):
    """Outputs and gradients are those of matrices quantised as a whole, and gathers move at most one byte per
    number."""
    kind = {"int8": "TPU v5 lite", "float8": "TPU7x"}[precision]
    monkeypatch.setattr(target, "current", lambda: target.Target("tpu", kind))
    monkeypatch.setattr(tpu, "_tiles", lambda *_: None)
    config = tiny_model(dispatch="dropless", low_precision=precision, gate="mixtral", activation="swiglu", d_model=32)
    graphdef, parameters = nnx.split(MoELayer(config, rngs=nnx.Rngs(0)))
    x, target_of_x = (jnp.asarray(rng.normal(size=(8, 12, 32)), jnp.float32) for _ in range(2))

    def loss(parameters, x):
        y = nnx.merge(graphdef, parameters)(x)[0]
        return jnp.sum(y * target_of_x), y

    def run(is_gathered_in_products):
        monkeypatch.setattr(tpu_weights, "are_gathered_in_products", lambda _: is_gathered_in_products)
        gradients = jax.grad(loss, argnums=(0, 1), has_aux=True)
        with jax.set_mesh(make_mesh(mesh)):
            arguments = nnx.to_pure_dict(parameters), x
            traced = jax.jit(gradients).trace(*arguments)
            return jax.tree.leaves(traced.lower().compile()(*arguments)), str(traced.jaxpr)

    (whole, plain), (shards, text) = run(False), run(True)
    for ours, reference in zip(shards, whole, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5 * np.abs(reference).max())
    gathered = [re.findall(r"(\w+)\[4,32,\d\d+\] = all_gather\[", each) for each in (plain, text)]
    name = {"int8": "i8", "float8": "f8_e4m3fn"}[precision]
    assert gathered == [["f32"] * 2, [name] * 4]  # up with gate and down; again for the rows' gradients
    assert len(re.findall(r"reduce_scatter\[", text)) == len(re.findall(r"reduce_scatter\[", plain)) == 2


@pytest.mark.parametrize("contracted", [14336, 28672, 2880, 1408])
def test_tiles_hold_whole_blocks_of_k(contracted):
    v6e = tpu_tiles.Device(918e12, 1640e9, 28 * 2**20)
    tiles = tpu_tiles.fastest_tiles("rows", 24576, (8, contracted, 4096), v6e, 1)
    assert contracted % tiles[1] == 0
