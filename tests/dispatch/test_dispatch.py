"""Capacity, buffer positions, and every mode against the per-token oracle, in values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moe.config import Capacity, ModelConfig, MoEConfig
from moe.config.exchange import AllGather, AllToAll
from moe.config.registry import LAYERS
from moe.conformance import reference, reference_gates
from moe.dispatch.buffers import (
    BufferPlan,
    combine_rows,
    expert_capacity,
    fill_rows,
    layer_capacity,
    make_plan,
    sum_rows,
    weights_of_rows,
    with_inverse,
)
from moe.dispatch.ffn import ExpertWeights
from moe.dispatch.modes import dispatch
from moe.layers.ffn import Experts
from moe.layers.moe_layer import MoELayer
from moe.layers.router import Router
from moe.models import sampling
from moe.routing.interface import GateInputs
from moe.routing.routing import Routing, route
from tests.helpers import slow_case, tiny_model, trace_for_accelerators

CAPACITY_MODES = ("gather", "einsum")


@pytest.mark.parametrize(
    ("factor", "k", "tokens", "num_experts", "capacity"),
    [
        (1.0, 1, 256, 8, 32),
        (1.25, 1, 512, 8, 80),
        (1.0, 2, 256, 8, 64),  # GShard's 2·S/E
        (1.25, 2, 10, 8, 4),  # 25/8 = 3.125, up
        (1.1, 2, 40, 8, 11),  # 88/8 = 11, in floating point 11.000000000000002
        (1.2, 3, 25, 9, 10),  # 90/9 = 10
        (1.01, 1, 100, 4, 26),  # 25.25 is rounded up, not down
        (8.0, 2, 16, 4, 16),  # 64, capped at S: a token chooses an expert at most once
        (1.0, 5, 7, 5, 7),  # K = E: S
        (0.01, 1, 4, 64, 1),  # at least one
    ],
)
def test_expert_capacity(factor, k, tokens, num_experts, capacity):
    assert expert_capacity(factor, k, tokens, num_experts) == capacity


def test_capacity_covers_the_share_of_experts_with_an_ffn():
    layer = LAYERS["moe_plus_plus"]  # 8 FFNs and 4 others, tau 0.75, K 2, factor 1.1
    assert layer_capacity(layer, 1000) == 165  # 1.1 * 0.75 * 2 * 1000 / (0.75 * 8 + 4)
    fixed = dataclasses.replace(layer, capacity=Capacity(fixed=30))
    assert [layer_capacity(fixed, tokens) for tokens in (1000, 16)] == [30, 16]
    for moe in (layer, fixed):
        whole = sampling.without_drops(ModelConfig(moe=moe)).moe
        assert layer_capacity(whole, 64, train=False) == 64


def _routing(expert_index, num_experts, chosen=None, weights=1.0) -> Routing:
    """A routing with these choices [G,S,K]; a plan reads only the shape of the logits."""
    expert_index = np.asarray(expert_index, np.int32)
    chosen = np.ones(expert_index.shape, bool) if chosen is None else np.asarray(chosen)
    logits = np.zeros((*expert_index.shape[:2], num_experts), np.float32)
    combine_weights = np.where(chosen, weights, 0.0).astype(np.float32)
    broken = np.zeros(chosen.shape[:2], bool)
    return jax.tree.map(jnp.asarray, Routing(expert_index, combine_weights, chosen, logits, logits, broken))


_plan = jax.jit(make_plan, static_argnames="capacity")


def test_first_choices_come_before_all_second_choices():
    # Expert 0 is the first choice of tokens 0, 1, 3 (positions 0, 1, 2) and the second of token 2 (position 3).
    # Expert 1 is the first choice of token 2 (position 0) and the second of tokens 0, 1, 3 (positions 1, 2, 3).
    plan = _plan(_routing([[[0, 1], [0, 1], [1, 0], [0, 1]]], 2), capacity=2)
    np.testing.assert_array_equal(plan.position_in_expert, [[[0, 1], [1, 2], [0, 3], [2, 3]]])
    np.testing.assert_array_equal(plan.kept, [[[True, True], [True, False], [True, False], [False, False]]])


def test_unchosen_assignments_take_no_position_and_groups_are_counted_separately():
    chosen = [[[False], [True], [True]], [[True], [True], [False]]]
    plan = _plan(_routing([[[0], [0], [0]], [[0], [1], [0]]], 2, chosen), capacity=1)
    # Group 0: token 0 is padding, so token 1 has position 0. Group 1 counts from 0 again.
    np.testing.assert_array_equal(plan.position_in_expert[0, 1:], [[0], [1]])
    np.testing.assert_array_equal(plan.kept, [[[False], [True], [False]], [[True], [True], [False]]])


@pytest.mark.parametrize("tokens", [31, 32, 33, 150])
def test_positions_are_counted_across_blocks(tokens):
    """62, 64, 66 and 300 assignments in blocks of 64, a third of them not chosen."""
    numbers = np.random.default_rng(tokens)
    experts = np.stack([numbers.permuted(np.tile(np.arange(3), (tokens, 1)), axis=1)[:, :2] for _ in range(2)])
    chosen = numbers.random(experts.shape) < 2 / 3
    positions = np.asarray(_plan(_routing(experts, 3, chosen), capacity=tokens).position_in_expert)
    for group in range(2):
        taken = [0, 0, 0]
        for choice in range(2):
            for token in range(tokens):
                expected = 0
                if chosen[group, token, choice]:
                    expected = taken[experts[group, token, choice]]
                    taken[experts[group, token, choice]] += 1
                assert positions[group, token, choice] == expected


@pytest.mark.parametrize(("mode", "on_cpu"), [("einsum", True), ("gather", True), ("gather", False)])
def test_outputs_by_hand(mode, on_cpu, monkeypatch):
    # Expert e multiplies by e + 1: relu((e + 1)·x·I)·I. Three tokens of value 1, 2, 3; experts 0, 1, 0 with weights
    # 1/2, 1, 1; capacity 1: token 2 is dropped.
    if not on_cpu:
        trace_for_accelerators(monkeypatch)
    x = jnp.asarray([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    routing = _routing([[[0], [1], [0]]], 3, weights=[[[0.5], [1.0], [1.0]]])
    up = jnp.eye(2) * jnp.asarray([1.0, 2.0, 3.0])[:, None, None]
    weights = ExpertWeights(up, None, jnp.broadcast_to(jnp.eye(2), (3, 2, 2)), activation="relu")
    y = jax.jit(lambda x: dispatch(mode, x, routing, make_plan(routing, 1), weights))(x)
    np.testing.assert_array_equal(y, [[[0.5, 5.0], [4.0, 40.0], [0.0, 0.0]]])
    # In bfloat16 the experts' outputs are rounded, and the weights are not.
    routing = _routing([[[0], [1], [0]]], 3, weights=[[[1 / 3], [1.0], [1.0]]])
    y = jax.jit(lambda x: dispatch(mode, x, routing, make_plan(routing, 1), weights))(x.astype(jnp.bfloat16))
    np.testing.assert_array_equal(y[0, 0], np.float32([1, 10]) * np.float32(1 / 3))


def test_exchanges_by_hand():
    """Chunks divide the tokens of a group, hosts the devices of the experts; one device exchanges nothing."""
    moe = MoEConfig(num_experts=8, dispatch="dropless", exchange_chunks=4, exchange_hosts=4)
    assert moe.exchange_of(6, 8) == AllToAll(chunks=2, hosts=4)
    assert moe.exchange_of(8, 2) == AllToAll(chunks=4, hosts=2)
    assert moe.exchange_of(8, 1) == AllToAll()
    gathered = dataclasses.replace(moe, exchange="all_gather", exchange_hosts=1)
    assert gathered.exchange_of(8, 2) == AllGather(chunks=4)
    assert gathered.exchange_of(8, 1) == AllToAll()


def test_rows_and_their_gradients_by_hand():
    """Tokens 0 and 1 have rows 1 and 0, token 2 is dropped and row 2 is empty: it has no part in any gradient."""
    tables = with_inverse(jnp.asarray([[1], [0], [3]]), 3)
    rows, weights = jnp.asarray([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]]), jnp.asarray([[2.0], [3.0], [5.0]])
    y, back = jax.vjp(lambda rows, weights: combine_rows(rows, weights, *tables), rows, weights)
    np.testing.assert_array_equal(y, [[8, 16], [3, 6], [0, 0]])
    d_rows, d_weights = back(jnp.asarray([[1.0, 10.0], [100.0, 1000.0], [7.0, 7.0]]))
    np.testing.assert_array_equal(d_rows, [[300, 3000], [2, 20], [0, 0]])
    np.testing.assert_array_equal(d_weights, [[84], [2100], [0]])
    of_rows, back = jax.vjp(lambda weights: weights_of_rows(weights, *tables), weights)
    np.testing.assert_array_equal(of_rows, [3, 2, 0])
    np.testing.assert_array_equal(back(jnp.asarray([1.0, 2.0, 4.0]))[0], [[2], [1], [0]])
    # 256 + 1 is not a number of bfloat16: the rows of a token are summed in float32, and its gradients too.
    both = with_inverse(jnp.asarray([[0, 1]]), 2)
    found = sum_rows(jnp.asarray([[256.0], [1.0]], jnp.bfloat16), *both)
    assert (found.dtype, found.tolist()) == (jnp.float32, [[257.0]])
    _, back = jax.vjp(
        lambda x: fill_rows(x, *with_inverse(jnp.asarray([[0, 1, 2]]), 3)), jnp.ones((1, 1), jnp.bfloat16)
    )
    assert back(jnp.asarray([[256.0], [1.0], [1.0]], jnp.bfloat16))[0].tolist() == [[258.0]]


_MODULES = {"router": Router, "experts": Experts}


def _parameters(config):
    """Parameters of a router and experts at twice their usual scale, so that nothing is almost uniform or linear."""
    numbers = np.random.default_rng(4)
    modules = {name: nnx.eval_shape(lambda m=m: m(config, rngs=nnx.Rngs(0))) for name, m in _MODULES.items()}
    return jax.tree.map(
        lambda leaf: jnp.asarray(2.0 * numbers.normal(size=leaf.shape) / leaf.shape[-2] ** 0.5, leaf.dtype),
        {name: nnx.to_pure_dict(nnx.state(module)) for name, module in modules.items()},
    )


def _system(config, capacity, mode, key):
    """(parameters, x, mask, cotangent) → sum(y·cotangent) and its gradients, jitted; also y, plan and routing."""
    router_def = nnx.graphdef(nnx.eval_shape(lambda: Router(config, rngs=nnx.Rngs(0))))
    experts_def = nnx.graphdef(nnx.eval_shape(lambda: Experts(config, rngs=nnx.Rngs(0))))

    def loss(parameters, x, mask, cotangent):
        router = nnx.merge(router_def, parameters["router"])
        experts = nnx.merge(experts_def, parameters["experts"])
        logits = router(x)
        routing = route(config.moe.gate, logits, GateInputs(mask, rng=key))
        plan = make_plan(routing, capacity)
        y = dispatch(mode, x, routing, plan, experts.weights)
        return jnp.sum(y * cotangent), (y, plan, routing)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def _oracle(config, parameters, x, mask, cotangent, capacity, uniform):
    """y, gradients and routing decisions of the oracle, moe/conformance/reference.py."""
    router = np.asarray(parameters["router"]["kernel"], np.float64)
    logits = np.array([[token @ router for token in group] for group in np.asarray(x, np.float64)])
    gate, k = config.moe.gate.name, config.moe.experts_per_token
    decisions = reference.decide(gate, logits, np.asarray(mask), k, capacity, reference_gates.Rule(draws=uniform))

    def loss(parameters, x):
        experts = parameters["experts"]
        y = reference.moe_output(
            x,
            parameters["router"]["kernel"],
            experts["up"],
            experts.get("gate"),
            experts["down"],
            gate=gate,
            decisions=decisions,
            activation=config.activation,
        )
        return jnp.sum(y * cotangent), y

    # Run eagerly: compiling its unrolled loops takes longer.
    gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)
    return y, gradients, decisions


def _assert_close(actual, expected, name=""):
    """Compare to float32 rounding: rtol 1e-5 of each value, or of the array's largest where terms cancel."""
    expected = np.asarray(expected)
    scale = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def _assert_close_at(path, actual, expected):
    _assert_close(actual, expected, jax.tree_util.keystr(path))


def _compare(config, *, groups, tokens, capacity, mask, seed, draws=False):
    numbers = np.random.default_rng(seed)
    parameters = _parameters(config)
    x = jnp.asarray(numbers.normal(size=(groups, tokens, config.d_model)), jnp.float32)
    cotangent = jnp.asarray(numbers.normal(size=x.shape), jnp.float32)
    key = jax.random.key(seed) if draws else None
    # The uniform numbers that the gate gshard draws from this key.
    uniform = np.asarray(jax.random.uniform(key, (groups, tokens))) if draws else None
    y_ref, gradients_ref, decisions = _oracle(config, parameters, x, mask, cotangent, capacity, uniform)
    for mode in CAPACITY_MODES:
        system = _system(config, capacity, mode, key)
        (_, (y, plan, routing)), gradients = system(parameters, x, jnp.asarray(mask), cotangent)
        np.testing.assert_array_equal(routing.expert_index, decisions.expert)
        np.testing.assert_array_equal(routing.chosen, decisions.chosen)
        np.testing.assert_array_equal(plan.kept, decisions.kept)
        positions = np.where(decisions.chosen, decisions.position, plan.position_in_expert)
        np.testing.assert_array_equal(plan.position_in_expert, positions)
        assert y.dtype == jnp.float32
        _assert_close(y, y_ref, "y")
        jax.tree_util.tree_map_with_path(_assert_close_at, gradients, gradients_ref)
    return decisions


# Six tokens a group and three experts: at these capacities some assignments are dropped, which the test asserts.
@pytest.mark.parametrize(
    ("gate", "k", "capacity", "draws"),
    [
        ("dense_mixture", 3, 6, False),
        ("switch", 1, 2, False),
        slow_case("switch", 2, 3, False),
        ("gshard", 2, 3, True),
        ("mixtral", 2, 3, False),
    ],
)
def test_modes_equal_the_oracle(gate, k, capacity, draws):
    config = tiny_model(gate=gate, experts_per_token=k, num_experts=3, d_model=8, moe_d_ff=6)
    mask = np.ones((2, 6), bool)
    mask[0, 1] = mask[1, 4:] = False
    decisions = _compare(config, groups=2, tokens=6, capacity=capacity, mask=mask, seed=3, draws=draws)
    dropped = (decisions.chosen & ~decisions.kept).any()
    assert dropped == (gate != "dense_mixture")
    assert not draws or not decisions.chosen[mask].all()


@st.composite
def cases(draw):
    num_experts = draw(st.sampled_from([3, 1, 2, 5]))
    gate = draw(st.sampled_from(["switch", "dense_mixture"] + ["mixtral", "gshard"] * (num_experts > 1)))
    least = 2 if gate == "mixtral" else 1  # one weight, renormalised, is refused
    k = {"dense_mixture": num_experts, "gshard": 2}.get(gate) or draw(st.integers(least, num_experts))
    groups, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    capacity = draw(st.integers(1, tokens))
    padding = draw(st.sampled_from(["none", "some", "all"]))
    seed = draw(st.integers(0, 2**31))
    activation = draw(st.sampled_from(["swiglu", "relu"]))
    share = {"none": 0.0, "some": 0.4, "all": 1.0}[padding]
    mask = np.random.default_rng(seed).random((groups, tokens)) >= share
    shape = {"groups": groups, "tokens": tokens, "capacity": capacity, "mask": mask, "seed": seed}
    return {"gate": gate, "experts_per_token": k, "num_experts": num_experts, "activation": activation}, shape


# Each example compiles three programs: hence few examples, and no shrinking of a failing one.
@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(case=cases())
def test_modes_equal_the_oracle_on_any_shape(case):
    overrides, shape = case
    _compare(tiny_model(d_model=4, moe_d_ff=3, **overrides), draws=overrides["gate"] == "gshard", **shape)


@pytest.mark.parametrize("mode", CAPACITY_MODES)
def test_all_padding_gives_zeros_and_no_gradient(mode, rng):
    config = tiny_model(num_experts=3)
    parameters = _parameters(config)
    x = jnp.asarray(rng.normal(size=(2, 3, config.d_model)), jnp.float32)
    system = _system(config, 2, mode, None)
    (_, (y, _, _)), gradients = system(parameters, x, jnp.zeros((2, 3), bool), jnp.ones_like(x))
    assert not np.asarray(y).any()
    for gradient in jax.tree.leaves(gradients):
        assert not np.asarray(gradient).any()


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [15, 50])
def test_modes_agree_beyond_oracle_sizes(capacity, rng):
    """On a few hundred tokens, for which the oracle would be slow, gather equals einsum with and without drops."""
    config = tiny_model(num_experts=6, experts_per_token=3, gate="switch", d_model=8, moe_d_ff=6)
    parameters = _parameters(config)
    x = jnp.asarray(rng.normal(size=(4, 50, config.d_model)), jnp.float32)
    mask, cotangent = jnp.asarray(rng.random((4, 50)) < 0.9), jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    (loss, (y, plan, routing)), gradients = _system(config, capacity, "gather", None)(parameters, x, mask, cotangent)
    assert bool(jnp.all(plan.kept == routing.chosen)) == (capacity == 50)
    expected = _system(config, capacity, "einsum", None)(parameters, x, mask, cotangent)
    _assert_close(loss, expected[0][0], "loss")
    _assert_close(y, expected[0][1][0], "y")
    jax.tree_util.tree_map_with_path(_assert_close_at, gradients, expected[1])


def test_bfloat16_to_its_own_rounding(rng):
    """Activations in bfloat16, 8 bits of mantissa, are within a few roundings of float32, with the same decisions."""
    config = tiny_model(num_experts=3, d_model=8)
    parameters = _parameters(config)
    # Inputs exact in bfloat16, so that both runs route alike.
    x = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.bfloat16)
    mask, cotangent = jnp.ones((2, 6), bool), jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    system = _system(config, 3, "einsum", None)
    (_, (y32, plan32, routing32)), (d_state32, d_x32) = system(parameters, x.astype(jnp.float32), mask, cotangent)
    for mode in CAPACITY_MODES:
        (_, (y, plan, routing)), (d_state, d_x) = _system(config, 3, mode, None)(parameters, x, mask, cotangent)
        assert y.dtype == jnp.float32
        assert d_x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(routing.router_logits, routing32.router_logits)
        np.testing.assert_array_equal(plan.kept, plan32.kept)
        assert np.abs(np.asarray(y) - np.asarray(y32)).max() > 0, "it did run in bfloat16"
        pairs = zip(jax.tree.leaves((y, d_x, d_state)), jax.tree.leaves((y32, d_x32, d_state32)), strict=True)
        for ours, theirs in pairs:
            theirs = np.asarray(theirs)
            # Three matmuls and a product in sequence, 2^-8 each, relative to the largest value.
            np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=4 * 2**-8 * np.abs(theirs).max())


@pytest.mark.parametrize(("train", "capacity"), [(True, 2), (False, 4)])
def test_layer_takes_its_capacity_factor_from_the_phase(train, capacity, rng):
    # S = 8, E = 4, K = 1: factors 1 and 2 are capacities of 2 and 4.
    config = tiny_model(gate="switch", capacity_factor=1.0, eval_capacity_factor=2.0, dispatch="einsum")
    layer = MoELayer(config, rngs=nnx.Rngs(0))
    # Equal tokens all choose one expert, which keeps as many as its capacity.
    x = jnp.broadcast_to(jnp.asarray(rng.normal(size=config.d_model), jnp.float32), (3, 8, config.d_model))
    y, report, _ = jax.jit(lambda x: layer(x, jnp.ones((3, 8), bool), train=train))(x)
    kept = np.abs(np.asarray(y)).max(-1) > 0
    np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(8) < capacity, (3, 8)))
    assert float(report.fraction_tokens_dropped) == pytest.approx(1 - capacity / 8)


@pytest.mark.parametrize("group_size", [4, 16])
def test_groups_are_runs_of_the_batch_in_row_order(group_size, rng):
    """In rows of 8 tokens a group is half a row or two rows, and its outputs are those of its tokens as a separate
    batch."""
    config = tiny_model(gate="switch", group_size=group_size, capacity_factor=1.0, dispatch="einsum")
    layer = MoELayer(config, rngs=nnx.Rngs(0))
    whole = MoELayer(dataclasses.replace(config, moe=dataclasses.replace(config.moe, group_size=0)), rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(4, 8, config.d_model)), jnp.float32)
    y, report, _ = jax.jit(lambda x: layer(x, jnp.ones((4, 8), bool), train=True))(x)
    grouped = x.reshape(-1, group_size, config.d_model)
    expected, _, _ = jax.jit(lambda x: whole(x, jnp.ones(x.shape[:2], bool), train=True))(grouped)
    np.testing.assert_allclose(y.reshape(grouped.shape), expected, rtol=1e-6, atol=1e-6)
    assert float(report.fraction_tokens_dropped) > 0


def test_plan_is_a_pytree_with_static_sizes():
    plan = _plan(_routing([[[0]]], 2), capacity=1)
    assert len(jax.tree.leaves(plan)) == 2
    assert isinstance(plan, BufferPlan)
    assert (plan.capacity, plan.num_experts) == (1, 2)


def test_the_einsum_mode_does_not_round_combine_weights():
    """Products of the weights, and of their gradient, in full float32, as the other modes multiply elementwise."""
    layer = MoELayer(d_model=8, d_ff=16, num_experts=4, gate="mixtral", dispatch="einsum", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 8, 8))
    routing = jax.jit(lambda x: layer(x)[2])(x)
    backward = []

    def output(weights):
        return layer(x, routing=dataclasses.replace(routing, combine_weights=weights))[0]

    def with_gradient(weights):
        y, transpose = jax.vjp(output, weights)
        backward.append(str(jax.make_jaxpr(transpose)(y)))
        return y

    exact = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    forward = str(jax.make_jaxpr(with_gradient)(routing.combine_weights))
    assert forward.count(exact) >= 2  # into slots, and into tokens
    (text,) = backward
    assert text.count(exact) == text.count("= dot_general[") >= 2
