"""Gates of 2024 to 2026: quantile balancing, ReMoE, thresholds, zero-computation and latent experts, gates per
layer."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Capacity, ConfigError, MeshConfig, layer_kinds
from moe.config.registry import LAYERS
from moe.conformance import oracle, oracle_cases, reference_gates
from moe.interop.layers import single_layer
from moe.layers.cosine import CosineMoE
from moe.layers.moe_layer import MoELayer
from moe.layers.router import SelectionBias
from moe.layers.tokens import Keys
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.routing import balancing, interface
from moe.routing.balancing_rules import Momentum, Penalty, Quantile, Threshold
from moe.routing.gates import TopK
from moe.routing.newer_gates import column_potentials, coupling_loss
from tests.gate_helpers import LOGITS, SOFTPLUS_LOGITS
from tests.helpers import outputs, random_model, routed, slow_case, tiny_model

quantile = jax.jit(interface.quantile)


def report_of(routing, **moe):
    """The report of a routing of real tokens only, under a layer's config."""
    moe = tiny_model(num_experts=routing.router_logits.shape[-1], **moe).moe
    mask = jnp.ones(routing.chosen.shape[:2], bool)
    report = functools.partial(
        balancing.report,
        k=moe.experts_per_token,
        null_experts=moe.null_experts,
        weights=balancing.balance_weights(moe.num_experts, moe.null_experts, moe.losses.null),
    )
    return jax.jit(report)(routing, mask, routing.chosen)


def test_quantile_by_hand(rng):
    # Of 1, 2, 3, 4 (and padding), a quarter is below 2, a half below 3; none below 1.
    values = jnp.asarray([[[3.0], [1.0], [100.0], [4.0], [2.0]]])
    mask = jnp.asarray([[True, True, False, True, True]])
    for share, expected in ((0.25, 2.0), (0.5, 3.0), (0.0, 1.0)):
        np.testing.assert_allclose(quantile(values, mask, share), [expected], atol=1e-6)
    # The share is of the real tokens: a quarter of four, not of eight.
    more = jnp.pad(values, ((0, 0), (0, 3), (0, 0)), constant_values=100.0), jnp.pad(mask, ((0, 0), (0, 3)))
    np.testing.assert_allclose(quantile(*more, 0.25), [2.0], atol=1e-6)
    values = rng.normal(size=(3, 40, 5)).astype(np.float32)
    found = quantile(jnp.asarray(values), jnp.ones((3, 40), bool), 30 / 120)
    np.testing.assert_allclose(found, np.sort(values.reshape(120, 5), axis=0)[30], atol=1e-5)
    np.testing.assert_array_equal(quantile(jnp.asarray(values), jnp.zeros((3, 40), bool), 0.5), np.zeros(5))


def test_quantile_balancing_needs_one_step():
    # Scores of four tokens for two experts: expert 0 wins all, by 0.1, 0.2, 0.3 and 0.4. Cut-offs (K = 1) are the
    # second scores 0.5; biases needed: expert 0: 0.5 - (0.6, 0.7, 0.8, 0.9), expert 1: 0. Half of them are below
    # -0.2 for expert 0 (the value of the third lowest) and 0 for expert 1; centred: -0.1 and 0.1.
    scores = np.array([[[0.6, 0.5], [0.7, 0.5], [0.8, 0.5], [0.9, 0.5]]])
    logits = np.log(scores / (1 - scores))
    routing = routed("quantile_balancing", logits, 1, train=True)
    np.testing.assert_array_equal(routing.expert_index, np.zeros((1, 4, 1)))
    np.testing.assert_allclose(routing.needed_bias[0, :, 0], [-0.1, -0.2, -0.3, -0.4], atol=1e-6)
    moe = {"gate": "quantile_balancing", "experts_per_token": 1, "renormalise": 0}
    report = report_of(routing, **moe)
    np.testing.assert_allclose(report.sums.bias_target, [-0.2, 0.0], atol=1e-6)
    signal = Quantile(1.0).signal(report, 1)
    bias = Quantile(1.0).next_state(jnp.zeros(2), signal)
    np.testing.assert_allclose(bias, [-0.1, 0.1], atol=1e-6)
    after = routed("quantile_balancing", logits, 1, selection_bias=bias)
    np.testing.assert_array_equal(after.expert_index[0, :, 0][np.array([0, 2, 3])], [1, 0, 0])
    np.testing.assert_allclose(after.combine_weights[0, 3], [0.9], rtol=1e-6)  # the score, without the bias


def test_quantile_balancing_balances_many_experts(rng):
    """Three quantile steps balance eight experts, for which sign updates need about a hundred."""
    logits = jnp.asarray(rng.normal(size=(2, 512, 8)) + np.linspace(-2, 2, 8), jnp.float32)
    bias = jnp.zeros(8)

    @jax.jit
    def step(bias):
        routing = routed("quantile_balancing", logits, 2, selection_bias=bias, train=True)
        report = report_of(routing, gate="quantile_balancing", experts_per_token=2)
        signal = Quantile(1.0).signal(report, 2)
        return Quantile(1.0).next_state(bias, signal), report.expert_load

    _, first = step(bias)
    for _ in range(4):
        bias, load = step(bias)
    assert float(balancing.max_violation(first)) > 1
    assert float(balancing.max_violation(load)) < 0.15


def test_quantiles_of_sampled_experts_are_of_what_ranks_them(rng):
    """Experts are ranked by logits + noise + bias, so that quantiles are of these scores' distance to the cut-off, not
    of the softmax's."""
    # Second logits are the cut-offs of K = 1, here without noise: 1, 1 and 1.
    routing = routed("switch_sampled", [[[3.0, 1.0], [2.0, 1.0], [1.0, 2.0]]], 1, bias="quantile", train=True)
    np.testing.assert_allclose(routing.needed_bias, [[[-2, 0], [-1, 0], [0, -1]]])
    logits = jnp.asarray(rng.normal(size=(1, 512, 8)) + np.linspace(-2, 2, 8), jnp.float32)

    @jax.jit
    def step(bias):
        given = {"bias": "quantile", "selection_bias": bias, "rng": jax.random.key(0), "train": True}
        report = report_of(routed("switch_sampled", logits, 1, **given), gate="switch_sampled")
        signal = Quantile(1.0).signal(report, 1)
        return Quantile(1.0).next_state(bias, signal), report.expert_load

    bias, first = step(jnp.zeros(8))
    for _ in range(5):
        bias, load = step(bias)
    assert float(balancing.max_violation(first)) > 1
    assert float(balancing.max_violation(load)) < 0.15


def test_momentum_of_clamped_errors_by_hand():
    """SMEBU: two steps of u = 0.1, β = 0.5, κ = 2, for two layers at once."""
    rule = LAYERS["smebu"].gate.balancing
    assert (rule.rate, rule.decay, rule.clamp) == (5e-4, 0.5, 2.0)
    rule = Momentum(0.1)
    # Loads (3/4, 1/4) of mean 1/2: errors −1/2 and 1/2, clamped ∓tanh 1, of mean 0. Equal loads: nothing moves.
    report = types.SimpleNamespace(expert_load=jnp.asarray([[0.75, 0.25], [0.5, 0.5]]))
    state = jax.tree.map(lambda array: jnp.stack([array] * 2), rule.first_state(2))
    state = rule.next_state(state, rule.signal(report, 1))
    step = 0.1 * math.tanh(1)
    np.testing.assert_allclose(state["momentum"], [[-step / 2, step / 2], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(state["bias"], state["momentum"])
    # The second step has the momentum (1/2 + 1/4)·Δ, the bias (1/2 + 3/4)·Δ.
    state = rule.next_state(state, rule.signal(report, 1))
    np.testing.assert_allclose(state["momentum"][0], [-0.75 * step, 0.75 * step], rtol=1e-6)
    np.testing.assert_allclose(state["bias"][0], [-1.25 * step, 1.25 * step], rtol=1e-6)
    # All to one of four experts, of mean 1/4: errors −3, 1, 1, 1, clamped −tanh 6 and tanh 2, less their mean.
    report = types.SimpleNamespace(expert_load=jnp.asarray([1.0, 0.0, 0.0, 0.0]))
    moved = rule.next_state(rule.first_state(4), rule.signal(report, 1))["momentum"]
    mean = (3 * math.tanh(2) - math.tanh(6)) / 4
    np.testing.assert_allclose(moved, 0.05 * np.array([-math.tanh(6) - mean, *[math.tanh(2) - mean] * 3]), rtol=1e-5)


def test_remoe_by_hand():
    # Two tokens, three experts: ReLU gives (2, 0, 1) and (0, 0, 3).
    routing = routed("remoe", [[[2.0, -1.0, 1.0], [-0.5, -2.0, 3.0]]], 1)
    np.testing.assert_allclose(routing.combine_weights, [[[2, 0, 1], [0, 0, 3]]])
    np.testing.assert_array_equal(routing.chosen, [[[True, False, True], [False, False, True]]])
    # f = E/(K·T)·(1, 0, 2) = 3/2·(1, 0, 2), mean R = (1, 0, 2): the penalty is λ·(3/2·1 + 3·2) = 7.5 λ; 3 of 2 tokens.
    mask = jnp.ones((1, 2), bool)
    assert float(balancing.sparsity_penalty(routing, mask, 1, jnp.asarray(0.1))) == pytest.approx(0.75)
    assert float(balancing.sparsity_penalty(routing, mask, 2, jnp.asarray(0.1))) == pytest.approx(0.75 / 2)
    # A third token, of padding, does not count.
    real = jnp.asarray([[True, True, False]])
    padded = routed("remoe", [[[2.0, -1.0, 1.0], [-0.5, -2.0, 3.0], [5.0, 5.0, 5.0]]], 1, real)
    assert float(balancing.sparsity_penalty(padded, real, 1, jnp.asarray(0.1))) == pytest.approx(0.75)
    report = report_of(routing, gate="remoe")
    assert float(report.active_experts) == 1.5
    # 1.5 experts a token are more than K = 1: λ grows by 1.2; at K = 2 it falls.
    for k, expected in ((1, 1.2), (2, 1 / 1.2)):
        signal = Penalty(0.2).signal(report, k)
        strength = Penalty(0.2).next_state(jnp.ones(3), signal)
        np.testing.assert_allclose(strength, np.full(3, expected), rtol=1e-6)
    # 1e-8 falls by 1.2 to float32's smallest normal number, 1.2e-38, in 378 steps; it stops there, and can grow again.
    least = jnp.full(3, np.finfo(np.float32).tiny)
    falling = Penalty(0.2).next_state(least, -jnp.ones(3))
    grown = Penalty(0.2).next_state(falling, jnp.ones(3))
    np.testing.assert_allclose(grown, 1.2 * least, rtol=1e-6)
    # All layers have one λ: with 1.5, 1.5 and 5 experts a token, 2.67 on average, it grows at K = 2 in all of them.
    layers = jax.tree.map(lambda values: jnp.stack([values] * 3), report)
    layers = dataclasses.replace(layers, active_experts=jnp.asarray([1.5, 1.5, 5.0]))
    np.testing.assert_array_equal(Penalty(0.2).signal(layers, 2), np.ones((3, 3)))
    np.testing.assert_array_equal(Penalty(0.2).signal(layers, 3), -np.ones((3, 3)))
    # A token without a positive logit goes to no expert and has no probabilities.
    silent = routed("remoe", [[[-2.0, -1.0, 0.0]]], 1)
    np.testing.assert_array_equal(silent.router_probs, np.zeros((1, 1, 3)))
    assert not silent.chosen.any()


def test_thresholds_route_single_tokens_as_training_routed_the_batch():
    # p of expert 0: 0.9, 0.6, 0.2, 0.4. In training C = 2: expert 0 takes 0 and 1, expert 1 takes 2 and 3. The needed
    # biases are -p; half of them are below -0.4 (expert 0), the third lowest of (-0.9, -0.6, -0.4, -0.2).
    probs = np.array([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.4, 0.6]]])
    training = routed("expert_threshold", np.log(probs), 1, expert_capacity=2, train=True)
    np.testing.assert_array_equal(training.chosen[0], [[True, False], [True, False], [False, True], [False, True]])
    report = report_of(training, gate="expert_threshold", experts_per_token=1, accept_future_leak=True)
    np.testing.assert_allclose(report.sums.bias_target, [-0.4, -0.4], atol=1e-6)
    bias = Threshold(1.0).next_state(jnp.zeros(2), report.sums.bias_target) - 1e-5
    alone = [routed("expert_threshold", np.log(probs[:, i : i + 1]), 1, selection_bias=bias) for i in range(4)]
    np.testing.assert_array_equal(np.concatenate([r.chosen[0] for r in alone]), training.chosen[0])
    np.testing.assert_allclose(alone[0].combine_weights[0, 0], [0.9, 0.0], rtol=1e-6)
    # A probability equal to the threshold does not exceed it; without thresholds a token goes everywhere.
    equal = jnp.zeros((1, 1, 2))
    assert not routed("expert_threshold", equal, 1, selection_bias=jnp.asarray([-0.5, -0.5])).chosen.any()
    assert routed("expert_threshold", np.log(probs), 1, expert_capacity=1).chosen.all()


def test_thresholds_of_training_by_hand():
    # As above: half of the tokens' probabilities exceed 0.4 for both experts, which are the thresholds after a step.
    probs = np.array([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.4, 0.6]]])
    rule = LAYERS["running_thresholds"].gate.with_k(1).balancing
    start = rule.first_state(2)
    given = {"train": True, "selection_bias": rule.selection_bias(start)}
    routing = routed("running_thresholds", np.log(probs), 1, **given)
    assert routing.chosen.all(), "without thresholds every expert takes every token"
    report = report_of(routing, gate="running_thresholds", experts_per_token=1)
    state = rule.next_state(start, rule.signal(report, 1))
    np.testing.assert_allclose(state["bias"], [-0.4, -0.4], atol=1e-6)
    np.testing.assert_allclose(state["weight"], [0.05, 0.05], rtol=1e-6)
    # In the second step the target is −0.8: (0.95·0.05·(−0.4) + 0.05·(−0.8)) / (0.95·0.05 + 0.05) = −0.059 / 0.0975.
    second = rule.next_state(state, jnp.full(2, -0.8))
    np.testing.assert_allclose(second["bias"], [-0.059 / 0.0975] * 2, rtol=1e-5)
    # A token's experts do not depend on the others, in training neither.
    given["selection_bias"] = rule.selection_bias(state) - 1e-5
    together = routed("running_thresholds", np.log(probs), 1, **given)
    np.testing.assert_array_equal(together.chosen[0], [[True, False], [True, False], [False, True], [False, True]])
    alone = [routed("running_thresholds", np.log(probs[:, i : i + 1]), 1, **given) for i in range(4)]
    np.testing.assert_array_equal(np.concatenate([r.chosen[0] for r in alone]), together.chosen[0])


def test_sinkhorn_by_hand():
    # Expert 0 is ahead by 1, 2, 3 and 4. Its shares of the tokens are sigmoids of these + ln v_0 − ln v_1, and sum to
    # half of the tokens at −2.5, since ±1.5 and ±0.5 cancel. The fifth token is padding.
    ahead = jnp.asarray([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0], [9.0, 0.0]]])
    mask = jnp.asarray([[True] * 4 + [False]])
    np.testing.assert_allclose(column_potentials(ahead, mask, 100), [-1.25, 1.25], atol=1e-5)
    training = routed("sinkhorn", ahead, 1, mask, train=True)
    np.testing.assert_array_equal(training.expert_index[0, :4, 0], [1, 1, 0, 0])
    # The weight is the softmax's, without the plan.
    np.testing.assert_allclose(training.combine_weights[0, 0, 0], 1 / (1 + math.e), rtol=1e-6)
    np.testing.assert_array_equal(routed("sinkhorn", ahead, 1, mask).expert_index[0, :, 0], [0] * 5)
    nothing = column_potentials(ahead, jnp.zeros((1, 5), bool), 16)
    np.testing.assert_array_equal(nothing, [0.0, 0.0])
    assert LAYERS["sinkhorn"].gate.generates
    assert LAYERS["sinkhorn"].gate.looks_ahead


def test_cosines_by_hand(rng):
    # x = (3, 4) projected to (3, 4), (4, 3) in turn; centroids (2, 0), (0, 5): cosines 0.6 and 0.8, then 0.8 and 0.6.
    # τ = 1/2: twice that, whatever the lengths of x and the centroids. ln(1/τ) is at most ln 100.
    router = np.array([[2.0, 0.0], [0.0, 5.0]])
    section = {"name": "cosine", "k": 1, "router_dim": 2}
    expected = np.array([[1.2, 1.6], [1.6, 1.2]])
    for log_scale, scale in ((np.log(2), 1.0), (np.log(1e4), 50.0)):
        layer = single_layer(
            section,
            router=router,
            router_parts={"project": np.eye(2), "log_scale": np.array([log_scale])},
            up=rng.normal(size=(2, 2, 3)),
            down=rng.normal(size=(2, 3, 2)),
            activation="relu",
        )
        x = jnp.asarray([[[3.0, 4.0], [40.0, 30.0]]])
        np.testing.assert_allclose(layer.router(x)[0], scale * expected, rtol=1e-5)
    fresh = CosineMoE(d_model=4, d_ff=4, num_experts=3, gate="cosine", rngs=nnx.Rngs(0)).router
    assert (fresh.kernel.shape, fresh.project.shape) == ((64, 3), (4, 64))
    np.testing.assert_allclose(np.exp(fresh.log_scale[...]), [1 / 0.07], rtol=1e-6)


def test_the_gradient_of_one_number_is_compared_with_the_routers():
    """2e-5 beside 4 is 5e-6, whatever the sum over tokens cancels to; a wrong factor of that sum is 0.05."""
    exact = {"router": np.array([[4.0, -1.0]]), "router_parts.log_scale": np.array([0.2]), "up": np.array([0.2, 0.1])}
    near = {name: gradient + 2e-5 for name, gradient in exact.items()}
    measured = oracle.errors(near, exact)
    assert measured == pytest.approx({"router": 5e-6, "router_parts.log_scale": 5e-6, "up": 1e-4})
    wrong = oracle.errors(exact | {"router_parts.log_scale": np.array([0.4])}, exact)
    assert wrong == pytest.approx({"router": 0, "router_parts.log_scale": 0.05, "up": 0})


def test_float32_gradients_are_not_compared_at_saturated_tokens():
    """Softmax of (5, 0, 0) has 148 / 150 = 0.987 as its largest probability, that of (6, 0, 0) 403 / 405 = 0.995."""
    x, router = jnp.array([[[5.0], [6.0]]]), np.array([[1.0, 0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(oracle.unsaturated(x, router), [[[5.0], [1.5]]])


def test_coupling_loss_by_hand(rng):
    # Columns (1, 0) and (0, 2); the experts' matrices are diag(3, 4)·1 and diag(6, 1). Norms M: 3, 6; 8, 2.
    compiled = jax.jit(coupling_loss, static_argnums=2)
    columns = jnp.asarray([[1.0, 0.0], [0.0, 2.0]])
    experts = jnp.asarray([[[3.0, 0.0], [0.0, 4.0]], [[6.0, 0.0], [0.0, 1.0]]])
    # i = 0: 6 − 3 and 8 − 3; i = 1: 8 − 2 and 6 − 2; over 4.
    assert float(compiled(columns, experts, 1.0, None)) == pytest.approx((3 + 5 + 6 + 4) / 4)
    # α = 2: 6 − 6 and 8 − 6; 8 − 4 and 6 − 4.
    assert float(compiled(columns, experts, 2.0, None)) == pytest.approx((0 + 2 + 4 + 2) / 4)
    # The columns are √5 apart: factors of column 0 are within 1 ± √5/2, of column 1 within 1 ± √5/4.
    key = jax.random.key(0)
    draws = jax.random.uniform(key, (2, 2), minval=-1.0, maxval=1.0) * jnp.asarray([[5**0.5 / 2], [5**0.5 / 4]])
    moved = (columns.T * (1 + draws)).T
    noisy = compiled(columns, experts, 1.0, key)
    assert float(noisy) == pytest.approx(float(compiled(moved, experts, 1.0, None)), rel=1e-6)
    assert float(compiled(columns[:, :1], experts[:1], 1.0, key)) == 0
    # In training it is part of the report, with a gradient of both; in evaluation it is not.
    weights = {"router": rng.normal(size=(4, 3)), "up": rng.normal(size=(3, 4, 5)), "down": rng.normal(size=(3, 5, 4))}
    section = {"name": "coupled", "k": 2, "coupling": 0.5}
    layer = single_layer(section, **weights, activation="relu", dispatch="dropless")
    x = jnp.asarray(rng.normal(size=(1, 6, 4)), jnp.float32)
    report = jax.jit(lambda x: layer(x, train=True)[1])(x)
    expected = 0.5 * compiled(*(jnp.asarray(weights[name], jnp.float32) for name in ("router", "up")), 1.0, None)
    np.testing.assert_allclose(report.sparsity_penalty, expected, rtol=1e-6)
    assert float(jax.jit(lambda x: layer(x)[1])(x).sparsity_penalty) == 0


@pytest.mark.parametrize("latent_dim", [slow_case(0), 5])
def test_the_coupling_loss_is_of_the_columns_of_ffn_experts(latent_dim):
    """Columns of experts without an FFN have no matrices: the loss is that of the layer without them, with their
    gradient 0."""
    gate = dataclasses.replace(LAYERS["coupled"].gate, k=2)
    sizes = {"d_model": 4, "d_ff": 6, "num_experts": 3, "latent_dim": latent_dim, "gate": gate}
    layer = MoELayer(zero_experts=1, constant_experts=2, rngs=nnx.Rngs(0), **sizes)
    columns = layer.router.kernel[:, :3]
    columns = columns if layer.latent is None else layer.latent.down[...].T @ columns
    key, x = jax.random.key(1), jnp.ones((1, 4, 4))

    @nnx.jit
    def penalty(layer):
        return layer(x, train=True, rng=key)[1].sparsity_penalty

    loss, slopes = nnx.value_and_grad(penalty)(layer)
    expected = coupling_loss(columns, layer.experts.gate[...], 1.0, Keys.split(key).gate)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    slope = np.asarray(slopes["router"]["kernel"][...])
    assert np.abs(slope[:, :3]).max(axis=0).all()
    np.testing.assert_array_equal(slope[:, 3:], 0)


def test_sizes_of_pools_are_drawn_by_document(rng):
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0]], 16, axis=1).reshape(1, 64))
    given = {"least_pool": 0.25, "most_pool": 0.75, "segment_ids": segments}
    logits = rng.normal(size=(1, 64, 8))
    routing = routed("emo", logits, 1, segments > 0, rng=jax.random.key(2), **given)
    inside = np.asarray(routing.router_probs[0, :48] > 0).reshape(3, 16, 8)
    assert (inside == inside[:, :1]).all(), "the tokens of a document have one pool"
    sizes = inside[:, 0].sum(-1)
    assert len(set(sizes)) > 1
    assert sizes.min() >= 2
    assert sizes.max() <= 6
    for message, fields in (
        ("least_pool=0.5: must be at most most_pool=0.25", {"least_pool": 0.5, "most_pool": 0.25}),
        ("bias='sign': must be none with pools", {"bias": "sign"}),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(LAYERS["emo"].gate, **fields)


def test_k_is_drawn_in_training_by_layer(rng):
    """M-MoE: each of 2 to 4 experts is drawn with a probability of a third, for all tokens of a layer at once."""
    logits = rng.normal(size=(2, 5, 6))
    fixed = routed("matryoshka", logits, 4)
    counts = []
    for seed in range(90):
        drawn = routed("matryoshka", logits, 4, rng=jax.random.key(seed), train=True, least_k=2)
        counts.append(int(drawn.chosen[0, 0].sum()))
        assert (drawn.chosen == (np.arange(4) < counts[-1])).all(), "the first experts, of every token"
        np.testing.assert_array_equal(drawn.expert_index, fixed.expert_index)
        np.testing.assert_array_equal(drawn.combine_weights, np.where(drawn.chosen, fixed.combine_weights, 0))
    # 30 of 90 each; four standard deviations are 4·√(90·2/9) = 18.
    assert all(12 <= counts.count(k) <= 48 for k in (2, 3, 4))
    # K = 1 in evaluation: the same first expert with the same weight, and the second is not sent.
    fewer = routed("matryoshka", LOGITS, 2, eval_k=1)
    np.testing.assert_array_equal(fewer.chosen, [[[True, False]] * 2])
    np.testing.assert_allclose(fewer.combine_weights, [[[6 / 12, 0], [9 / 16, 0]]], rtol=1e-6)
    # Without a key a step of training sends all, whatever K evaluation has.
    assert routed("matryoshka", logits, 4, train=True, eval_k=1).chosen.all()
    for message, fields in (
        ("least_k=7: must be at most k=6", {"least_k": 7}),
        ("eval_k=7: must be at most k=6", {"eval_k": 7}),
        ("renormalise=True: must be False where K is drawn", {"renormalise": True}),
        ("bias='quantile': must be none, sign or momentum where K", {"bias": "quantile"}),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(LAYERS["matryoshka"].gate, **fields)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        (oracle_cases.OVERFLOW, reference_gates.Rule(overflow=True)),
        (oracle_cases.LEAK | {"drop_policy": "probability"}, oracle_cases.BY_PROBABILITY),
    ],
    ids=["overflow", "priority"],
)
@pytest.mark.slow
def test_overflow_and_priority_under_noise_use_the_noisy_scores(fields, rule, full):
    case = oracle_cases.Case("noisy_topk", 2, 6, 5, 2, 2, 0.2, fields, rule, draws=True, full=full)
    for row in oracle.against_oracle(case, seed=1):
        assert row.passes, row


@pytest.mark.parametrize("factor", [0.5, *map(slow_case, (1.0, 2.0))])
def test_thresholds_follow_the_capacity_of_training(factor, rng):
    """C = factor · 2 · 16 / 4 of 16 tokens, a quarter of them padding: the thresholds let through as many tokens."""
    sizes = {"num_experts": 4, "experts_per_token": 2, "capacity_factor": factor}
    config = tiny_model(gate="expert_threshold", accept_future_leak=True, dispatch="einsum", **sizes)
    layer = MoELayer(config, rngs=nnx.Rngs(0))
    x, mask = jnp.asarray(rng.normal(size=(8, 16, config.d_model)), jnp.float32), jnp.arange(16) < 12
    mask = jnp.broadcast_to(mask, (8, 16))
    training = nnx.jit(lambda layer: layer(x, mask, train=True)[1])(layer)
    layer.router.bias[...] = training.sums.bias_target
    alone = nnx.jit(lambda layer: layer(x, mask)[1])(layer)
    assert float(alone.active_experts) == pytest.approx(float(training.active_experts), rel=0.05)


def test_hashed_experts_are_weighted_by_their_scores():
    """softplus (4, 1, 9, 16) has the roots 2, 1, 3, 4; the hash chooses independently of them."""
    token = jnp.asarray([[7]])
    index = routed("hash", SOFTPLUS_LOGITS, 2, token_ids=token).expert_index
    routing = routed("deepseek_v4_hash", SOFTPLUS_LOGITS, 2, token_ids=token)
    np.testing.assert_array_equal(routing.expert_index, index)
    chosen = np.array([2.0, 1.0, 3.0, 4.0])[np.asarray(index)[0, 0]]
    np.testing.assert_allclose(routing.combine_weights[0, 0], 1.5 * chosen / chosen.sum(), rtol=1e-6)


@pytest.mark.parametrize("mode", ["gather", slow_case("einsum"), slow_case("dropless")])
def test_zero_copy_and_constant_experts_by_hand(mode):
    # Two FFNs that double and treble x = (1, 1) (ReLU acts as the identity on a positive x), then a zero, a copy and a
    # constant expert. With K = 5 all are chosen, with the softmax weights (1, 2, 3, 4, 6)/16.
    config = tiny_model(gate="moe_plus_plus", num_experts=2, experts_per_token=2, d_model=2, constant_experts=1)
    config = dataclasses.replace(config, activation="relu")
    moe = dataclasses.replace(config.moe, d_ff=2, dispatch=mode, capacity=Capacity(eval=9.0))
    layer = MoELayer(dataclasses.replace(config, moe=moe), rngs=nnx.Rngs(0))
    layer.gate = TopK(k=5)
    layer.experts.up[...] = jnp.broadcast_to(jnp.eye(2), (2, 2, 2))
    layer.experts.down[...] = jnp.stack([2 * jnp.eye(2), 3 * jnp.eye(2)])
    layer.router.kernel[...] = jnp.stack([jnp.log(jnp.asarray([1.0, 2.0, 3.0, 4.0, 6.0])), jnp.zeros(5)])
    layer.null.vectors[...] = jnp.asarray([[8.0, 0.0]])
    layer.null.mix[...] = jnp.asarray([[[np.log(3.0), 0.0], [0.0, 0.0]]])  # alpha = (3/4, 1/4)
    y, report, routing = jax.jit(layer.__call__)(jnp.ones((1, 1, 2)))
    # (2·1 + 3·2 + 0·3 + 1·4)/16 = 12/16 of x; the constant: 6/16·(3/4·x + 1/4·(8, 0)) = 4.5/16·x + (12/16, 0).
    np.testing.assert_allclose(y[0, 0], [16.5 / 16 + 12 / 16, 16.5 / 16], rtol=1e-5)
    assert sorted(np.asarray(routing.expert_index)[0, 0]) == [0, 1, 2, 3, 4]
    assert float(report.active_experts) == 2
    assert float(report.fraction_tokens_dropped) == 0
    # f = 1/5 each; E·Σ η f P = 5·1/5·(3/16 + 0.75·13/16), with τ = 0.75.
    np.testing.assert_allclose(report.load_balancing_loss, 3 / 16 + 0.75 * 13 / 16, rtol=1e-5)


def test_novices_by_hand():
    """Among two FFNs and two novices with vectors (8, 0) and (0, 16), x = (1, 1) chooses the second of each.

    3/4 of FFN 1, which trebles x, and 1/4 of novice 1 are (9/4, 9/4) + (0, 4). The other novice has no gradient.
    """
    config = tiny_model(gate="mixtral", num_experts=2, d_model=2, zero_experts=1, novice_experts=2, dispatch="dropless")
    config = dataclasses.replace(config, activation="relu", moe=dataclasses.replace(config.moe, d_ff=2))
    layer = MoELayer(config, rngs=nnx.Rngs(0))
    layer.experts.up[...] = jnp.broadcast_to(jnp.eye(2), (2, 2, 2))
    layer.experts.down[...] = jnp.stack([2 * jnp.eye(2), 3 * jnp.eye(2)])
    layer.router.kernel[...] = jnp.stack([jnp.log(jnp.asarray([1e-9, 3e-2, 1e-9, 1e-9, 1e-2])), jnp.zeros(5)])
    layer.null.novices[...] = jnp.asarray([[8.0, 0.0], [0.0, 16.0]])
    graphdef, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def first(parameters):
        y, _, routing = nnx.merge(graphdef, parameters, rest)(jnp.ones((1, 1, 2)))
        return y[0, 0, 1], (y, routing)

    (_, (y, routing)), gradient = jax.jit(jax.value_and_grad(first, has_aux=True))(parameters)
    assert sorted(np.asarray(routing.expert_index)[0, 0]) == [1, 4]
    np.testing.assert_allclose(y[0, 0], [9 / 4, 9 / 4 + 4], rtol=1e-5)
    np.testing.assert_allclose(gradient["null"]["novices"][...], [[0, 0], [0, 1 / 4]], atol=1e-6)


def test_the_cases_of_the_oracle_have_gates_that_fit_their_experts():
    """K is set together with the other fields, since a gate may refuse them with its own K."""
    for case in (*oracle_cases.CASES, *oracle_cases.edges(), oracle_cases.NOVICES):
        gate = case.create_gate()
        gate.check_experts(case.e, sum(case.rule.null))
        assert gate.experts_per_token(case.e) == case.k or not gate.sets_k


@pytest.mark.slow
def test_novices_equal_the_oracle_in_every_mode():
    """Values and gradients, together with zero, copy and constant experts."""
    rows = list(oracle.against_oracle(oracle_cases.NOVICES, seed=1))
    assert [row for row in rows if not row.passes] == []
    assert len(rows) == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gather", "einsum", "dropless"])
def test_novices_are_equal_on_eight_devices(mode, rng):
    """y and all gradients in training on data 2 x fsdp 2 x expert 2 equal those on one device."""
    weights = oracle.weights_of(8, 8, 4, 11, null=(0, 0, 0, 2))
    layer = single_layer(
        "mixtral", **oracle.read_by("mixtral", weights), novice_experts=2, dispatch=mode, capacity={"train": 1.0}
    )
    x, mask = jnp.asarray(rng.normal(size=(8, 6, 8)), jnp.float32), rng.random((8, 6)) >= 0.2
    run = oracle.program(layer, train=True)
    alone = run(x, mask, np.ones(x.shape, np.float32))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, partition_specs.shardings(mesh, partition_specs.BATCH))
        spread = run(placed, mask, np.ones(x.shape, np.float32))
    assert float(jnp.abs(alone[1]["novices"]).min()) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), spread, alone)


@pytest.mark.parametrize("mode", ["gather", slow_case("einsum"), slow_case("dropless")])
def test_latent_experts_are_experts_of_projected_tokens(mode, rng):
    """The layer equals a layer of model dim 4 on x·down, with the router's weights for x, its output multiplied by
    up."""
    config = tiny_model(gate="mixtral", latent_dim=4, num_experts=8, dispatch=mode, eval_capacity_factor=4.0)
    layer = MoELayer(config, rngs=nnx.Rngs(0))
    assert layer.experts.up.shape == (8, 4, config.moe.d_ff)
    inner = dataclasses.replace(config, d_model=4, moe=dataclasses.replace(config.moe, latent_dim=0))
    small = MoELayer(inner, rngs=nnx.Rngs(1))
    for name in ("up", "gate", "down"):
        getattr(small.experts, name)[...] = getattr(layer.experts, name)[...]
    x = jnp.asarray(rng.normal(size=(2, 8, config.d_model)), jnp.float32)
    y, routing = outputs(layer)(x)
    expected, _ = outputs(small)(x @ layer.latent.down[...], routing=routing)
    np.testing.assert_allclose(y, expected @ layer.latent.up[...], rtol=1e-4, atol=1e-6)


LAYERED = {
    "gate": "deepseek_v4",
    "experts_per_token": 2,
    "num_experts": 8,
    "layer_gates": ("deepseek_v4_hash", "hash"),
}


@pytest.mark.parametrize("mesh", [None, slow_case(MeshConfig(data=2, expert=4))], ids=["alone", "mesh"])
def test_layers_have_gates_of_their_own(rng, mesh):
    """A dense layer, then scored hash, hash, and two layers of top-k, without and with a mesh."""
    config = tiny_model(num_layers=5, first_dense=1, d_model=16, num_kv_heads=4, dispatch="einsum", **LAYERED)
    names = [kind.gate and kind.gate.name for kind in layer_kinds(config)]
    assert names == [None, "deepseek_v4_hash", "hash", *["deepseek_v4"] * 2]
    model = random_model(config)
    # Only gates that select by a bias have one, and the hash layer has no router.
    biases = nnx.to_pure_dict(nnx.state(model, SelectionBias))
    assert list(biases) == ["segment_3"]
    assert model.segment_2.block_0.moe.router is None
    assert model.segment_1.block_0.moe.gate.score == "sqrt_softplus"
    tokens = jnp.asarray(rng.integers(1, 48, (8, 6)))

    @jax.jit
    def run(tokens):
        output = model(tokens, return_routing=True)
        over = balancing.over_step(output.layers, output.layers.sums, 1.0, 1)
        losses = over.load_balancing_loss, output.layers.importance_loss, output.layers.load_loss
        return output.logits, output.routing.expert_index, losses

    logits, index, losses = jax.device_get(run(tokens))
    assert index.shape == (4, 8, 6, 2)
    hashed = routed("hash", np.zeros((8, 6, 8)), 2, token_ids=tokens).expert_index
    np.testing.assert_array_equal(index[:2], np.stack([hashed, hashed]))
    assert (index[2] != hashed).any()
    # The hash layer's losses, which have no gradient, are 0, over the batch and over a step.
    for loss in losses:
        assert float(loss[1]) == 0
        assert float(loss[2]) > 0
    if mesh:
        with jax.set_mesh(make_mesh(mesh)):
            spread, *_ = run(tokens)
        np.testing.assert_allclose(spread, logits, rtol=1e-4, atol=1e-5)


def test_probabilities_of_other_scores_sum_to_one():
    for gate in ("deepseek_v4", "quantile_balancing"):
        np.testing.assert_allclose(routed(gate, LOGITS, 2).router_probs.sum(-1), np.ones((1, 2)), rtol=1e-6)
