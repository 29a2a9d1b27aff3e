"""Dropless dispatch equals einsum without drops, for any load, mesh and kernel."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from moe.config import MeshConfig
from moe.config.exchange import AllGather, AllToAll
from moe.dispatch import backends
from moe.dispatch.backends import (
    backend,
    cpu,
    gated,
    gpu,
    grouped_ffn,
    packed,
    row_blocks,
    tpu,
    tpu_tiles,
    tpu_weights,
    whole_tiles,
)
from moe.dispatch.buffers import make_plan, plan_in_chunks
from moe.dispatch.ffn import ExpertDropout, ExpertWeights
from moe.dispatch.modes import dispatch
from moe.dispatch.peers import Peers
from moe.layers.ffn import Experts
from moe.parallel import partition_specs, target
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_specs
from moe.planner import arithmetic, program
from tests.helpers import routed, slow_case, tiny_model, trace_for_accelerators

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def _case(rng, groups, tokens, num_experts, k, load="random"):
    """Routing by random logits with some padding; "one": the first choice of every token is expert 1."""
    logits = rng.normal(size=(groups, tokens, num_experts))
    if load == "one":
        logits[..., 1 % num_experts] += 100.0
    mask = np.zeros((groups, tokens), bool) if load == "padding" else rng.random((groups, tokens)) < 0.9
    routing = routed("mixtral", logits, mask=mask, k=k)
    weights = jnp.where(routing.chosen, rng.uniform(0.5, 1.5, routing.chosen.shape), 0.0)
    return dataclasses.replace(routing, combine_weights=weights.astype(jnp.float32))


_DROPOUT = (None, ExpertDropout(jax.random.key(3), 0.4))


@functools.cache
def _program(mode, config, variant):
    """Parameters of experts, and a jitted function of x, parameters and a routing; compiled once per shape and mesh."""
    graphdef, parameters = nnx.split(Experts(config, rngs=nnx.Rngs(0)))

    def loss(x, parameters, weights, routing):
        sent = dataclasses.replace(routing, combine_weights=weights)
        capacity = weights.shape[1] * weights.shape[2]
        chunks = 3 if "chunks" in variant else 1
        exchange = AllGather(chunks) if "gathered" in variant else AllToAll(chunks)
        if "hosts" in variant:
            exchange = dataclasses.replace(exchange, hosts=int(variant[-1]))
        plan = plan_in_chunks(sent, capacity, exchange)
        experts = nnx.merge(graphdef, parameters)
        weights = dataclasses.replace(experts.weights, dropout=_DROPOUT["dropout" in variant])
        y = dispatch(mode, x, sent, plan, weights)
        return jnp.sum(jnp.sin(y)), y

    return parameters, jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def _value_and_gradients(mode, config, routing, x, variant=""):
    """y, and the gradients of x, of the experts and of the combine weights.

    Args:
        variant: names what a test has patched, so that it does not get a cached program.
    """
    parameters, function = _program(mode, config, variant)
    if not jax.sharding.get_abstract_mesh().empty:
        where = partition_specs.shardings(jax.sharding.get_mesh(), parameter_specs(parameters))
        parameters = jax.device_put(nnx.to_pure_dict(parameters), where)
    (_, y), gradients = function(x, parameters, routing.combine_weights, routing)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), (y, *jax.tree.leaves(gradients)))


def _assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(np.abs(e).max(), 1e-6))


@pytest.mark.parametrize(
    ("groups", "tokens", "num_experts", "k", "load", "dtype"),
    [
        (2, 40, 5, 2, "random", "float32"),  # several sizes of row blocks, an expert count that is no power of two
        slow_case(2, 90, 5, 2, "random", "float32"),  # many sizes
        slow_case(1, 150, 4, 1, "one", "float32"),  # many row blocks of one expert, three experts empty
        slow_case(3, 7, 3, 3, "random", "float32"),  # K = E
        slow_case(1, 20, 4, 2, "padding", "float32"),
        slow_case(1, 16, 4, 2, "random", "bfloat16"),
    ],
)
def test_equals_einsum_without_drops(groups, tokens, num_experts, k, load, dtype, rng):
    config = tiny_model(num_experts=num_experts)
    routing = _case(rng, groups, tokens, num_experts, k, load)
    x = jnp.asarray(rng.normal(size=(groups, tokens, config.d_model)), dtype)
    results = [_value_and_gradients(mode, config, routing, x) for mode in ("einsum", "dropless")]
    _assert_close(results[1], results[0], TOLERANCE[dtype])
    assert (np.abs(results[1][0]).max() > 0) == (load != "padding")


def test_gather_on_cpu_computes_filled_rows_only(rng):
    # Two groups that share a buffer, and a capacity far above the load.
    config = tiny_model(num_experts=3)
    routing = _case(rng, 2, 16, 3, 2)
    x = jnp.asarray(rng.normal(size=(2, 16, config.d_model)), jnp.float32)
    results = [_value_and_gradients(mode, config, routing, x) for mode in ("einsum", "gather")]
    _assert_close(results[1], results[0], TOLERANCE["float32"])


@pytest.mark.parametrize("sizes", [(0, 37, 3, 90), slow_case((0, 0, 0, 130)), slow_case((60, 0, 40, 0))])
@pytest.mark.parametrize("kernel", ["row_blocks", "ragged_dot"])
def test_kernels_are_one_function(kernel, sizes, rng, monkeypatch):
    """lax.ragged_dot, used on accelerators, and the loop over row blocks, used on CPUs, equal a loop over groups.

    Uninitialised buffers are filled with NaN: values that no row block wrote must not reach a result.
    """
    if kernel == "ragged_dot":
        trace_for_accelerators(monkeypatch)
    garbage = functools.partial(jax.tree.map, lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype))
    monkeypatch.setattr(row_blocks, "_unwritten", lambda tree, sizes, dtype=None: garbage(tree))
    total, ends = sum(sizes), np.cumsum(sizes)
    rows = jnp.asarray(rng.normal(size=(130, 6)), jnp.float32)
    up, gate, down = (jnp.asarray(rng.normal(size=(4, *s)), jnp.float32) for s in ((6, 8), (6, 8), (8, 6)))
    biases = tuple(jnp.asarray(rng.normal(size=(4, 8)), jnp.float32) for _ in range(2))

    def ours(rows, weights):
        return grouped_ffn(rows, jnp.asarray(sizes, jnp.int32), backend().pack(weights))[:total]

    def plain(rows, weights):
        parts = []
        for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
            up, gate = (rows[start:end] @ w[e] + b[e] for w, b in zip(weights.into[0], weights.biases, strict=True))
            parts.append((jax.nn.silu(gate) * up) @ weights.down[e])
        return jnp.concatenate(parts)

    def values_and_gradients(f):
        loss = jax.value_and_grad(lambda *a: (jnp.sum(jnp.sin(y := f(*a))), y), (0, 1), has_aux=True)
        (_, y), (d_rows, d_weights) = jax.jit(loss)(rows, ExpertWeights(up, gate, down, biases, activation="swiglu"))
        return [y, d_rows[:total], *jax.tree.leaves(d_weights)]

    _assert_close(values_and_gradients(ours), values_and_gradients(plain), 1e-5)


def _in_row_blocks(rng, sizes, num_experts, keeps_hidden):
    """(function of rows [R,6], group sizes and weights; weights of E experts, up joined with gate and down transposed,
    as on accelerators)."""
    up, gate, down = (jnp.asarray(rng.normal(size=(num_experts, *s)), jnp.float32) for s in ((6, 8), (6, 8), (8, 6)))
    biases = tuple(jnp.asarray(rng.normal(size=(num_experts, 8)), jnp.float32) for _ in range(2))
    weights = ExpertWeights(up, gate, down, biases, activation="swiglu", keeps_hidden=keeps_hidden)
    weights = packed.pack(packed.with_transposed_down(weights))
    return functools.partial(row_blocks.grouped_ffn, row_blocks.RowBlocks(sizes)), weights


@pytest.mark.parametrize(
    ("on_cpu", "keeps_hidden"), [(True, True), slow_case(False, False), slow_case(True, False), slow_case(False, True)]
)
def test_joined_experts_in_row_blocks(on_cpu, keeps_hidden, rng, monkeypatch):
    """Row blocks, used for large groups on GPUs, equal plain matmuls in values and gradients; rows of no group and
    unwritten buffers hold NaN."""
    monkeypatch.setattr(target, "is_cpu", lambda: on_cpu)
    garbage = functools.partial(jax.tree.map, lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype))
    monkeypatch.setattr(row_blocks, "_unwritten", lambda tree, sizes, dtype=None: garbage(tree))

    def plain(rows, sizes, weights):
        group, y = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(130), side="right"), jnp.zeros((130, 6))
        for e in range(len(weights.up)):
            hidden = jnp.split(rows @ weights.up[e], 2, axis=-1)
            up, gate = (h + b[e] for h, b in zip(hidden, weights.biases, strict=True))
            y += jnp.where((group == e)[:, None], (jax.nn.silu(gate) * up) @ weights.down[e].T, 0)
        return y

    def run(function, rows, sizes, weights, unused):
        y, backward = jax.vjp(lambda rows, weights: function(rows, sizes, weights), rows, weights)
        inside = jnp.arange(130)[:, None] < jnp.sum(jnp.asarray(sizes))
        d_rows, d_weights = backward(jnp.where(inside, jnp.sin(y), unused))
        return [jnp.where(inside, y, 0), jnp.where(inside, d_rows, 0), *jax.tree.leaves(d_weights)]

    # No rows, a masked block, a whole one, whole ones behind a masked one, all of the buffer; several experts.
    for all_sizes in ([[0], [1], [37], [64], [65], [130]], [[50, 0, 77]]):
        ours, weights = _in_row_blocks(rng, (16, 32, 64), len(all_sizes[0]), keeps_hidden)
        compiled, expected = (jax.jit(functools.partial(run, f, unused=u)) for f, u in ((ours, jnp.nan), (plain, 0.0)))
        for sizes in all_sizes:
            inside = jnp.arange(130)[:, None] < sum(sizes)
            rows = jnp.where(inside, jnp.asarray(rng.normal(size=(130, 6)) / 4, jnp.float32), 0)
            sizes = jnp.asarray(sizes, jnp.int32)
            actual = compiled(jnp.where(inside, rows, jnp.nan), sizes, weights)
            _assert_close(actual, expected(rows, sizes, weights), 1e-5)


@pytest.mark.parametrize(
    ("keeps_hidden", "num_experts"),
    [(True, 2), *map(lambda case: slow_case(*case), [(False, 1), (True, 1), (False, 2)])],
)
def test_trips_of_row_blocks_are_known(keeps_hidden, num_experts, rng):
    """The planner reads trip counts and products from the names of loops. Each expert has 19 of 80 rows, hence 20 on
    the fullest device: one block of 16 rows and one of 4."""
    ours, weights = _in_row_blocks(rng, (4, 8, 16), num_experts, keeps_hidden)
    num_rows = 80 * num_experts
    loss = jax.grad(lambda rows, sizes, weights: jnp.sum(jnp.sin(ours(rows, sizes, weights))), (0, 2))
    arguments = jnp.ones((num_rows, 6)), jnp.full(num_experts, 20), weights
    # Up, gate and down: three products forward and six backward, and two recomputed unless they were kept. Each of the
    # two biases, a matrix of one row: one forward, one for its gradient, and one recomputed.
    products, biases = (9, 4) if keeps_hidden else (11, 6)
    per_row = 2 * 8 * (products * 6 + biases)
    assert arithmetic.matmul_flops(jax.make_jaxpr(loss)(*arguments).jaxpr).total == num_rows * per_row
    text = jax.jit(loss).lower(*arguments).compile().as_text()
    balanced = functools.partial(row_blocks.balanced_trips, rows=19 * num_experts)
    read = program.read(text, {}, 1.0, trips=balanced)
    assert read.unknown_loops == 0
    assert program.read(text, {}, 1.0).unknown_loops == len(read.loops) == 9
    # Forward and backward: first blocks of 4, 8 and 16 rows, and further ones; experts without rows.
    assert sorted(trips for *_, trips, _ in read.loops) == [0] * 5 + [num_experts] * 4
    rates = program.Rates(condition=1.0)
    waits = [item.seconds for item in program.read(text, {}, 1.0, rates=rates, trips=balanced).items]
    assert sum(waits) == 5 + 4 * (num_experts + 1)  # once more than the trips


@pytest.mark.parametrize("transposed", [False, True])
def test_large_groups_by_the_kernels_of_tpus(transposed, rng, monkeypatch):
    """Products and gradients by megablox, interpreted on CPU, equal one matmul per group; the last rows belong to no
    group."""
    monkeypatch.setattr(tpu, "megablox_gmm", functools.partial(tpu.megablox_gmm, interpret=True))
    monkeypatch.setattr(tpu, "_tiles", lambda *_: (256, 128, 128))
    sizes = np.array([700, 1200], np.int32)
    rows, gradient = (jnp.asarray(rng.normal(size=(2048, d)), jnp.bfloat16) for d in (128, 256))
    matrices = jnp.asarray(rng.normal(size=(2, 128, 256)), jnp.bfloat16)

    def ours(rows, matrices, gradient):
        def multiply(rows, matrices):
            stored = matrices.swapaxes(1, 2) if transposed else matrices
            return tpu.grouped_matmul(rows, stored, jnp.asarray(sizes), transposed)

        y, backward = jax.vjp(multiply, rows, matrices)
        d_rows, d_matrices = backward(gradient)
        return y[:1900], d_rows[:1900], d_matrices

    assert "pallas_call" in str(jax.make_jaxpr(ours)(rows, matrices, gradient))
    actual = [np.asarray(a, np.float32) for a in jax.jit(ours)(rows, matrices, gradient)]
    x, w, g = (np.asarray(a, np.float32) for a in (rows, matrices, gradient))
    groups = [slice(0, 700), slice(700, 1900)]
    expected = [
        np.concatenate([x[group] @ w[e] for e, group in enumerate(groups)]),
        np.concatenate([g[group] @ w[e].T for e, group in enumerate(groups)]),
        np.stack([x[group].T @ g[group] for group in groups]),
    ]
    _assert_close(actual, expected, 1e-2)


def test_biases_by_group(rng):
    """Each row gets the bias of its group; one group is empty, the last rows belong to none and their gradient is
    NaN."""
    sizes, biases = np.array([2, 0, 3]), rng.normal(size=(3, 4)).astype(np.float32)
    gradient = np.concatenate([rng.normal(size=(5, 4)), np.full((2, 4), np.nan)]).astype(np.float32)

    def expand(biases):
        return tpu.multiply_columns(jnp.ones((7, 1)), biases[:, None], jnp.asarray(sizes))

    y, backward = jax.vjp(expand, jnp.asarray(biases))
    np.testing.assert_array_equal(y, np.concatenate([biases[[0, 0, 2, 2, 2]], np.zeros((2, 4))]))
    expected = np.stack([gradient[:2].sum(0), np.zeros(4), gradient[2:5].sum(0)])
    np.testing.assert_allclose(backward(jnp.asarray(gradient))[0], expected, rtol=1e-6)


def test_gradients_of_up_and_gate_stand_beside_each_other(rng):
    joined, up, gate = (rng.normal(size=(5, size)).astype(np.float32) for size in (6, 3, 3))
    halves, backward = jax.vjp(packed.halves, jnp.asarray(joined))
    np.testing.assert_array_equal(np.concatenate(halves, -1), joined)
    np.testing.assert_array_equal(backward((jnp.asarray(up), jnp.asarray(gate)))[0], np.concatenate([up, gate], -1))


def test_work_of_a_kernels_grid_by_hand():
    """R 512 in 2 groups, K 256, N 384, tiles of 128 x 128 x 384: 4 + 1 blocks of rows, 2 of K, 1 of N: 10 steps.

    The products read 10 · 128·128 numbers of rows and 10 · 128·384 of matrices, and write 5 · 128·384. The gradient of
    the weights reads 10 · 128·(128 + 384) and writes 2 · 2 results of 128·384. With all of K in one step there are 5
    steps, and a matrix of 256·384 is read once per group.
    """
    tiles, matrices = (128, 128, 384), (2, 256, 384)
    flops = 10 * 2 * 128 * 128 * 384
    rows = 10 * 128 * 128 + 10 * 128 * 384 + 5 * 128 * 384
    assert tpu_tiles.grid_work("rows", 512, matrices, tiles) == (10, flops, rows)
    weights = 10 * 128 * 512 + 4 * 128 * 384
    assert tpu_tiles.grid_work("weights", 512, matrices, tiles) == (10, flops, weights)
    whole = 5 * 128 * 256 + 2 * 256 * 384 + 5 * 128 * 384
    assert tpu_tiles.grid_work("rows", 512, matrices, (128, 256, 384)) == (5, flops, whole)


@pytest.mark.parametrize(
    ("rows", "matrices", "share"),
    [
        (24576, (8, 4096, 14336), 1.15),  # Mixtral-8x7B, 3 rows of 4096
        (73728, (64, 2048, 1408), 1.25),  # DeepSeek-V2-Lite: 1024 would divide 1408 into 2048
        (98304, (128, 2048, 768), 1.35),  # Qwen3-30B-A3B
        (49152, (32, 2880, 2880), 1.3),  # gpt-oss-20b
    ],
)
@pytest.mark.parametrize("kind", ["rows", "weights"])
def test_tiles_add_little_work(kind, rows, matrices, share):
    """On v5p, FLOPs with partly filled lanes and shared blocks, and the time to move data, are within a share of the
    FLOPs of the filled rows and of their time at peak."""
    peak, bandwidth = 459e12, 2765e9
    device = tpu_tiles.Device(peak, bandwidth, 28 * 2**20)
    for experts, k, n in (matrices, (matrices[0], matrices[2], matrices[1])):
        tiles = tpu_tiles.fastest_tiles(kind, rows, (experts, k, n), device)
        _, flops, moved = tpu_tiles.grid_work(kind, rows, (experts, k, n), tiles)
        assert flops <= share * 2 * rows * k * n
        assert 2 * moved / bandwidth <= share * 2 * rows * k * n / peak
        assert rows % tiles[0] == 0


@pytest.mark.slow
def test_within_vmap_scan_and_remat(rng):
    """Three batches, mapped or scanned with a recomputed body, equal the same batches one by one in values and
    gradients."""
    config = tiny_model(num_experts=3, moe_d_ff=8)
    graphdef, parameters = nnx.split(Experts(config, rngs=nnx.Rngs(0)))
    cases = [_case(rng, 1, 20, 3, 2, load) for load in ("random", "one", "padding")]
    routings = jax.tree.map(lambda *arrays: jnp.stack(arrays), *cases)
    x = jnp.asarray(rng.normal(size=(3, 1, 20, config.d_model)), jnp.float32)

    def layer(x, routing, parameters):
        experts = nnx.merge(graphdef, parameters)
        return dispatch("dropless", x, routing, make_plan(routing, 40), experts.weights)

    def plain(x, parameters):
        return jnp.stack([layer(x[i], jax.tree.map(lambda a, i=i: a[i], routings), parameters) for i in range(3)])

    def mapped(x, parameters):
        return jax.vmap(layer, in_axes=(0, 0, None))(x, routings, parameters)

    def scanned(x, parameters):
        body = jax.checkpoint(lambda carry, inputs: (carry, layer(*inputs, parameters)))
        return jax.lax.scan(body, (), (x, routings))[1]

    def run(function):
        loss = jax.value_and_grad(lambda *inputs: (jnp.sum(jnp.sin(y := function(*inputs))), y), (0, 1), has_aux=True)
        (_, y), gradients = jax.jit(loss)(x, parameters)
        return jax.tree.map(np.asarray, (y, *jax.tree.leaves(gradients)))

    expected = run(plain)
    assert np.abs(expected[0][:2]).min() < np.abs(expected[0][:2]).max()
    assert not expected[0][2].any(), "padding alone"
    for function in (mapped, scanned):
        _assert_close(run(function), expected, 1e-5)


@pytest.mark.parametrize("draws", [8, slow_case(25)])
def test_row_blocks_hold_all_rows_with_little_padding(draws, rng):
    for _ in range(draws):
        num_groups = int(rng.integers(1, 40))
        sizes = rng.multinomial(rng.integers(0, 9000), rng.dirichlet(np.full(num_groups, rng.choice([0.1, 1, 100]))))
        blocks = cpu.choose_row_blocks(max(int(sizes.sum()), 1), num_groups)
        padded = np.asarray(jax.jit(blocks.padded_sizes)(np.asarray(sizes, np.int32)))
        first = np.asarray(jax.jit(blocks.first_block)(padded))
        assert np.all(padded >= sizes)
        assert np.all(padded - sizes < np.diff([0, *blocks.sizes]).max())
        # Every padded group is one block of a known size plus blocks of the largest size.
        assert set(first) <= {0, *blocks.sizes}
        assert np.all((padded - first) % blocks.sizes[-1] == 0)
        assert padded.sum() <= blocks.total_rows(int(sizes.sum()), num_groups)


@pytest.mark.parametrize("mode", ["gather", "dropless"])
def test_tokens_move_by_gathers_alone(mode, rng):
    config = tiny_model(num_experts=4)
    routing = _case(rng, 2, 12, 4, 2)
    graphdef, parameters = nnx.split(Experts(config, rngs=nnx.Rngs(0)))

    def loss(x, parameters, weights):
        sent = dataclasses.replace(routing, combine_weights=weights)
        experts = nnx.merge(graphdef, parameters)
        return jnp.sum(dispatch(mode, x, sent, make_plan(sent, 24), experts.weights))

    x = jnp.zeros((2, 12, config.d_model), jnp.float32)
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, parameters, routing.combine_weights))
    assert re.search(r"\bgather\[", text)
    assert not re.search(r"\b(sort|scatter-add|scatter_add)\[", text)
    # Only index tables are scattered.
    assert re.search(r":i32\[\d+\] = scatter\[", text)
    assert not re.search(r":(f32|bf16)\[[\d,]*\] = scatter\[", text)


MESHES = [
    MeshConfig(data=1, expert=8),
    MeshConfig(data=2, expert=4),
    MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(data=4, tensor=2),
]


def _on_mesh(mesh, config, routing, x, variant=""):
    """Values and gradients of dropless with tokens and experts spread over a mesh."""
    made = make_mesh(mesh)
    with jax.set_mesh(made):
        where = partition_specs.shardings(made, partition_specs.GROUPS)
        routing, x = jax.tree.map(lambda a: jax.device_put(np.asarray(a), where), (routing, x))
        return _value_and_gradients("dropless", config, routing, x, variant)


@pytest.mark.parametrize("load", ["random", "one"])
@pytest.mark.parametrize(
    "mesh",
    [MESHES[0], *map(slow_case, MESHES[1:])],
    ids=lambda m: f"data{m.data}-fsdp{m.fsdp}-expert{m.expert}-tensor{m.tensor}",
)
def test_equal_on_meshes(mesh, load, rng):
    config = tiny_model(num_experts=8)
    routing = _case(rng, 8, 10, 8, 2, load)
    x = jnp.asarray(rng.normal(size=(8, 10, config.d_model)), jnp.float32)
    alone = _value_and_gradients("einsum", config, routing, x)  # which drops nothing here and compiles fastest
    _assert_close(_on_mesh(mesh, config, routing, x), alone, 1e-5)


def _emulated(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name, axis_index_groups=None
):
    """Emulate jax.lax.ragged_all_to_all by its documentation; XLA has none for CPUs."""
    groups = np.asarray(axis_index_groups or [range(jax.lax.axis_size(axis_name))])
    parts = groups.shape[1]
    me = jnp.argsort(groups.reshape(-1))[jax.lax.axis_index(axis_name)] % parts  # index within its group
    slices = send_sizes.shape[0] // parts
    rows, begins, sizes, ends = jax.lax.all_gather(
        (operand, input_offsets, send_sizes, output_offsets), axis_name, axis_index_groups=axis_index_groups
    )
    # Slices that arrive here, [parts · slices]: handled at once, since a loop over them takes long to compile.
    mine = me * slices + jnp.arange(slices)
    begin, size, to = (array[:, mine].reshape(-1) for array in (begins, sizes, ends))
    size = jnp.where(recv_sizes == size, size, 0)  # both sides must agree
    place = jnp.arange(output.shape[0])
    arrives = (place >= to[:, None]) & (place < (to + size)[:, None])
    which = jnp.argmax(arrives, axis=0)
    source = jnp.clip(place - to[which] + begin[which], 0, operand.shape[0] - 1)
    return jnp.where(arrives.any(axis=0)[:, None], rows[which // slices, source], output)


def _exchange_as_accelerators_do(monkeypatch):
    """Trace for accelerators, with the ragged exchange emulated and uninitialised memory filled with 1000."""
    trace_for_accelerators(monkeypatch)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", _emulated)
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, 1000, dtype))


@pytest.mark.parametrize("remat", ["full", slow_case("none")])
@pytest.mark.parametrize("load", ["random", "one", "padding"])
@pytest.mark.parametrize(
    "mesh",
    [*map(slow_case, MESHES[:2]), MESHES[2]],
    ids=lambda m: f"data{m.data}-fsdp{m.fsdp}-expert{m.expert}-tensor{m.tensor}",
)
def test_the_exchange_of_accelerators_equals_one_device(mesh, load, remat, rng, monkeypatch):
    """The ragged exchange has 120 rows per device: under the load "one" a device receives more than one round. With
    full recomputation the combine weights are sent to the experts, otherwise outputs are kept and weighted after their
    return."""
    config = tiny_model(num_experts=8, remat=remat)
    routing = _case(rng, 8, 60, 8, 2, load)
    x = jnp.asarray(rng.normal(size=(8, 60, config.d_model)), jnp.float32)
    alone = _value_and_gradients("einsum", config, routing, x)
    _exchange_as_accelerators_do(monkeypatch)
    if load == "one":
        heaviest = int(np.sum((np.asarray(routing.expert_index) == 1) & np.asarray(routing.chosen)))
        assert heaviest > whole_tiles(120 * 5 // 4)
    _assert_close(_on_mesh(mesh, config, routing, x, "ragged exchange"), alone, 1e-5)


@pytest.mark.slow  # the exchange above and test_joined_experts_in_row_blocks are fast
@pytest.mark.parametrize("load", ["random", "one"])
@pytest.mark.parametrize("remat", ["full", "none"])
def test_row_blocks_behind_the_exchange_of_accelerators(remat, load, rng, monkeypatch):
    """Two experts per device, in row blocks as on GPUs; under the load "one" a device receives more than one round."""
    config = tiny_model(num_experts=8, remat=remat)
    routing = _case(rng, 8, 60, 8, 2, load)
    x = jnp.asarray(rng.normal(size=(8, 60, config.d_model)), jnp.float32)
    alone = _value_and_gradients("einsum", config, routing, x)
    _exchange_as_accelerators_do(monkeypatch)
    monkeypatch.setattr(gpu, "large_blocks", lambda *_: row_blocks.RowBlocks((16, 32, 48)))
    monkeypatch.setitem(backends._BACKENDS, "tpu", gpu)
    _assert_close(_on_mesh(MESHES[1], config, routing, x, f"row blocks, {remat}"), alone, 1e-5)


@pytest.mark.parametrize("load", ["random", slow_case("one")])
@pytest.mark.parametrize("variant", ["chunks", slow_case("dropout in chunks")])
@pytest.mark.parametrize("ragged", [slow_case(False), True], ids=["slots", "ragged"])
def test_exchange_in_chunks_equals_one_device(ragged, variant, load, rng, monkeypatch):
    """Three chunks of 20 tokens, 40 rows per device: under the load "one" a device receives several rounds of each."""
    config = tiny_model(num_experts=8)
    routing = _case(rng, 8, 60, 8, 2, load)
    x = jnp.asarray(rng.normal(size=(8, 60, config.d_model)), jnp.float32)
    alone = _value_and_gradients("einsum", config, routing, x, variant.removesuffix("chunks"))
    if ragged:
        _exchange_as_accelerators_do(monkeypatch)
    _assert_close(_on_mesh(MESHES[2], config, routing, x, f"{variant}, ragged: {ragged}"), alone, 1e-5)


@pytest.mark.parametrize(
    ("ragged", "mesh", "variant", "load"),
    [
        (True, MESHES[0], "hosts 2", "one"),
        (True, MESHES[0], "gathered", "one"),
        slow_case(False, MESHES[1], "chunks, hosts 2", "random"),
        *(
            slow_case(ragged, mesh, variant, load)
            for load in ("random", "one", "padding")
            for mesh, variant in (
                (MESHES[0], "hosts 2"),
                (MESHES[0], "dropout, hosts 4"),
                (MESHES[1], "hosts 2"),
                (MESHES[2], "chunks, hosts 2"),
                (MESHES[0], "dropout, gathered"),
                (MESHES[1], "gathered"),
                (MESHES[2], "chunks, gathered"),
            )
            for ragged in (False, True)
            if (ragged, variant, load) != (True, "hosts 2", "one") or mesh is not MESHES[0]
        ),
    ],
    ids=str,
)
def test_tokens_sent_once_equal_one_device(ragged, mesh, variant, load, rng, monkeypatch):
    """A token is sent once to each host that the expert axis spans, or to every device. Under the load "one" all first
    choices are experts of one host, which needs further windows, and of one device, which needs further rounds."""
    config = tiny_model(num_experts=8, remat="none" if "dropout" in variant else "full")  # outputs kept, or weighted
    routing = _case(rng, 8, 60, 8, 2, load)
    x = jnp.asarray(rng.normal(size=(8, 60, config.d_model)), jnp.float32)
    alone = _value_and_gradients("einsum", config, routing, x, "dropout" if "dropout" in variant else "")
    if ragged:
        _exchange_as_accelerators_do(monkeypatch)
    _assert_close(_on_mesh(mesh, config, routing, x, f"ragged {ragged}, {variant}"), alone, 1e-5)


@pytest.mark.parametrize("load", ["random", slow_case("one"), slow_case("padding")])
@pytest.mark.parametrize("variant", ["", slow_case("dropout")])
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=1, fsdp=4, tensor=2)], ids=["alone", "fsdp"])
def test_weights_before_the_last_matmul_on_accelerators(mesh, variant, load, rng, monkeypatch):
    """On accelerators combine weights scale the hidden activations; their gradients are those of weighted outputs."""
    config = tiny_model(num_experts=8)
    routing = _case(rng, 8, 10, 8, 2, load)
    x = jnp.asarray(rng.normal(size=(8, 10, config.d_model)), jnp.float32)
    expected = _value_and_gradients("einsum", config, routing, x, variant)
    trace_for_accelerators(monkeypatch)
    run = _value_and_gradients if mesh is None else functools.partial(_on_mesh, mesh)
    modes = ("dropless",) if mesh is None else ()
    _assert_close(run(*modes, config, routing, x, f"{variant} on accelerators"), expected, 1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=4, tensor=2), slow_case(MESHES[2])], ids=["fsdp", "expert"])
def test_kernels_with_the_nonlinearity_on_meshes(mesh, rng, monkeypatch):
    """TPU kernels, interpreted, on shards whose parts of F are padded to whole lanes and gathered interleaved."""
    config = tiny_model(num_experts=8, activation="swiglu")
    routing = _case(rng, 8, 10, 8, 2)
    x = jnp.asarray(rng.normal(size=(8, 10, config.d_model)), jnp.float32)
    expected = _value_and_gradients("einsum", config, routing, x)
    _exchange_as_accelerators_do(monkeypatch)
    monkeypatch.setattr(tpu_weights, "are_activated_by_kernels", lambda _: True)
    calls = []
    for name in ("activated", "activation_gradients"):
        kernel = functools.partial(getattr(gated, name), interpret=True)
        monkeypatch.setattr(
            gated, name, lambda *args, kernel=kernel, **named: calls.append(1) or kernel(*args, **named)
        )
    tiles = {"activated": 256, "gradients": 128}
    monkeypatch.setattr(tpu, "_tiles", lambda kind, _, sizes: (128, sizes[1], tiles[kind]) if kind in tiles else None)
    _assert_close(_on_mesh(mesh, config, routing, x, "kernels with the nonlinearity"), expected, 1e-5)
    assert len(calls) >= 2


def test_expert_dropout_depends_on_assignments_alone(rng, monkeypatch):
    """The same hidden activations are dropped by every dispatch mode and on a mesh."""
    config = tiny_model(num_experts=8)
    routing = _case(rng, 8, 10, 8, 2)
    x = jnp.asarray(rng.normal(size=(8, 10, config.d_model)), jnp.float32)
    kept = _value_and_gradients("einsum", config, routing, x)
    expected = _value_and_gradients("einsum", config, routing, x, "dropout")
    assert np.abs(expected[0] - kept[0]).max() > 0.01
    _assert_close(_value_and_gradients("dropless", config, routing, x, "dropout"), expected, 1e-5)
    mesh = MESHES[2]
    _assert_close(_on_mesh(mesh, config, routing, x, "dropout on a mesh"), expected, 1e-5)
    trace_for_accelerators(monkeypatch)
    _assert_close(_value_and_gradients("gather", config, routing, x, "dropout by index"), expected, 1e-5)


@pytest.mark.slow
def test_expert_dropout_with_the_exchange_of_accelerators(rng, monkeypatch):
    config = tiny_model(num_experts=8)
    routing = _case(rng, 8, 10, 8, 2)
    x = jnp.asarray(rng.normal(size=(8, 10, config.d_model)), jnp.float32)
    expected = _value_and_gradients("einsum", config, routing, x, "dropout")
    _exchange_as_accelerators_do(monkeypatch)
    _assert_close(_on_mesh(MESHES[2], config, routing, x, "dropout, ragged exchange"), expected, 1e-5)


def _outside_of_loops(jaxpr, name):
    """Count the occurrences of a primitive in a jaxpr outside its scans."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == name
        if equation.primitive.name != "scan":
            count += sum(_outside_of_loops(inner, name) for inner in arithmetic._inner_jaxprs(equation.params))
    return count


@pytest.mark.parametrize(("platform", "outside"), [("tpu", False), ("gpu", True)])
def test_buffers_of_the_exchange_on_tpus_stay_in_the_loop_over_layers(platform, outside, rng, monkeypatch):
    """Buffers allocated before the loop would be copied in every layer."""
    config = tiny_model(num_experts=8)
    routing, x = _case(rng, 8, 10, 8, 2), jnp.ones((8, 10, config.d_model))
    graphdef, parameters = nnx.split(Experts(config, rngs=nnx.Rngs(0)))
    monkeypatch.setattr(target, "current", lambda: target.Target(platform, platform))

    def loss(x):
        def layer(x, _):
            expert_index = jnp.where(x[..., :1] > 0, routing.expert_index, 7 - routing.expert_index)
            sent = dataclasses.replace(routing, expert_index=expert_index)
            experts = nnx.merge(graphdef, parameters)
            return x + dispatch("dropless", x, sent, make_plan(sent, 20), experts.weights), None

        return jnp.sum(jax.lax.scan(layer, x, length=2)[0])

    with jax.set_mesh(make_mesh(MESHES[2])):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(x)
    assert (_outside_of_loops(jaxpr.jaxpr, "empty") > 0) == outside


@pytest.mark.parametrize("peers", [Peers(), Peers(2), Peers(2, across=True)])
def test_numbers_are_gathered_by_an_all_to_all_on_gpus(peers, monkeypatch):
    """An all-to-all replaces an all-gather, whose inputs XLA would recompute one layer ahead."""
    numbers = {"index": jnp.arange(16).reshape(8, 2), "weight": jnp.linspace(0, 1, 24).reshape(8, 3)}

    def gathered() -> tuple[str, dict[str, Array]]:
        gather = jax.shard_map(
            lambda tree: peers.gather(tree), in_specs=P("expert"), out_specs=P(None, "expert"), check_vma=False
        )
        with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=8))):
            return str(jax.make_jaxpr(gather)(numbers)), gather(numbers)

    jaxpr, expected = gathered()
    assert "all_gather" in jaxpr
    monkeypatch.setattr(target, "current", lambda: target.Target("gpu", "NVIDIA H100"))
    jaxpr, found = gathered()
    assert "all_gather" not in jaxpr
    assert "all_to_all" in jaxpr
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])


def test_both_cores_have_blocks_of_columns():
    """Two blocks of 768 columns cost half of the FLOPs at peak of one block of 1536, which leaves a core idle."""
    v5p = tpu_tiles.Device(459e12, 2765e9, 28 * 2**20, cores=2)
    one, two = ((256, 2048, n) for n in (1536, 768))
    alone, shared = (tpu_tiles.grid_work("rows", 2560, (1, 2048, 1536), tiles, cores=2) for tiles in (one, two))
    assert alone[:2] == (20, 2 * 20 * 256 * 2048 * 1536)  # 10 blocks of rows, counted for both cores
    assert shared[:2] == (20, 2 * 20 * 256 * 2048 * 768)
    chosen = tpu_tiles.fastest_tiles("rows", 458752, (128, 768, 2048), v5p)
    assert 2048 // chosen[2] % 2 == 0
    assert tpu_tiles.fastest_tiles("rows", 458752, (128, 768, 2048), dataclasses.replace(v5p, cores=1))[2] == 2048
