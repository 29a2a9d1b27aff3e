"""Norms, rotary positions, attention, FFN and embeddings against plain loops, and invariances."""

import dataclasses
import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import ModelConfig
from moe.config.mixers import GroupedQuery
from moe.config.rope_section import RopeScalingConfig
from moe.conformance import reference
from moe.dispatch.ffn import ExpertDropout, activate
from moe.layers.attention.scoring import Rotation
from moe.layers.embedding import Embedding
from moe.layers.ffn import DenseFFN, SharedExpert
from moe.layers.inputs import Dropout, Rows, Site
from moe.layers.mixers.attention import Attention
from moe.layers.norms import LayerNorm, RMSNorm
from moe.layers.parameter import matrix
from moe.models.decoder import Transformer
from moe.parallel.parameters import matmul, times
from tests import reference_attention
from tests.helpers import random_parameters, tiny_model

CONFIG_100 = ModelConfig(rope_theta=100.0)


def _params(module) -> dict:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def test_rms_norm(rng):
    norm = RMSNorm(6, 1e-3)
    norm.scale[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    x = rng.normal(size=(2, 3, 6)).astype(np.float32)
    expected = [[reference_attention.rms_norm(token, np.asarray(norm.scale[...]), 1e-3) for token in row] for row in x]
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_rms_norm_by_hand():
    # mean of squares (9 + 16 + 0 + 0)/4 = 6.25, root 2.5.
    np.testing.assert_allclose(RMSNorm(4, 0.0)(jnp.asarray([3.0, 4.0, 0.0, 0.0])), [1.2, 1.6, 0, 0], rtol=1e-6)


def test_layer_norm_by_hand():
    # Minus the mean of 5: (-3, -1, 1, 3), mean square 5; with epsilon 4 the root is 3.
    norm = LayerNorm(4, 4.0)
    norm.scale[...], norm.bias[...] = jnp.asarray([1.0, 2.0, 3.0, 0.0]), jnp.asarray([0.0, 0.0, 1.0, 7.0])
    np.testing.assert_allclose(norm(jnp.asarray([2.0, 4.0, 6.0, 8.0])), [-1, -2 / 3, 2, 7], rtol=1e-6)
    assert type(RMSNorm.of(ModelConfig(layer_norm=True))) is LayerNorm


def test_rms_norm_in_bfloat16_is_that_of_float32_rounded_once(rng):
    x = jnp.asarray(rng.normal(size=(5, 16)) * 30, jnp.bfloat16)
    norm = RMSNorm(16, 1e-5)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_rotate(rng):
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 50, size=(2, 5))
    expected = [
        [[reference_attention.rope(head, int(positions[b, t]), 100.0) for head in x[b, t]] for t in range(5)]
        for b in range(2)
    ]
    rotate = Rotation.of(CONFIG_100)
    np.testing.assert_allclose(rotate(jnp.asarray(x), jnp.asarray(positions)), expected, rtol=1e-4, atol=1e-5)


def test_rotate_by_hand():
    # H = 4, theta 100: pair (0, 2) turns by the position, pair (1, 3) by a tenth of it (100^(-2/4)).
    head, position = jnp.asarray([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4), jnp.asarray([[2]])
    expected = [math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2)]
    np.testing.assert_allclose(Rotation.of(CONFIG_100)(head, position).reshape(4), expected, rtol=1e-6)
    # A base of its own is not scaled.
    scaled = ModelConfig(rope_theta=7.0, rope_scaling=RopeScalingConfig(kind="linear", factor=4.0))
    np.testing.assert_allclose(Rotation.of(scaled, theta=100.0)(head, position).reshape(4), expected, rtol=1e-6)


def test_rotated_products_depend_on_relative_positions_alone(rng):
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    rotate = Rotation.of(ModelConfig())

    def product(i, j):
        return float(jnp.sum(rotate(query, jnp.asarray([[i]])) * rotate(key, jnp.asarray([[j]]))))

    assert product(7, 3) == pytest.approx(product(104, 100), rel=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), rel=1e-2)
    assert product(7, 3) != pytest.approx(product(3, 7), rel=1e-2), "a rotation has a direction"


def _attention(config) -> Attention:
    """Attention whose norm scales and sizes make it neither uniform nor one-hot."""
    module = Attention(config, GroupedQuery.of(config, window=config.sliding_window), rngs=nnx.Rngs(0))
    for name in ("query", "key", "value", "out"):
        getattr(module, name)[...] *= 1.5
    for name, seed in (("query_norm", 1), ("key_norm", 2)):
        if config.qk_norm != "none":
            scale = getattr(module, name).scale
            scale[...] = 1 + jax.random.uniform(jax.random.key(seed), scale[...].shape)
    return module


# A row of two documents and padding, and a row of a single document.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]])


def _run(module, x, segment_ids=SEGMENTS, positions=POSITIONS):
    def attend(x, rows):
        return module.join(module.prefill(x, rows)[0], x)

    segment_ids = jnp.asarray(segment_ids)
    return np.asarray(jax.jit(attend)(jnp.asarray(x), Rows(segment_ids, segment_ids, jnp.asarray(positions))))


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_heads": 4, "num_kv_heads": 4},
        {"num_heads": 4, "num_kv_heads": 2},
        {"num_heads": 3, "num_kv_heads": 1},
        {"sliding_window": 1},
        {"sliding_window": 3},
        {"qk_norm": "head"},
        {"qk_norm": "full", "rope_theta": 50.0},
    ],
    ids=str,
)
def test_attention_equals_the_oracle(overrides, rng):
    config = tiny_model(**overrides)
    module = _attention(config)
    x = rng.normal(size=(2, 8, config.d_model)).astype(np.float32)
    p = jax.tree.map(np.asarray, _params(module))
    scales = {}
    if config.qk_norm != "none":
        scales = {"query_scale": p["query_norm"]["scale"], "key_scale": p["key_norm"]["scale"]}
    expected = reference_attention.attention(
        x,
        p["query"],
        p["key"],
        p["value"],
        p["out"],
        SEGMENTS,
        POSITIONS,
        theta=config.rope_theta,
        window=config.sliding_window,
        norm=config.qk_norm,
        epsilon=config.norm_eps,
        **scales,
    )
    np.testing.assert_allclose(_run(module, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_documents_of_one_row_never_see_each_other(qk_norm, rng):
    module = _attention(tiny_model(qk_norm=qk_norm))
    x = rng.normal(size=(2, 8, 16)).astype(np.float32)
    changed = x.copy()
    changed[0, :3] += 5.0
    before, after = _run(module, x), _run(module, changed)
    np.testing.assert_array_equal(before[0, 3:], after[0, 3:])
    np.testing.assert_array_equal(before[1], after[1])
    assert (np.abs(before[0, :3] - after[0, :3]) > 1e-3).any()
    # Padding does not reach a document either.
    changed = x.copy()
    changed[0, 7] += 5.0
    np.testing.assert_array_equal(before[0, :7], _run(module, changed)[0, :7])


def test_a_packed_document_is_what_it_is_alone(rng):
    module = _attention(tiny_model())
    x = rng.normal(size=(1, 8, 16)).astype(np.float32)
    alone = _run(module, x[:, 3:7], SEGMENTS[:1, 3:7], POSITIONS[:1, 3:7])
    np.testing.assert_allclose(_run(module, x, SEGMENTS[:1], POSITIONS[:1])[:, 3:7], alone, rtol=1e-5, atol=1e-6)


def test_attention_is_causal(rng):
    module = _attention(tiny_model())
    x = rng.normal(size=(2, 8, 16)).astype(np.float32)
    changed = x.copy()
    changed[1, 5] += 5.0
    before, after = _run(module, x), _run(module, changed)
    np.testing.assert_array_equal(before[1, :5], after[1, :5])
    assert (np.abs(before[1, 5:] - after[1, 5:]).max(-1) > 1e-3).all()


def test_a_window_of_three_sees_the_token_itself_and_two_before(rng):
    module = _attention(tiny_model(sliding_window=3))
    x = rng.normal(size=(2, 8, 16)).astype(np.float32)
    changed = x.copy()
    changed[1, 2] += 5.0
    moved = np.abs(_run(module, x)[1] - _run(module, changed)[1]).max(-1)
    np.testing.assert_array_equal(moved > 0, [False, False, True, True, True, False, False, False])


@pytest.mark.parametrize("overrides", [{"relative_buckets": 8}, {}], ids=str)
def test_the_scale_of_the_scores_is_the_one_that_is_set(overrides, rng):
    """Softmax of 0.3·query·key with relative (here without a bias) and with rotary positions, for whole rows and for
    the last token by the cache."""
    module = _attention(tiny_model(**overrides, num_kv_heads=4, attention_scale=0.3))
    plain = _attention(tiny_model(**overrides, num_kv_heads=4))
    x, ids = jnp.asarray(rng.normal(size=(1, 5, 16)), jnp.float32), jnp.ones((1, 5), jnp.int32)
    positions = jnp.arange(5)[None]
    query, key, value = map(np.asarray, plain.project_cached(x, positions))
    scores = np.where(np.tri(5, dtype=bool), 0.3 * np.einsum("tnh,unh->ntu", query[0], key[0]), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("ntu,unh->tnh", weights, value[0])
    heads, _ = module.prefill(x, Rows(ids, ids, positions))
    np.testing.assert_allclose(heads[0], expected, rtol=1e-4, atol=1e-5)
    scaled, key, value = module.project_cached(x, positions)
    last = module.attend_cached(scaled[:, -1:], key, value, jnp.ones((1, 1, 1, 5), bool))
    np.testing.assert_allclose(last[0, 0], expected[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "gated"), [("swiglu", True), ("geglu", True), ("gelu", False), ("relu", False)])
def test_activations_and_dense_ffn(name, gated, rng):
    values = np.linspace(-3, 3, 7)
    # The tanh approximation of GELU, as in T5.
    gelu = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in values]
    curve = {"swiglu": [v / (1 + math.exp(-v)) for v in values], "relu": [max(v, 0.0) for v in values]}.get(name, gelu)
    up = jnp.full(7, 2.0) if gated else jnp.asarray(values, jnp.float32)
    gate = jnp.asarray(values, jnp.float32) if gated else None
    np.testing.assert_allclose(activate(name, up, gate), (2 if gated else 1) * np.array(curve), rtol=1e-5, atol=1e-6)

    config = tiny_model(activation=name)
    ffn = DenseFFN(config, config.d_ff, rngs=nnx.Rngs(0))
    assert (ffn.gate is not None) == gated
    x = jnp.asarray(rng.normal(size=(2, 3, 16)), jnp.float32)
    p = _params(ffn)
    apply = jax.jit(lambda v: reference.ffn(v, p["up"], p.get("gate"), p["down"], name))
    expected = [[apply(token) for token in row] for row in x]
    np.testing.assert_allclose(ffn(x), expected, rtol=1e-5, atol=1e-6)


def test_sites_of_a_layer_draw_independent_dropout_masks():
    drop = Dropout(0.5, jax.random.key(0))
    kept = [np.asarray(drop.at(site)(jnp.ones(64))) for site in Site]
    assert all(set(values.tolist()) == {0.0, 2.0} for values in kept)
    assert all((a != b).any() for a, b in itertools.combinations(kept, 2))


def test_gradients_of_attention_biases_are_sums_in_float32():
    """4095 gradients of 1, whose sum in bfloat16 is 4096."""
    module = _attention(tiny_model(attention_bias="all"))
    graphdef, parameters = nnx.split(module)
    x = jnp.ones((1, 4095, 16), jnp.bfloat16)

    @jax.jit
    @jax.grad
    def gradients(parameters):
        module = nnx.merge(graphdef, parameters)
        heads = module.project_query(x, None), *module.project_keys(x, None)
        joined = module.join(jnp.ones((1, 4095, 4, 6), jnp.bfloat16), x)
        return sum(jnp.sum(part.astype(jnp.float32)) for part in (*heads, joined))

    found = nnx.to_pure_dict(gradients(parameters))
    for name in ("query_bias", "key_bias", "value_bias", "out_bias"):
        np.testing.assert_array_equal(found[name], 4095.0)


def test_factors_are_not_rounded_to_bfloat16():
    """0.22 as a bfloat16 is 0.12 % smaller, 1.702 is 0.07 % larger, and 1 - 0.1 is 0.18 % smaller. The mean over
    numbers that are each rounded once shows a factor to 0.01 %."""
    x = jnp.linspace(1, 2, 4096, dtype=jnp.bfloat16)[None, :, None] * jnp.ones((1, 1, 16), jnp.bfloat16)
    config = tiny_model(dtype="bfloat16", embedding_scale=0.22, residual_scale=0.22, logit_scale=0.22)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    block, embedding = model.segment_0.block_0, Embedding(config, rngs=nnx.Rngs(0))
    hidden, drop = jnp.full((100, 1000), 1.0078125, jnp.bfloat16), Dropout(0.1, jax.random.key(0), Site.FFN_HIDDEN)
    ids, rows = jnp.arange(48)[None], dataclasses.replace(ExpertDropout(jax.random.key(0), 0.1), rows=jnp.arange(100))

    def mean(x):
        return np.abs(np.asarray(x, np.float64)).mean()

    assert times(x, 0.22).dtype == jnp.bfloat16
    for got, want in (
        (mean(times(x, 0.22)), 0.22 * mean(x)),
        (mean(model.scaled(x)), 0.22 * mean(x)),
        (mean(block.attention_residual.write(jnp.zeros_like(x), x)), 0.22 * mean(x)),
        (mean(model.embed(ids, embedding)), 0.22 * mean(embedding(ids, x.dtype))),
    ):
        assert got == pytest.approx(want, rel=3e-4)
    for apply in (drop, rows):  # 1.0078125 / 0.9 = 143.33 / 128; over bfloat16's 0.8984375 it would be 144 / 128
        assert set(np.unique(np.asarray(apply(hidden), np.float64)).tolist()) == {0.0, 143 / 128}
    # -3 · 1.702 = -5.106 is -5.09375 in bfloat16; -3 · 1.703125 = -5.109375 would be -5.125.
    gate = jnp.full(8, -3, jnp.bfloat16)
    found = activate("swiglu_clamped", jnp.zeros_like(gate), gate)[0]
    assert float(found) == pytest.approx(-3 / (1 + math.exp(5.09375)), rel=0.005)


def test_the_weight_of_a_shared_expert_has_a_gradient_in_float32(rng):
    """Its gradient is a sum over D of y·dy; in bfloat16 every addition would be rounded, to within about 1 %."""
    x, y, dy = (jnp.asarray(rng.normal(size=(1, 64, 512)), jnp.bfloat16) for _ in range(3))

    def weighted(gate):
        shared = types.SimpleNamespace(dense=lambda _: y, gate=gate)
        return jnp.sum(dy.astype(jnp.float32) * SharedExpert.__call__(shared, x).astype(jnp.float32))

    x64, products = np.asarray(x[0], np.float64), (np.asarray(y, np.float64) * np.asarray(dy, np.float64))[0]
    want = x64.T @ products.sum(-1, keepdims=True) / 4  # the slope of the sigmoid at 0
    found = jax.grad(weighted)(jnp.zeros((512, 1)))
    assert np.linalg.norm(found - want) < 3e-3 * np.linalg.norm(want)


def test_embedding_looks_up_its_table(rng):
    config = tiny_model()
    embedding = Embedding(config, rngs=nnx.Rngs(0))
    tokens = rng.integers(0, config.vocab_size, size=(2, 5))
    x = embedding(jnp.asarray(tokens), jnp.dtype("float32"))
    np.testing.assert_array_equal(x, np.asarray(embedding.table[...])[tokens])
    assert embedding(jnp.asarray(tokens), jnp.dtype("bfloat16")).dtype == jnp.bfloat16


def test_embedding_gradients_of_frequent_tokens_are_sums_in_float32():
    """Token 3 occurs 4096 times with a gradient of 1; in bfloat16, 256 + 1 is 256."""
    graphdef, parameters = nnx.split(Embedding(tiny_model(), rngs=nnx.Rngs(0)))
    tokens = jnp.full((8, 512), 3).at[0, 0].set(1)

    @jax.jit
    @jax.grad
    def gradient(parameters):
        return jnp.sum(nnx.merge(graphdef, parameters)(tokens, jnp.dtype("bfloat16")).astype(jnp.float32))

    (table,) = jax.tree.leaves(gradient(parameters))
    counts = np.zeros(len(table))
    counts[[1, 3]] = 1, 4096  # 4095, rounded to bfloat16 once
    np.testing.assert_array_equal(table, np.broadcast_to(counts[:, None], table.shape))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_use_the_embedding_if_tied_and_a_separate_matrix_otherwise(tied):
    config = tiny_model(tie_embeddings=tied)
    graphdef, parameters = random_parameters(config)
    output = nnx.merge(graphdef, parameters).output_matrix()
    table = parameters["embedding"]["table"]
    np.testing.assert_array_equal(output, table.T if tied else parameters["unembedding"]["kernel"])
    assert output.shape == (config.d_model, config.vocab_size)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_parameter(tied):
    shapes = nnx.eval_shape(lambda: Transformer(tiny_model(tie_embeddings=tied), rngs=nnx.Rngs(0)))
    assert ("unembedding" in _params(shapes)) == (not tied)


@pytest.mark.usefixtures("drawn_parameters")
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_matrices_are_truncated_normal(scale):
    values = np.asarray(matrix(nnx.Rngs(0), (400, 100), jax.P(), fan_in=400, scale=scale)[...])
    sigma = math.sqrt(scale / 400)
    assert np.abs(values).max() <= 2 * sigma
    assert np.abs(values).max() > 1.9 * sigma
    # A normal truncated at two sigma has standard deviation 0.8796 sigma; 40,000 draws give it to about half a percent.
    assert values.std() == pytest.approx(0.8796 * sigma, rel=0.02)
    assert abs(values.mean()) < 5 * sigma / math.sqrt(values.size)
    assert values.dtype == np.float32


@pytest.mark.usefixtures("drawn_parameters")
def test_every_matrix_is_scaled_by_its_own_fan_in():
    """Standard deviation 0.8796·sqrt(scale/fan_in), where fan_in is the number of inputs that an output sums over."""
    config = tiny_model(d_model=64, num_heads=8, num_kv_heads=4, head_dim=16, d_ff=160, moe_d_ff=96, init_scale=0.5)
    model = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(0)))))()
    block = model["segment_0"]["block_0"]
    fan_in = {
        (("attention", "query"), 64),
        (("attention", "key"), 64),
        (("attention", "value"), 64),
        (("attention", "out"), 8 * 16),
        (("moe", "experts", "up"), 64),
        (("moe", "experts", "gate"), 64),
        (("moe", "experts", "down"), 96),
    }
    for path, size in fan_in:
        values = block
        for name in path:
            values = values[name]
        assert float(np.std(values)) == pytest.approx(0.8796 * math.sqrt(0.5 / size), rel=0.05), path
    # The layers of a stack are drawn independently.
    query = np.asarray(block["attention"]["query"])
    assert (query[0] != query[1]).mean() > 0.99


@pytest.mark.parametrize("shape", [(12, 8), (3, 4, 8)])
def test_the_product_with_a_matrix_has_the_gradients_of_plain_products(rng, shape):
    x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, (8, 6)))
    pair = [jax.value_and_grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(x, w))), (0, 1))(x, w) for f in (matmul, jnp.matmul)]
    jax.tree.map(lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6), *pair)


def test_no_product_of_the_ffn_reads_its_rows_transposed_on_cpu():
    """Otherwise XLA on CPU would compute the gradients of the matrices from rows [F,R] that it writes column by
    column."""
    graphdef, parameters = nnx.split(DenseFFN(tiny_model(), 32, rngs=nnx.Rngs(0)), nnx.Param)
    x = jnp.ones((2, 16, tiny_model().d_model))
    loss = jax.grad(lambda parameters, x: jnp.sum(nnx.merge(graphdef, parameters)(x) ** 2), (0, 1))
    text = jax.jit(loss).lower(parameters, x).compile().as_text()
    contracted = re.findall(r" dot\(.*lhs_contracting_dims=\{(\d)\}", text)
    assert len(contracted) == 9  # three products, and the two gradients of each
    assert set(contracted) == {"1"}
