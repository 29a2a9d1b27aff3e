"""The whole model: layer patterns, scan, rematerialisation, causality, padding, per-layer reports, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import MeshConfig, layer_kinds, sparse_layers
from moe.layers.call import Call
from moe.layers.inputs import Rows
from moe.models.block import Block
from moe.models.decoder import Transformer
from moe.models.factory import abstract_model
from moe.models.segments import restack_layers, segments, unstack_layers
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings
from moe.training.losses import linear_cross_entropy
from tests.helpers import random_parameters, slow_case, tiny_model

B, T = 2, 9


def _tokens(rng, config, shape=(B, T)):
    return jnp.asarray(rng.integers(0, config.vocab_size, size=shape), jnp.int32)


_build = functools.cache(random_parameters)


@functools.cache
def _forward(config, train=False):
    """Jitted (parameters, tokens, segment_ids, positions, rng) → (logits, layers, routing)."""
    graphdef, _ = _build(config)

    def run(parameters, tokens, segment_ids=None, positions=None, rng=None):
        model = nnx.merge(graphdef, parameters)
        output = model(tokens, segment_ids, positions, train=train, rng=rng, return_routing=True)
        return output.logits, output.layers, output.routing

    return jax.jit(run)


@functools.cache
def _logits(config):
    """Jitted (parameters, tokens, segment_ids, positions) → logits."""
    graphdef, _ = _build(config)
    return jax.jit(lambda parameters, *rows: nnx.merge(graphdef, parameters)(*rows).logits)


@functools.cache
def _value_and_grad(config):
    """Jitted (parameters, tokens) → (value, gradients) of a loss of the logits and of the balance."""
    graphdef, _ = _build(config)

    def loss(parameters, tokens):
        output = nnx.merge(graphdef, parameters)(tokens, train=True)
        logits = output.logits.astype(jnp.float32)
        nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
        return jnp.mean(nll) + 0.1 * jnp.sum(output.layers.load_balancing_loss)

    return jax.jit(jax.value_and_grad(loss))


def _assert_trees_close(actual, expected, rtol=1e-5):
    """Within rtol of each array's largest value."""

    def check(path, ours, theirs):
        theirs = np.asarray(theirs)
        scale = float(np.abs(theirs).max(initial=0.0))
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.mark.parametrize(
    ("overrides", "sparse", "runs"),
    [
        ({"num_layers": 4}, "SSSS", [("S", 4)]),
        ({"num_layers": 4, "gate": "none"}, "DDDD", [("D", 4)]),
        ({"num_layers": 12, "every": 2}, "DS" * 6, [("DS", 6)]),
        ({"num_layers": 4, "first_dense": 1}, "DSSS", [("D", 1), ("S", 3)]),
        ({"num_layers": 8, "every": 4}, "DDDSDDDS", [("DDDS", 2)]),
        ({"num_layers": 5, "every": 2}, "DSDSD", [("DS", 2), ("D", 1)]),
        # The second layer would be MoE but is among the first three. From each layer on, the longest run is taken.
        ({"num_layers": 8, "every": 2, "first_dense": 3}, "DDDSDSDS", [("D", 3), ("SD", 2), ("S", 1)]),
        ({"num_layers": 6, "layers": (1, 2, 4, 5)}, "DSSDSS", [("DSS", 2)]),
        ({"num_layers": 1}, "S", [("S", 1)]),
    ],
)
def test_layer_patterns(overrides, sparse, runs):
    config = tiny_model(**overrides)
    assert "".join("DS"[is_sparse] for is_sparse in sparse_layers(config)) == sparse
    found = [("".join("DS"[kind.sparse] for kind in unit), repeats) for unit, repeats in segments(layer_kinds(config))]
    assert "".join(unit * repeats for unit, repeats in found) == sparse
    assert found == runs


#: Pairs of a dense and an MoE layer.
EVERY_2 = {"num_layers": 4, "every": 2, "tie_embeddings": True, "dispatch": "einsum"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="all, gather"),
        pytest.param({"dispatch": "einsum"}, id="all"),
        pytest.param({"num_layers": 5, "every": 2, "tie_embeddings": True}, id="every 2, gather"),
        pytest.param(EVERY_2, id="every 2"),
    ],
)
def test_scan_changes_nothing(overrides, rng):
    """All slow: test_carry.py always compares a scan of layers with a plain loop, in values and gradients."""
    config = tiny_model(**overrides)
    unrolled = dataclasses.replace(config, scan_layers=False)
    tokens = _tokens(rng, config)
    _, parameters = _build(config)
    _assert_trees_close(_value_and_grad(unrolled)(parameters, tokens), _value_and_grad(config)(parameters, tokens))


@pytest.mark.parametrize(("unroll", "written_out"), [slow_case(2, 2), slow_case(8, 5)])
def test_layers_of_one_trip_change_nothing(unroll, written_out, rng):
    """Five layers as two trips of two and one more, or all unrolled, each recomputed."""
    config = tiny_model(num_layers=5, remat="full", dispatch="einsum")
    tokens = _tokens(rng, config)
    _, parameters = _build(config)
    one, several = (_value_and_grad(dataclasses.replace(config, scan_unroll=n)) for n in (1, unroll))
    _assert_trees_close(several(parameters, tokens), one(parameters, tokens))
    scans = [e for e in several.trace(parameters, tokens).jaxpr.eqns if e.primitive.name == "scan"]
    assert [scan.params["unroll"] for scan in scans] == [written_out] * 2  # forward, backward


@pytest.mark.slow
def test_remat_changes_neither_value_nor_gradient(rng):
    """Each policy; test_carry.py always compares a recomputed scan of layers with a plain loop."""
    policies = ("none", "full", "hidden", "offload", "offload_inputs", "dots", "routes")
    config = tiny_model(dispatch="einsum")
    tokens = _tokens(rng, config)
    _, parameters = _build(config)
    results = {
        policy: _value_and_grad(dataclasses.replace(config, remat=policy))(parameters, tokens) for policy in policies
    }
    for policy in results:
        _assert_trees_close(results[policy], results["none"])


# A layer's input; or that and queries, keys, values and heads.
@pytest.mark.parametrize(("policy", "arrays"), [("offload_inputs", 1), ("offload", 5)])
def test_offloaded_arrays_are_in_host_memory(policy, arrays):
    config = tiny_model(num_layers=2, remat=policy)
    graphdef, parameters = _build(config)

    def loss(parameters):
        return jnp.sum(nnx.merge(graphdef, parameters)(jnp.zeros((B, T), jnp.int32)).logits)

    (forward,) = [e for e in jax.make_jaxpr(jax.grad(loss))(parameters).eqns if e.primitive.name == "scan"][:1]
    moved = [e for e in forward.params["jaxpr"].eqns if e.primitive.name == "device_put"]
    assert len(moved) == arrays
    assert {e.outvars[0].aval.memory_space for e in moved} == {jax.memory.Space.Host}


def test_policies_recompute_the_documented_matmuls():
    """Counts matmuls of a training step's program with einsum dispatch, whose experts are plain matmuls on CPUs too."""
    config = tiny_model(num_layers=1, dispatch="einsum")
    tokens = jnp.zeros((B, T), jnp.int32)

    @functools.cache
    def dots(policy, config=config):
        graphdef, parameters = _build(dataclasses.replace(config, remat=policy))

        def loss(parameters):
            return jnp.sum(nnx.merge(graphdef, parameters)(tokens).logits)

        return str(jax.make_jaxpr(jax.grad(loss))(parameters)).count("dot_general")

    assert dots("none") < dots("dots") < dots("full")
    none, hidden, outputs, attention, full = map(dots, ("none", "hidden", "outputs", "attention", "full"))
    # Recomputed: queries, keys and values, heads; the experts' last matmul; their first two.
    assert full - attention >= 3
    assert attention - outputs == 1
    assert outputs - hidden == 2
    assert none <= hidden
    assert dots("routes") == full
    # In a repeated unit of two layers: attention's matmuls of both, and the last matmul of the first, whose output
    # enters the second's input.
    two = tiny_model(**EVERY_2)
    assert dots("full", two) - dots("attention", two) == 2 * (full - attention) + 1


def test_kept_routes_are_not_recomputed():
    """A choice is the lowest index that has the maximum, hence one minimum forward, and another in the backward pass
    where the whole layer is recomputed."""
    config = tiny_model(num_layers=1)

    def choices(policy):
        graphdef, parameters = _build(dataclasses.replace(config, remat=policy))

        def loss(parameters):
            return jnp.sum(nnx.merge(graphdef, parameters)(jnp.zeros((B, T), jnp.int32)).logits)

        return str(jax.make_jaxpr(jax.grad(loss))(parameters)).count(" reduce_min[")

    assert choices("full") == 2 * choices("routes") > 0


@pytest.mark.slow  # test_policies_recompute_the_documented_matmuls is fast
@pytest.mark.parametrize("scan", [True, False])
def test_remat_saves_memory_with_layers_scanned_and_written_out(scan):
    config = tiny_model(num_layers=4, gate="none", d_model=32, d_ff=512, scan_layers=scan)

    def temporaries(policy):
        graphdef, state = nnx.split(
            nnx.eval_shape(lambda: Transformer(dataclasses.replace(config, remat=policy), rngs=nnx.Rngs(0)))
        )

        def loss(parameters, tokens):
            return jnp.sum(nnx.merge(graphdef, parameters)(tokens).hidden ** 2)

        tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(nnx.to_pure_dict(state), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # 33.9 and 9.8 MiB scanned; written out, 28.3 and 10.0.
    assert temporaries("full") < 0.5 * temporaries("none")


def _explicit(config, parameters, tokens, segment_ids, positions, *, train, rng):
    """The same model as a plain loop over unstacked blocks, with each layer's report and routing, None if dense."""
    model = nnx.merge(_build(config)[0], parameters)
    x = model.embedding(tokens, jnp.dtype(config.dtype))
    records = []
    flat = unstack_layers(config, parameters)
    for layer, kind in enumerate(layer_kinds(config)):
        block_def, state = nnx.split(nnx.eval_shape(lambda kind=kind: Block(config, kind, rngs=nnx.Rngs(0))))
        variables = jax.tree_util.tree_map_with_path(
            lambda path, _, layer=layer: flat[layer, tuple(key.key for key in path)], nnx.to_pure_dict(state)
        )
        key = None if rng is None else jax.random.fold_in(rng, layer)
        block = nnx.merge(block_def, variables)
        rows = Rows(tokens, segment_ids, positions)
        x, report = block(x, Call(rows, train=train, rng=key, signals=("layers", "routing")))
        records.append((report.signals.get("layers"), report.signals.get("routing")))
    return model.final_norm(x) @ model.output_matrix(), records


@pytest.mark.parametrize(
    "overrides",
    [
        slow_case({"num_layers": 5, "first_dense": 2}),
        # Two MoE layers in the repeated unit.
        {"num_layers": 6, "layers": (1, 2, 4, 5), "dispatch": "einsum"},
        slow_case({"num_layers": 6, "layers": (1, 2, 4, 5)}),
        slow_case({"num_layers": 6, "every": 2, "first_dense": 1}),
        slow_case({"num_layers": 8, "every": 2, "first_dense": 3, "gate": "switch"}),
    ],
    ids=str,
)
def test_layers_run_in_order_and_report_each_for_itself(overrides, rng):
    config = tiny_model(jitter=0.2, capacity_factor=1.0, **overrides)
    _, parameters = _build(config)
    tokens, key = _tokens(rng, config), jax.random.key(5)
    segment_ids, positions = jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
    logits, layers, routing = _forward(config, train=True)(parameters, tokens, rng=key)
    explicit = jax.jit(functools.partial(_explicit, config, train=True))
    expected_logits, records = explicit(parameters, tokens, segment_ids, positions, rng=key)
    assert [routing is not None for _, routing in records] == list(sparse_layers(config))
    records = [record for record in records if record[1] is not None]
    expected_layers, expected_routing = jax.tree.map(lambda *arrays: jnp.stack(arrays), *records)
    np.testing.assert_array_equal(routing.expert_index, expected_routing.expert_index)
    _assert_trees_close((logits, layers, routing), (expected_logits, expected_layers, expected_routing))
    assert layers.expert_load.shape == (sum(sparse_layers(config)), config.moe.num_experts)
    # Layers differ, so that an average or another order could not pass.
    losses = np.asarray(layers.load_balancing_loss)
    assert len(np.unique(losses)) == len(losses) > 1


def test_dense_model_reports_nothing(rng):
    config = tiny_model(gate="none")
    logits, layers, routing = _forward(config)(_build(config)[1], _tokens(rng, config))
    assert logits.shape == (B, T, config.vocab_size)
    assert layers is None
    assert routing is None


def test_routing_is_returned_only_when_asked_for(rng):
    config = tiny_model()
    graphdef, parameters = _build(config)
    tokens = _tokens(rng, config)
    output = jax.eval_shape(lambda p: nnx.merge(graphdef, p)(tokens), parameters)
    assert output.routing is None
    assert output.layers.load_balancing_loss.shape == (2,)


# With one choice per token buffers fill in token order, so that drops are causal too. With more, an earlier token's
# second choice yields to a later one's first (GShard, algorithm 1), so that the capacity must hold all.
@pytest.mark.parametrize(
    "overrides",
    [
        {"gate": "none"},
        {"gate": "switch", "eval_capacity_factor": 1.0, "dispatch": "einsum"},
        slow_case({"gate": "mixtral", "eval_capacity_factor": 2.0}),
        slow_case({"gate": "dense_mixture"}),
    ],
    ids=lambda overrides: overrides["gate"],
)
def test_a_future_token_changes_nothing_before_it(overrides, rng):
    config = tiny_model(**overrides)
    _, parameters = _build(config)
    tokens = np.asarray(_tokens(rng, config))
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % config.vocab_size
    before, layers, _ = _forward(config)(parameters, tokens)
    after, _, _ = _forward(config)(parameters, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(np.asarray(before - after)[:, 6:]).max(-1) > 1e-4).all()
    if overrides["gate"] in ("switch", "mixtral"):
        assert bool(jnp.any(layers.fraction_tokens_dropped > 0)) == (overrides["gate"] == "switch")


def test_packed_documents_are_independent_and_equal_to_themselves_alone(rng):
    config = tiny_model(eval_capacity_factor=2.0)
    _, parameters = _build(config)
    tokens = np.asarray(_tokens(rng, config))
    segment_ids = np.tile([1, 1, 1, 1, 2, 2, 2, 2, 2], (B, 1))
    positions = np.tile([0, 1, 2, 3, 0, 1, 2, 3, 4], (B, 1))
    changed = tokens.copy()
    changed[:, :4] = (changed[:, :4] + 1) % config.vocab_size
    before, after = (_logits(config)(parameters, ids, segment_ids, positions) for ids in (tokens, changed))
    np.testing.assert_array_equal(before[:, 4:], after[:, 4:])
    alone = _logits(config)(parameters, tokens[:, 4:])
    np.testing.assert_allclose(before[:, 4:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("gate", "dispatch"), [("mixtral", "einsum"), slow_case("mixtral", "gather"), slow_case("switch", "gather")]
)
def test_padding_has_no_effect(gate, dispatch, rng):
    """A row of padding, and padding after a document, give finite logits and affect nothing else, whatever their
    tokens."""
    config = tiny_model(dispatch=dispatch, gate=gate, num_layers=2, first_dense=1, eval_capacity_factor=0.5)
    _, parameters = _build(config)
    tokens = np.asarray(_tokens(rng, config, (3, T)))
    segment_ids = np.ones((3, T), np.int32)
    segment_ids[1, 5:] = 0
    segment_ids[2] = 0
    run = _forward(config)
    logits, layers, _ = run(parameters, tokens, segment_ids, None)
    assert bool(jnp.all(jnp.isfinite(logits)))
    other = np.where(segment_ids > 0, tokens, (tokens + 7) % config.vocab_size)
    other_logits, other_layers, _ = run(parameters, other, segment_ids, None)
    np.testing.assert_array_equal(np.asarray(logits)[segment_ids > 0], np.asarray(other_logits)[segment_ids > 0])
    jax.tree.map(np.testing.assert_array_equal, layers, other_layers)
    # Without the row of padding it is another program, hence equal to rounding.
    short_logits, short_layers, _ = run(parameters, tokens[:2], segment_ids[:2], None)
    real = segment_ids[:2] > 0
    np.testing.assert_allclose(np.asarray(logits)[:2][real], np.asarray(short_logits)[real], rtol=1e-5, atol=1e-5)
    _assert_trees_close(layers, short_layers)
    assert bool(jnp.any(layers.fraction_tokens_dropped > 0)), "room was short, and padding took none"


@pytest.mark.slow
def test_bfloat16_keeps_parameters_router_and_reports_in_float32(rng):
    config = tiny_model(dtype="bfloat16")
    _, parameters = _build(config)
    assert {array.dtype for array in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}
    tokens = _tokens(rng, config)
    logits, layers, routing = _forward(config)(parameters, tokens)
    assert logits.dtype == jnp.bfloat16
    assert routing.router_logits.dtype == routing.router_probs.dtype == routing.combine_weights.dtype == jnp.float32
    assert {array.dtype for array in jax.tree.leaves(layers)} == {jnp.dtype("float32")}
    _, gradients = _value_and_grad(config)(parameters, tokens)
    assert {array.dtype for array in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    # Near the float32 model but not equal to it: about a dozen successive roundings of 2^-8.
    full, _, _ = _forward(dataclasses.replace(config, dtype="float32"))(parameters, tokens)
    difference = np.abs(np.asarray(logits, np.float32) - np.asarray(full))
    assert 1e-4 < np.median(difference) < 0.05


def test_without_a_key_the_model_is_deterministic_and_with_one_it_is_not(rng):
    config = tiny_model(dispatch="einsum", gate="gshard", jitter=0.3)
    _, parameters = _build(config)
    tokens = _tokens(rng, config)
    run = _forward(config, train=True)
    first, again = run(parameters, tokens), run(parameters, tokens)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert bool(jnp.all(first[2].chosen))
    one, same, other = (run(parameters, tokens, rng=jax.random.key(seed)) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one[2].router_logits, other[2].router_logits)
    assert not np.array_equal(one[2].router_logits, first[2].router_logits)
    assert not bool(jnp.all(one[2].chosen)), "second experts were declined"
    # The layers draw independently: with the same draws both would decline the same tokens.
    assert not np.array_equal(one[2].chosen[0], one[2].chosen[1])


def test_default_positions_and_segments_are_one_document_a_row(rng):
    config = tiny_model(num_layers=1, dispatch="einsum")
    _, parameters = _build(config)
    tokens = _tokens(rng, config)
    explicit = _forward(config)(parameters, tokens, np.ones((B, T), np.int32), np.tile(np.arange(T), (B, 1)))
    jax.tree.map(np.testing.assert_array_equal, _forward(config)(parameters, tokens), explicit)


@pytest.mark.parametrize(
    "overrides", [{"num_layers": 6, "layers": (1, 2, 4, 5)}, {"num_layers": 5, "every": 2}], ids=str
)
def test_unstacked_layers_restack_to_the_same_tree(overrides):
    config = tiny_model(**overrides)
    _, parameters = _build(config)
    flat = unstack_layers(config, parameters)
    assert {layer for layer, _ in flat} == {-1, *range(config.num_layers)}
    sparse = {layer for layer, path in flat if path == ("moe", "router", "kernel")}
    assert sparse == {layer for layer, is_sparse in enumerate(sparse_layers(config)) if is_sparse}
    restacked = restack_layers(config, parameters, flat)
    jax.tree.map(np.testing.assert_array_equal, restacked, parameters)


@pytest.mark.parametrize(
    "changes",
    [{"gate": "none", "num_layers": 1}, slow_case({"gate": "sparse_mixer", "num_experts": 4, "dispatch": "dropless"})],
    ids=["dense", "sparse mixer"],
)
def test_biases_of_norms_and_logits_on_a_mesh(rng, changes):
    """Loss and gradients of the biases equal those of the formula on one device."""
    config = tiny_model(layer_norm=True, logit_bias=True, **changes)
    graphdef, parameters = random_parameters(config)
    tokens = jnp.asarray(rng.integers(1, 48, (8, 6)))

    def plain(parameters):
        hidden = nnx.merge(graphdef, parameters)(tokens[:, :-1]).hidden
        logits = hidden[..., :-1] @ parameters["unembedding"]["kernel"] + parameters["unembedding"]["bias"]
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))

    def ours(parameters):
        model = nnx.merge(graphdef, parameters)
        return linear_cross_entropy(model(tokens[:, :-1]).hidden, model.output_matrix(), tokens[:, 1:])[0]

    value, gradient = jax.jit(jax.value_and_grad(plain))(parameters)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    state = nnx.state(abstract_model(config))
    with jax.set_mesh(mesh):
        placed = jax.device_put(parameters, parameter_shardings(mesh, state))
        found, sharded = jax.jit(jax.value_and_grad(ours))(placed)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for part in ("unembedding", "final_norm"):
        np.testing.assert_allclose(sharded[part]["bias"], gradient[part]["bias"], rtol=1e-3, atol=1e-5)
        assert np.abs(gradient[part]["bias"]).max() > 0.1
