"""TPU kernels that also compute the nonlinearity of a gated FFN, interpreted on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch.backends import gated, packed, tpu, tpu_tiles
from moe.dispatch.backends.tpu_kernel import Factors
from moe.dispatch.backends.tpu_weights import Interleaved
from moe.dispatch.ffn import GATED_ACTIVATIONS, ExpertWeights, activate
from moe.parallel import target
from moe.planner import arithmetic
from tests.helpers import slow_case

#: Group sizes within 512 rows: two groups share blocks of 128 rows, one is empty, the last rows are in no group.
SIZES = np.array([200, 0, 250], np.int32)


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernels in Pallas' interpreter, with small tiles."""
    for module, name in ((gated, "activated"), (gated, "activation_gradients"), (tpu, "megablox_gmm")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    tiles = {"activated": (128, 256, 256), "gradients": (128, 256, 128), "rows": (128, 128, 128)}
    monkeypatch.setattr(tpu, "_tiles", lambda kind, *_: tiles.get(kind))
    monkeypatch.setattr(target.Target, "runs_tpu_kernels", True)


def _weights(rng, *, hidden, biases, activation):
    """Weights of three experts [256,hidden] in bfloat16, and the same in float32."""
    up, gate, down = (rng.normal(size=(3, 256, hidden)) / 16 for _ in range(3))
    both = tuple(rng.normal(size=(3, hidden)) for _ in range(2)) if biases else None
    arrays = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), (up, gate, down.swapaxes(1, 2), both))
    exact = jax.tree.map(lambda array: array.astype(jnp.float32), arrays)
    return tuple(ExpertWeights(*each, activation=activation) for each in (arrays, exact))


def _packed(weights, *, transposed):
    return tpu.pack(packed.with_transposed_down(weights) if transposed else weights)


def _oracle(rows, weights, scale):
    """Apply each group's expert to its rows in float32; rows of no group are left out."""
    ends, outputs = np.cumsum(SIZES), []
    for expert, (end, size) in enumerate(zip(ends, SIZES, strict=True)):
        x = rows[end - size : end]
        up, gate = x @ weights.up[expert], x @ weights.gate[expert]
        if weights.biases is not None:
            up, gate = (half + bias[expert] for half, bias in zip((up, gate), weights.biases, strict=True))
        hidden = activate(weights.activation, up, gate)
        outputs.append((hidden @ weights.down[expert]) * scale[end - size : end, None])
    return jnp.concatenate(outputs)


@pytest.mark.parametrize(
    ("activation", "hidden", "biases", "transposed", "scaled"),
    [
        ("swiglu_clamped", 200, True, True, True),  # padded to 256
        slow_case("geglu", 256, False, False, False),
        slow_case("swiglu", 256, False, True, True),
        slow_case("geglu_exact", 128, False, False, True),
        slow_case("reglu", 384, False, True, False),
    ],
)
def test_values_and_gradients(activation, hidden, biases, transposed, scaled, rng, interpreted):
    weights, exact = _weights(rng, hidden=hidden, biases=biases, activation=activation)
    filled = SIZES.sum()
    rows = jnp.asarray(rng.normal(size=(512, 256)), jnp.bfloat16).at[filled:].set(jnp.nan)
    gradient = jnp.asarray(rng.normal(size=(filled, 256)), jnp.bfloat16)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, size=512), jnp.float32) if scaled else None

    def ours(rows, weights, scale):
        return tpu.grouped_ffn(rows, jnp.asarray(SIZES), _packed(weights, transposed=transposed), scale)[:filled]

    def expected(rows, weights, scale):
        return _oracle(rows.astype(jnp.float32), weights, jnp.ones(512) if scale is None else scale)

    @jax.jit
    def run(rows, weights, exact, scale, gradient):
        y, backward = jax.vjp(ours, rows, weights, scale)
        y_exact, backward_exact = jax.vjp(expected, rows, exact, scale)
        return (y, backward(gradient)), (y_exact, backward_exact(gradient.astype(jnp.float32)))

    found, by_hand = run(rows, weights, exact, scale, gradient)
    for actual, right in zip(jax.tree.leaves(found), jax.tree.leaves(by_hand), strict=True):
        actual = np.asarray(actual, np.float32)
        actual, right = (actual[:filled], right[:filled]) if len(actual) == 512 else (actual, right)
        np.testing.assert_allclose(actual, right, atol=2e-2 * np.abs(right).max())


def test_the_nonlinearity_is_in_the_kernels(rng, interpreted):
    """Outside the kernels no logistic function is applied to an array of all rows."""
    weights, _ = _weights(rng, hidden=256, biases=False, activation="swiglu")
    rows = jnp.ones((512, 256), jnp.bfloat16)

    def ours(rows, weights):
        return jnp.sum(tpu.grouped_ffn(rows, jnp.asarray(SIZES), _packed(weights, transposed=True)))

    loss = jax.grad(ours, (0, 1))
    text = str(jax.make_jaxpr(loss)(rows, weights))
    outside = [line for line in text.splitlines() if "logistic" in line and "bf16[512" in line]
    assert text.count("pallas_call") >= 2
    assert not outside
    # Up and gate: forward and two gradients each; down: two gradients, since the output itself is not needed.
    flops = arithmetic.matmul_flops(jax.make_jaxpr(loss)(rows, weights).jaxpr)
    assert flops.total == 512 * 2 * 256 * 256 * (2 * 3 + 2)


@pytest.mark.parametrize("hidden", [128, 200, 384])
def test_lanes_of_up_and_gate_alternate(hidden, rng, interpreted):
    weights, _ = _weights(rng, hidden=hidden, biases=True, activation="swiglu")
    joined = tpu.pack(weights)
    padded = -(-hidden // 128) * 128
    assert joined.up.shape == (3, 256, 2 * padded)
    assert joined.down.shape == (3, padded, 256)
    np.testing.assert_array_equal(joined.up[..., :128], np.pad(weights.up, [(0, 0), (0, 0), (0, 200)])[..., :128])
    np.testing.assert_array_equal(joined.up[..., 128:256], np.pad(weights.gate, [(0, 0), (0, 0), (0, 200)])[..., :128])
    apart = joined.separated()
    for array, original in ((apart.up, weights.up), (apart.gate, weights.gate)):
        np.testing.assert_array_equal(array[..., :hidden], original)
        assert not np.any(array[..., hidden:])
    for array, original in zip(apart.biases, weights.biases, strict=True):
        np.testing.assert_array_equal(array[..., :hidden], original)


def test_shapes_that_fit_no_tiles_take_other_kernels(rng, interpreted, monkeypatch):
    weights, exact = _weights(rng, hidden=200, biases=True, activation="swiglu")
    monkeypatch.setattr(tpu, "_tiles", lambda *_: None)
    rows = jnp.asarray(rng.normal(size=(512, 256)), jnp.bfloat16)
    y = tpu.grouped_ffn(rows, jnp.asarray(SIZES), _packed(weights, transposed=True))[: SIZES.sum()]
    right = _oracle(rows.astype(jnp.float32), exact, jnp.ones(512))
    np.testing.assert_allclose(np.asarray(y, np.float32), right, atol=2e-2 * np.abs(right).max())


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_kernels_take_the_activations_that_pallas_lowers_for_tpus(activation, rng, monkeypatch):
    """Lowering needs no TPU. Pallas has no error function for TPUs, so that geglu_exact stays outside the kernels."""
    monkeypatch.setattr(target.Target, "runs_tpu_kernels", True)
    weights, _ = _weights(rng, hidden=256, biases=True, activation=activation)
    is_fused = isinstance(_packed(weights, transposed=True), Interleaved)

    def lower():
        weights, sizes, scale = jnp.ones((3, 256, 512), jnp.bfloat16), jnp.asarray(SIZES), jnp.ones(512)

        def both(rows):
            both, tiles = Factors(rows, weights), (128, 256, 256)
            joined, *_ = gated.activated(both, weights[:, 0], scale, sizes, activation, rows.dtype, tiles)
            both, tiles = Factors(rows, weights[..., :256]), (128, 256, 128)
            return gated.activation_gradients(both, joined, scale, sizes, activation, tiles)

        return jax.jit(both).trace(jnp.ones((512, 256), jnp.bfloat16)).lower(lowering_platforms=("tpu",)).as_text()

    if is_fused:
        assert lower().count("tpu_custom_call") >= 2
    else:
        with pytest.raises(NotImplementedError, match="erfc"):
            lower()


V5P = tpu_tiles.Device(459e12, 2765e9, 28 * 2**20, cores=2)


@pytest.mark.parametrize(
    ("rows", "experts", "width", "hidden", "share"),
    [
        (81920, 8, 4096, 14336, 1.05),  # Mixtral-8x7B
        (245760, 64, 2048, 1408, 1.17),  # DeepSeek-V2-Lite: 11 blocks of lanes for two cores
        (458752, 128, 2048, 768, 1.15),  # Qwen3-30B-A3B
        (262144, 32, 2880, 2944, 1.15),  # gpt-oss-20b, padded
        (65536, 32, 7168, 2048, 1.3),  # DeepSeek-V3
    ],
)
@pytest.mark.parametrize("kind", ["activated", "gradients"])
def test_tiles_of_kernels_add_little_work(kind, rows, experts, width, hidden, share):
    """On v5p, FLOPs are within a share of those of the filled rows, counting what an idle core could have computed."""
    columns = 2 * hidden if kind == "activated" else hidden
    tiles = tpu_tiles.fastest_tiles(kind, rows, (experts, width, columns), V5P)
    _, flops, moved = tpu_tiles.grid_work(kind, rows, (experts, width, columns), tiles, cores=2)
    needed = 2 * rows * width * columns
    assert tiles[1] == width
    assert flops <= share * needed
    assert 2 * moved / V5P.bandwidth <= share * needed / V5P.peak
