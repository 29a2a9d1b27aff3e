"""Implementations that never hold T x T scores or [B,T,V] logits equal the plain ones in values and gradients."""

import dataclasses
import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe.config import MeshConfig
from moe.layers.attention import attend, cpu, tpu
from moe.layers.attention.scoring import Scoring
from moe.objectives.text import Causal
from moe.parallel import partition_specs, target
from moe.parallel.mesh import make_mesh
from moe.planner import arithmetic
from moe.training import losses
from tests.helpers import collectives, slow_case

#: One window of less than a block, one of several, and none; the other combinations are slow tests.
FORMS = [
    (7, 1, "float32"),  # less than a block
    (40, 4, "float32"),  # more than two
    (0, 1, "bfloat16"),
]


@pytest.mark.parametrize(
    ("window", "kv_heads", "dtype"),
    [
        form if form in FORMS else slow_case(*form)
        for form in itertools.product([0, 1, 7, 40], [1, 4], ["float32", "bfloat16"])
    ],
)
def test_forms_of_attention_are_equal(dtype, window, kv_heads, monkeypatch):
    """JAX's attention over all T x T scores, the loop over blocks of queries, and the implementation for CPUs."""
    monkeypatch.setattr(attend, "largest_divisor", lambda length, largest: 16)  # 6 blocks of 96 positions
    monkeypatch.setattr(cpu, "_SMALLEST_BLOCK", 20)  # 5 blocks, the last of 16
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, 96, 4, 16), dtype)
    key, value = (jax.random.normal(keys[i], (2, 96, kv_heads, 16), dtype) for i in (1, 2))
    segment_ids = jnp.sort(jax.random.randint(keys[3], (2, 96), 0, 3), axis=1)

    def results(kind):
        def loss(query, key, value):
            output = attend.attend(query, key, value, segment_ids, kind=kind, scoring=Scoring(window)).astype(
                jnp.float32
            )
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

    of_cpu, in_blocks = results("full"), results("blocked")
    monkeypatch.setattr(target, "is_cpu", lambda: False)
    full = results("full")
    rtol, atol = (1e-4, 1e-5) if dtype == "float32" else (2e-2, 3e-2)
    for other in (of_cpu, in_blocks):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=rtol, atol=atol),
            full,
            other,
        )


#: Head dims of queries and of values, window, whether documents are packed. Other combinations are slow tests.
SPLASH = [(192, 128, 100, True)]


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "window", "packed"),
    [
        form if form in SPLASH else slow_case(*form)
        for form in [
            (*heads, window, packed)
            for heads in [(64, 64), (192, 128), (128, 128), (80, 80), (256, 256), (16, 240)]
            for window, packed in itertools.product([0, 1, 100, 130, 400], [False, True])
        ]
    ],
)
def test_splash_attention_equals_plain(head_dim, value_dim, window, packed):
    """The TPU kernels, interpreted, in 3 x 3 blocks of 128: values and gradients, including those of sinks."""
    length, scoring = 384, Scoring(window, scale=0.11)
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, length, 2, head_dim))
    key, value = (jax.random.normal(keys[i], (2, length, 1, dim)) for i, dim in ((1, head_dim), (2, value_dim)))
    sinks, segment_ids = jnp.array([0.5, -1.0]), jnp.ones((2, length), jnp.int32)
    if packed:  # documents of 70 and 314 tokens, and of 200 and 184
        segment_ids += jnp.arange(length) >= jnp.array([[70], [200]])
    assert tpu.block_sizes(length, window).block_q == 128

    def results(attention):
        def loss(query, key, value, sinks):
            output = attention(query, key, value, segment_ids, scoring=dataclasses.replace(scoring, sinks=sinks))
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(query, key, value, sinks)

    kernel = results(functools.partial(tpu.splash_attention, interpret=True))
    plain = results(functools.partial(attend.attend, kind="full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), kernel, plain)


def test_partial_gradients_of_queries_are_added():
    """Gradients from 3 blocks of keys are added up, not reduced over an axis of a five-dimensional array."""
    query, key, value = (jnp.ones((1, 384, heads, 64)) for heads in (2, 1, 1))

    def loss(query):
        heads = tpu.splash_attention(query, key, value, jnp.ones((1, 384), jnp.int32), Scoring(), interpret=True)
        return jnp.sum(heads)

    text = str(jax.make_jaxpr(jax.grad(loss))(query))
    assert re.search(r"name=_add_partials\b", text)
    assert not re.search(r":f32\[1,2,384,64\] = reduce_sum\[", text)


@pytest.mark.parametrize(("policy", "forward_kernels"), [("attention", 1), ("full", 2)])
def test_kept_attention_is_not_recomputed(policy, forward_kernels):
    query, key, value = (jnp.ones((1, 384, heads, 64)) for heads in (2, 1, 1))

    def loss(query):
        heads = tpu.splash_attention(query, key, value, jnp.ones((1, 384), jnp.int32), Scoring(), interpret=True)
        return jnp.sum(jnp.sin(heads))

    text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=partition_specs.REMAT_POLICIES[policy])))(query))
    assert len(re.findall(r"name=splash_mha_fwd", text)) == forward_kernels


def test_blocks_of_scores_cost_least():
    """Cost per query: (1 + ceil((window - 1) / side)) · (side + 256² / side); without a window half of all blocks.

    4096 tokens: 2.5 · (1024 + 64) = 2720 against 4.5 · (512 + 128) = 2880; window 128: 2 · (256 + 256) = 1024 against 2
    · (512 + 128) = 1280; window 4096 of 8192: 5 · (1024 + 64) = 5440 against 9 · (512 + 128) = 5760.
    """
    assert tpu.block_sizes(4096, 0).block_q == 1024
    assert tpu.block_sizes(4096, 128).block_q == 256
    assert tpu.block_sizes(8192, 4096).block_q == 1024
    assert tpu.block_sizes(4096, 0).use_fused_bwd_kernel
    assert not tpu.block_sizes(4096, 128).use_fused_bwd_kernel


def _gradients_of_splash():
    """Function from queries, keys and values of 384 tokens, in 3 blocks of 128, to their gradients."""

    def loss(query, key, value):
        segment_ids = jnp.ones((1, 384), jnp.int32)
        return jnp.sum(jnp.sin(tpu.splash_attention(query, key, value, segment_ids, Scoring(), interpret=True)))

    return jax.grad(loss, (0, 1, 2))


def test_long_rows_have_no_partial_gradients_of_queries(monkeypatch):
    """A partial gradient for each block of 1024 keys: 16 in rows of 16,384 tokens. Longer rows would need T²/1024
    numbers for each dimension of a head, so their queries get a kernel of their own."""
    assert tpu.block_sizes(2**14, 0).use_fused_bwd_kernel
    assert not tpu.block_sizes(2**15, 0).use_fused_bwd_kernel
    heads = jnp.ones((1, 384, 1, 64))
    assert "f32[3,1,384,64]" in str(jax.make_jaxpr(_gradients_of_splash())(heads, heads, heads))
    monkeypatch.setattr(tpu, "_MOST_PARTIALS", 2)
    assert "f32[3,1,384,64]" not in str(jax.make_jaxpr(_gradients_of_splash())(heads, heads, heads))


@pytest.mark.slow
def test_both_kernels_of_gradients_agree(monkeypatch):
    query, key, value = (jax.random.normal(jax.random.key(i), (1, 384, 1, 64)) for i in range(3))
    together = jax.jit(_gradients_of_splash())(query, key, value)
    monkeypatch.setattr(tpu, "_MOST_PARTIALS", 2)
    separate = jax.jit(_gradients_of_splash())(query, key, value)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), separate, together)


@pytest.mark.parametrize(
    ("kind", "shape", "value_dim", "runs"),
    [
        ("TPU v5", (1, 256, 2, 192), 128, True),
        ("TPU v5", (1, 256, 2, 64), 64, True),
        ("TPU v5", (1, 200, 2, 64), 64, False),  # no whole blocks
        ("TPU v5", (1, 256, 2, 72), 64, False),
        ("TPU v5", (1, 256, 2, 288), 64, False),
        ("TPU v3", (1, 256, 2, 128), 128, False),
    ],
)
def test_shapes_of_splash_attention(kind, shape, value_dim, runs, monkeypatch):
    monkeypatch.setattr(target, "current", lambda: target.Target("tpu", kind))
    assert tpu.runs_splash(jnp.zeros(shape), jnp.zeros((*shape[:3], value_dim))) == runs


def test_cudnn_gets_blocks_of_queries_with_their_mask(monkeypatch):
    """Without a GPU, XLA's attention replaces the kernel and receives the arguments that cuDNN would receive."""
    real, blocks = jax.nn.dot_product_attention, []

    def cudnn(query, key, value, bias, mask, *, scale, implementation):
        assert implementation == "cudnn"
        assert bias is None
        assert scale == 16**-0.5
        blocks.append(mask.shape)
        return real(query, key, value, mask=mask)

    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(attend, "largest_divisor", lambda length, largest: 16)
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (2, 64, 4, 16), jnp.bfloat16) for k in keys)
    segment_ids = jnp.repeat(jnp.arange(4), 16)[None].repeat(2, axis=0)
    full = attend.attend(query, key, value, segment_ids, kind="full", scoring=Scoring(9))
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    # A window of 9 and 16 queries need 24 keys; with blocks of 64 keys each quarter of the row gets all keys so far.
    for keys_of_a_window, seen in ((8, [24]), (64, [16, 32, 48, 64])):
        monkeypatch.setattr(attend, "_KEYS", keys_of_a_window)
        in_blocks = attend.attend(query, key, value, segment_ids, kind="blocked", scoring=Scoring(9))
        assert blocks == [(2, 1, 16, keys) for keys in seen]
        blocks.clear()
        np.testing.assert_allclose(full.astype(jnp.float32), in_blocks.astype(jnp.float32), rtol=0.02, atol=0.02)

    runs = attend.runs_cudnn
    assert runs(query, 16, 256)
    assert not runs(query, 16, 264)
    assert not runs(query, 15, 16)  # an odd length
    assert not runs(query.astype(jnp.float32), 16, 16)
    assert not runs(query, 16, 4)
    device.compute_capability = "8.0"
    assert runs(query, 16, 128)
    assert not runs(query, 16, 136)  # 128, and 8 for a sink
    for unable in ("7.5", "gfx90a"):
        device.compute_capability = unable
        assert not runs(query, 16, 16)


@pytest.mark.parametrize(("window", "sizes"), [(0, [1024] * 4), (128, [512])])  # quarters of the row; a loop's body
def test_blocks_of_cudnn_are_parts_of_a_row_unless_there_is_a_window(window, sizes, monkeypatch):
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    blocks = []

    def cudnn(query, key, value, bias, mask, *, scale, implementation):
        blocks.append(query.shape[1])
        return query

    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    heads = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.bfloat16)
    segment_ids = jnp.ones((1, 4096), jnp.int32)
    jax.eval_shape(lambda x: attend.attend(x, x, x, segment_ids, kind="blocked", scoring=Scoring(window)), heads)
    assert blocks == sizes


@pytest.mark.parametrize("prefix", [False, True])
def test_cudnn_gets_the_rows_of_a_device_within_a_pipeline(prefix, monkeypatch):
    """XLA cannot partition the kernel inside a pipeline: all mesh axes are manual where it is called."""
    calls = []

    def cudnn(query, key, value, bias, mask, *, scale, implementation):
        assert implementation == "cudnn"
        calls.append((query.shape, set(jax.sharding.get_abstract_mesh().manual_axes)))
        return query

    mesh = make_mesh(MeshConfig(data=2, pipeline=2), jax.devices()[:4])
    monkeypatch.setattr(target, "current", lambda: target.Target("gpu", "NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)

    def stage(x, segment_ids):
        scoring = Scoring(prefix=segment_ids if prefix else None)
        return attend.attend(x, x, x, segment_ids, kind="blocked", scoring=scoring)

    arrays = jax.ShapeDtypeStruct((4, 32, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((4, 32), jnp.int32)
    with jax.set_mesh(mesh):
        jax.eval_shape(jax.shard_map(stage, in_specs=(P(), P()), out_specs=P(), axis_names={"pipeline"}), *arrays)
    assert calls == [((2, 32, 2, 64), set(mesh.axis_names))]


@pytest.mark.parametrize(("window", "keys"), [(0, 4096 * 10 / 16), (128, 640), (2048, 2560), (4096, 4096 * 10 / 16)])
def test_keys_that_no_query_of_a_block_sees_are_skipped(window, keys):
    """A query meets 10/16 of 4096 keys on average in quarters of a causal row; with a window, the window's and its
    block's 512."""
    query, key = (jax.ShapeDtypeStruct((1, 4096, heads, 64), jnp.bfloat16) for heads in (4, 2))
    segment_ids = jnp.ones((1, 4096), jnp.int32)

    def heads(query, key):
        return attend.attend(query, key, key, segment_ids, kind="blocked", scoring=Scoring(window))

    flops = arithmetic.matmul_flops(jax.make_jaxpr(heads)(query, key).jaxpr).total
    assert flops == pytest.approx(2 * 2 * 4096 * keys * 4 * 64)


def _loss_inputs(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, matrix = jax.random.normal(keys[0], (8, 23, 16), dtype), jax.random.normal(keys[1], (16, 50), dtype)
    return hidden, matrix, jax.random.randint(keys[2], (8, 23), -10, 50)  # about a sixth have no target


def test_cross_entropy_by_hand():
    """Probabilities 1/4 and 3/4, targets 0 and 1; the last position has none."""
    logits, targets = jnp.log(jnp.asarray([[[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]]])), jnp.asarray([[0, 1, -1]])
    for axis in (None, 1):
        nll, known = losses.cross_entropy(logits, targets, axis)
        np.testing.assert_allclose(nll, np.full(nll.shape, -np.log(0.25) - np.log(0.75)), rtol=1e-6)
        np.testing.assert_array_equal(known, np.full(nll.shape, 2))
    assert Causal().count({"targets": targets}) == 2


def test_gradients_of_many_chunks_are_added_in_float32(rng, monkeypatch):
    """2048 positions in 256 chunks: sums in bfloat16 are off by a hundredth, 2^-9 for each chunk."""
    monkeypatch.setattr(losses, "_CHUNK", 8)
    hidden = jnp.asarray(rng.normal(size=(1, 2048, 32)) + 0.5, jnp.bfloat16)
    matrix = jnp.asarray(rng.normal(size=(32, 64)) * 0.2, jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 4, size=(1, 2048)), jnp.int32)

    def gradient(matrix):
        def loss(matrix):
            return jnp.sum(losses.token_cross_entropy(hidden.astype(matrix.dtype), matrix, targets))

        return jax.jit(jax.grad(loss))(matrix)

    exact = gradient(matrix.astype(jnp.float32))
    error = jnp.linalg.norm(gradient(matrix).astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert float(error) < 0.004


@pytest.mark.parametrize("dtype", ["float32", slow_case("bfloat16")])
def test_chunked_loss_equals_plain(dtype, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", 32)  # 6 chunks of 4 positions of 8 rows; the last position is padding
    hidden, matrix, targets = _loss_inputs(dtype)

    def results(loss):
        return jax.jit(jax.value_and_grad(lambda h, m: 0.3 * loss(h, m)[0], (0, 1)))(hidden, matrix)

    plain = results(lambda h, m: losses.cross_entropy(h @ m, targets))
    chunked = results(lambda h, m: losses.linear_cross_entropy(h, m, targets))
    rtol, atol = (1e-5, 1e-5) if dtype == "float32" else (2e-2, 2e-2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=rtol, atol=atol),
        plain,
        chunked,
    )
    nll, known = jax.jit(losses.linear_cross_entropy)(hidden, matrix, targets)  # without a gradient
    np.testing.assert_allclose(0.3 * nll, plain[0], rtol=1e-5)
    assert known == np.sum(np.asarray(targets) >= 0)
    by_row = jax.jit(losses.row_cross_entropy)(hidden, matrix, targets)
    single = [losses.cross_entropy(h[None] @ matrix, t[None]) for h, t in zip(hidden, targets, strict=True)]
    np.testing.assert_allclose(by_row, np.transpose(single), rtol=1e-5)


def test_the_loss_of_gpus_is_the_same_without_a_scatter(monkeypatch):
    hidden, matrix, targets = _loss_inputs()
    logits = 40 * hidden @ matrix  # some probabilities are 0 in float32

    def results(platform):
        monkeypatch.setattr(target, "current", lambda: target.Target(platform, platform))
        loss = jax.value_and_grad(lambda logits: losses.cross_entropy(logits, targets)[0])
        return loss(logits), "scatter" in str(jax.make_jaxpr(loss)(logits))

    of_cpu, of_gpu = results("cpu"), results("gpu")
    assert (of_cpu[1], of_gpu[1]) == (True, False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), of_cpu[0], of_gpu[0])


def test_chunked_loss_on_a_mesh(monkeypatch):
    """The same on 4 x 2 devices: logits of one chunk at a time, and one sum over devices after the last chunk."""
    monkeypatch.setattr(losses, "_CHUNK", 8)  # 6 chunks of 4 positions of each device's 2 rows
    hidden, matrix, targets = _loss_inputs()

    def gradient(hidden, matrix, targets):
        return jax.grad(lambda h, m: losses.linear_cross_entropy(h, m, targets)[0], (0, 1))(hidden, matrix)

    alone = jax.jit(gradient)(hidden, matrix, targets)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = partition_specs.BATCH, jax.P(None, "tensor"), partition_specs.BATCH
    with jax.set_mesh(mesh):
        where = partition_specs.shardings(mesh, specs)
        split = jax.jit(gradient, in_shardings=where, out_shardings=where[:2])
        compiled = split.lower(hidden, matrix, targets).compile()
        spread = compiled(*jax.device_put((hidden, matrix, targets), where))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), alone, spread)
    text = compiled.as_text() or ""
    sums = [c for c in collectives(text, 8) if (16, 25) in c.shapes or (1, 16, 25) in c.shapes]
    assert len(sums) == 1, sums
    assert "while" not in sums[0].text.split("op_name=")[1], sums[0].text
    assert not [c for c in collectives(text, 8) if c.kind not in ("all-reduce", "reduce-scatter")]
    assert "f32[2,4,25]" in text
    assert "f32[2,23,25]" not in text
