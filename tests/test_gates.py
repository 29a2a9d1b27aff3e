"""The gates beyond the four of the core: hand-computed values, draws, losses, drops, replay, refusals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from moe.config import Config, ConfigError, MeshConfig, to_config_dict, validate_mesh
from moe.dispatch.modes import CONFIG_MODES
from moe.dispatch.plan import make_plan, overflow_to_next
from moe.interop.layers import single_layer
from moe.layers.moe_layer import MoELayer
from moe.models.decoder import Transformer
from moe.models.stack import selection_biases
from moe.parallel.mesh import make_mesh
from moe.routing import balancing
from moe.routing.registry import GATES
from moe.routing.resolve import from_config_dict, resolve, validate
from moe.routing.router import Router, SelectionBias
from moe.routing.routing import route
from moe.training.step import build, place
from tests.helpers import FOUR, tiny_model

# Two tokens with probabilities (6, 3, 1, 2)/12 and (1, 2, 9, 4)/16.
LOGITS = np.log([[[6.0, 3.0, 1.0, 2.0], [1.0, 2.0, 9.0, 4.0]]])
# Sigmoids: token 0 (0.8, 0.5, 0.6, 0.2), token 1 (0.1, 0.3, 0.4, 0.9); s/(1 − s) is the exponential of the logit.
SIGMOIDS = np.array([[[0.8, 0.5, 0.6, 0.2], [0.1, 0.3, 0.4, 0.9]]])
SIGMOID_LOGITS = np.log(SIGMOIDS / (1 - SIGMOIDS))


def routed(gate, logits, k=None, mask=None, **given):
    """route() on logits [G,S,E], all real unless said otherwise."""
    logits = jnp.asarray(logits, jnp.float32)
    mask = jnp.ones(logits.shape[:2], bool) if mask is None else jnp.asarray(mask)
    k = k or GATES[gate].experts_per_token or logits.shape[-1]
    return route(GATES[gate], logits, mask, experts_per_token=k, **given)


HAND_COMPUTED = [
    # Without a key no noise: softmax(ln 6, ln 3) = (6, 3)/9; softmax(ln 9, ln 4) = (9, 4)/13.
    ("noisy_topk", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 9, 3 / 9], [9 / 13, 4 / 13]]),
    ("st_moe", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 9, 3 / 9], [9 / 13, 4 / 13]]),
    ("deepseek_moe", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 12, 3 / 12], [9 / 16, 4 / 16]]),
    # Two groups, one kept, by its best expert: token 0 keeps (0, 1), token 1 keeps (2, 3). Renormalised and doubled.
    (
        "deepseek_moe",
        np.log([[[6.0, 1.0, 3.0, 2.0], [1.0, 2.0, 9.0, 4.0]]]),
        {"expert_groups": 2, "kept_expert_groups": 1, "renormalise": True, "routing_scale": 2.0},
        [[0, 1], [2, 3]],
        [[2 * 6 / 7, 2 * 1 / 7], [2 * 9 / 13, 2 * 4 / 13]],
    ),
    ("deepseek_v3", SIGMOID_LOGITS, {}, [[0, 2], [3, 2]], [[0.8, 0.6], [0.9, 0.4]]),
    # 0.8/1.4·2.5 and 0.6/1.4·2.5; 0.9/1.3·2.5 and 0.4/1.3·2.5.
    (
        "deepseek_v3",
        SIGMOID_LOGITS,
        {"renormalise": True, "routing_scale": 2.5},
        [[0, 2], [3, 2]],
        [[2.0 / 1.4, 1.5 / 1.4], [2.25 / 1.3, 1.0 / 1.3]],
    ),
    # The bias decides the choice, the weights are the unbiased sigmoids: 0.2 + 0.5 = 0.7 beats 0.6 and 0.5; then 0.9.
    (
        "deepseek_v3",
        SIGMOID_LOGITS,
        {"selection_bias": jnp.asarray([0.0, 0.0, 0.0, 0.5])},
        [[0, 3], [3, 2]],
        [[0.8, 0.2], [0.9, 0.4]],
    ),
    # Groups (0, 1) and (2, 3) by the sum of two: 1.3 against 0.8; 0.4 against 1.3.
    (
        "deepseek_v3",
        SIGMOID_LOGITS,
        {"expert_groups": 2, "kept_expert_groups": 1},
        [[0, 1], [3, 2]],
        [[0.8, 0.5], [0.9, 0.4]],
    ),
    # A group's bias counts in its score: with −0.8 on expert 0, (0, 1) has 0.5 against 0.8.
    (
        "deepseek_v3",
        SIGMOID_LOGITS,
        {"expert_groups": 2, "kept_expert_groups": 1, "selection_bias": jnp.asarray([-0.8, 0.0, 0.0, 0.0])},
        [[2, 3], [3, 2]],
        [[0.6, 0.2], [0.9, 0.4]],
    ),
    # Round-robin, weights the softmax over the chosen.
    ("balanced", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 9, 3 / 9], [9 / 13, 4 / 13]]),
]


@pytest.mark.parametrize(("gate", "logits", "given", "experts", "weights"), HAND_COMPUTED)
def test_hand_computed_values(gate, logits, given, experts, weights):
    routing = routed(gate, logits, 2, **given)
    np.testing.assert_array_equal(routing.expert_index, [experts])
    np.testing.assert_allclose(routing.combine_weights, [weights], rtol=1e-5)
    assert bool(jnp.all(routing.chosen))


def test_every_gate_is_tested_by_hand_or_by_its_own_test():
    own = {"expert_choice", "soft_moe", "hash", "random", "switch_sampled"}
    assert {gate for gate, *_ in HAND_COMPUTED} | own | set(FOUR) == set(GATES)


@pytest.mark.parametrize("gate", sorted(set(GATES) - {"expert_choice"}))
def test_padding_and_broken_tokens_are_never_chosen(gate, rng):
    logits = rng.normal(size=(2, 12, 8))
    logits[0, 3, 1], logits[1, 5, 0], logits[1, 6, 2] = np.nan, np.inf, -np.inf
    mask = rng.random((2, 12)) < 0.7
    mask[0, 3] = mask[1, 5] = True
    mask[1, 6] = False  # broken padding is not counted
    routing = routed(gate, logits, None, mask, token_ids=jnp.zeros((2, 12), jnp.int32))
    valid = mask & np.isfinite(logits).all(-1)
    np.testing.assert_array_equal(routing.chosen, np.broadcast_to(valid[..., None], routing.chosen.shape))
    np.testing.assert_array_equal(routing.broken, mask & ~valid)
    assert (np.asarray(routing.combine_weights)[~valid] == 0).all()
    report = balancing.report(routing, jnp.asarray(mask), routing.chosen)
    assert float(report.broken_tokens) == 2
    for field in dataclasses.fields(report):
        assert np.isfinite(getattr(report, field.name)).all(), field.name


def test_broken_noise_breaks_its_token_and_underflowing_noise_does_not(rng):
    logits, noise = rng.normal(size=(1, 5, 4)), np.full((1, 5, 4), -200.0)  # softplus(-200) is 0 in float32
    noise[0, 1, 2] = np.nan
    logits[0, 3] = 1.0  # equal logits: 0/0 without a least deviation

    def load(noise):
        routing = routed("noisy_topk", logits, 2, noise_logits=noise, rng=jax.random.key(0))
        return balancing.load_loss(routing, ~routing.broken), routing

    gradient, routing = jax.jit(jax.grad(load, has_aux=True))(jnp.asarray(noise, jnp.float32))
    np.testing.assert_array_equal(routing.broken[0], np.arange(5) == 1)
    assert not routing.chosen[0, 1].any()
    assert np.isfinite(routing.smooth_load).all()
    assert np.isfinite(gradient).all()


def test_expert_choice_by_hand():
    # p of expert 0 for three tokens: 0.9, 0.6, 0.2. With C = 2, expert 0 takes tokens 0 and 1, expert 1 tokens 2 and 1.
    probs = np.array([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]])
    routing = routed("expert_choice", np.log(probs), 1, expert_capacity=2)
    np.testing.assert_array_equal(routing.chosen, [[[True, False], [True, True], [False, True]]])
    np.testing.assert_allclose(routing.combine_weights, np.where(routing.chosen, probs, 0), rtol=1e-6)
    # Token 0 being padding, expert 0 takes the two others.
    padded = routed("expert_choice", np.log(probs), 1, [[False, True, True]], expert_capacity=2)
    np.testing.assert_array_equal(padded.chosen, [[[False, False], [True, True], [True, True]]])


def test_expert_choice_never_drops_and_is_balanced(rng):
    routing = routed("expert_choice", rng.normal(size=(3, 16, 4)), 2, expert_capacity=8)
    np.testing.assert_array_equal(routing.chosen.sum(1), np.full((3, 4), 8))
    np.testing.assert_array_equal(make_plan(routing, 8).kept, routing.chosen)


def test_hash_depends_on_the_token_alone():
    tokens = jnp.asarray([[5, 17, 5, 900], [17, 5, 0, 900]])
    routing = routed("hash", np.zeros((2, 4, 6)), 2, token_ids=tokens)
    experts = {}
    for token, pair in zip(np.asarray(tokens).ravel(), np.asarray(routing.expert_index).reshape(-1, 2), strict=True):
        assert experts.setdefault(int(token), tuple(pair)) == tuple(pair)
        assert pair[0] != pair[1]
    assert len(set(experts.values())) > 1
    np.testing.assert_array_equal(routing.combine_weights, np.full((2, 4, 2), 0.5))
    with pytest.raises(ValueError, match="token_ids"):
        routed("hash", np.zeros((2, 4, 6)), 2)


@pytest.mark.parametrize("gate", ["hash", "random"])
def test_baselines_spread_evenly(gate):
    routing = routed(gate, np.zeros((1, 8000, 5)), 1, token_ids=jnp.arange(8000)[None], rng=jax.random.key(1))
    load = np.bincount(np.asarray(routing.expert_index).ravel(), minlength=5)
    # A count is 1600 ± sqrt(8000·0.2·0.8) = 36: five of them.
    assert np.abs(load - 1600).max() < 180


def test_random_draws_anew_with_each_key_and_never_in_evaluation():
    logits = np.zeros((1, 200, 4))
    first, second = (routed("random", logits, rng=jax.random.key(seed)).expert_index for seed in (0, 1))
    assert 0.5 < float(jnp.mean(first != second)) < 0.95  # 3/4 differ by chance
    np.testing.assert_array_equal(routed("random", logits).expert_index, routed("random", logits).expert_index)


def test_sampled_experts_follow_the_softmax():
    # p = (0.7, 0.2, 0.1): counts in 4000 draws are 2800, 800, 400, each within 4·sqrt(4000·0.7·0.3) = 116.
    probs = np.broadcast_to([0.7, 0.2, 0.1], (1, 4000, 3))
    routing = routed("switch_sampled", np.log(probs), 1, rng=jax.random.key(0))
    index = np.asarray(routing.expert_index)[..., 0]
    np.testing.assert_allclose(np.bincount(index.ravel(), minlength=3), [2800, 800, 400], atol=116)
    np.testing.assert_allclose(routing.combine_weights[..., 0], probs[0, 0][index], rtol=1e-6)  # p itself, not 1
    # Two without replacement are two different ones, and without a key there is no draw.
    pairs = np.asarray(routed("switch_sampled", np.log(probs), 2, rng=jax.random.key(1)).expert_index)
    assert (pairs[..., 0] != pairs[..., 1]).all()
    np.testing.assert_array_equal(routed("switch_sampled", np.log(probs), 2).expert_index[0, 0], [0, 1])


def test_the_router_rounds_only_when_asked(rng):
    x, logits = jnp.asarray(rng.normal(size=(1, 4, 16)), jnp.float32), {}
    for dtype in ("float32", "bfloat16"):
        config = tiny_model(gate="switch", router_dtype=dtype)
        router = Router(config, rngs=nnx.Rngs(0))
        logits[dtype] = np.asarray(router(x))
        assert logits[dtype].dtype == np.float32
    rounded = logits["bfloat16"].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(logits["bfloat16"], rounded)
    assert (logits["float32"] != rounded).all()
    np.testing.assert_allclose(logits["float32"], rounded, atol=0.05)


def test_balanced_skips_padding_and_goes_on_in_the_next_group():
    mask = [[True, False, True, True], [True, True, True, True]]
    routing = routed("balanced", np.zeros((2, 4, 3)), 1, mask)
    # Group 0: real tokens take 0, 1, 2; group 1 starts at token 4: 1, 2, 0, 1.
    experts = np.asarray(routing.expert_index)[..., 0]
    np.testing.assert_array_equal(experts[0][np.array(mask[0])], [0, 1, 2])
    np.testing.assert_array_equal(experts[1], [1, 2, 0, 1])


def test_noise_is_softplus_of_its_own_logits():
    shape = (1, 5000, 3)
    # softplus(0.5) = 0.974 for expert 1; the others hardly any noise. Expert 0 is 1 ahead of expert 1.
    noise = jnp.broadcast_to(jnp.asarray([-20.0, 0.5, -20.0]), shape)
    logits = jnp.broadcast_to(jnp.asarray([1.0, 0.0, -9.0]), shape)
    routing = routed("noisy_topk", logits, 1, noise_logits=noise, rng=jax.random.key(0))
    share = float(jnp.mean(routing.expert_index == 1))
    expected = scipy.stats.norm.sf(1 / math.log1p(math.exp(0.5)))  # 0.152
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 5000)
    np.testing.assert_array_equal(
        routed("noisy_topk", logits, 1, noise_logits=noise).expert_index, np.zeros((1, 5000, 1))
    )


def test_smooth_load_is_the_chance_to_stay_chosen_under_new_noise():
    """Shazeer 2017, equation 8, by drawing expert i's noise again and again, the others' held."""
    logits = np.array([0.3, 0.1, -0.2, 0.5], np.float32)
    noise = np.array([0.2, -0.4, 0.6, 0.0], np.float32)
    key, k = jax.random.key(3), 2
    routing = routed("noisy_topk", logits[None, None], k, noise_logits=jnp.asarray(noise)[None, None], rng=key)
    deviation = np.log1p(np.exp(noise))
    noisy = logits + np.asarray(jax.random.normal(key, (1, 1, 4)))[0, 0] * deviation
    draws = np.random.default_rng(0).normal(size=20000)
    for i in range(4):
        others = np.sort(np.delete(noisy, i))[::-1]
        stays = np.mean(logits[i] + draws * deviation[i] > others[k - 1])
        assert float(routing.smooth_load[0, 0, i]) == pytest.approx(stays, abs=0.02)


def test_noisy_router_starts_at_zero_and_its_noise_learns(rng):
    config = tiny_model(gate="noisy_topk", experts_per_token=2)
    layer = MoELayer(config, rngs=nnx.Rngs(0))
    assert not np.asarray(layer.router.kernel[...]).any()
    assert not np.asarray(layer.router.noise[...]).any()
    graphdef, parameters = nnx.split(layer)
    x = jnp.asarray(rng.normal(size=(2, 8, config.d_model)), jnp.float32)

    def loss(parameters):
        _, report, _ = nnx.merge(graphdef, parameters)(x, jnp.ones((2, 8), bool), train=True, rng=jax.random.key(0))
        return report.load_loss, report

    gradient, report = jax.jit(jax.grad(loss, has_aux=True))(parameters)
    assert float(report.load_loss) > 0
    assert float(report.importance_loss) > 0
    assert float(jnp.abs(gradient["router"]["kernel"][...]).max()) > 1e-4
    assert float(jnp.abs(gradient["router"]["noise"][...]).max()) > 1e-5


def test_st_moe_sends_later_choices_by_their_weight():
    # Weights 0.9 and 0.1: the second is sent with probability 0.1/0.2 = 1/2; at 0.7 and 0.3 always.
    for second, expected in ((0.1, 0.5), (0.3, 1.0)):
        logits = np.broadcast_to(np.log([1 - second, second, 1e-9]), (1, 4000, 3))
        chosen = routed("st_moe", logits, rng=jax.random.key(2)).chosen
        assert bool(jnp.all(chosen[..., 0]))
        assert abs(float(jnp.mean(chosen[..., 1])) - expected) <= 5 * math.sqrt(0.25 / 4000) * (expected < 1)


# --- Losses ----------------------------------------------------------------------------------------------------------


def test_importance_and_load_loss_by_hand():
    # Weights given: expert 0 6/9 + 9/13·0, ... : G = (6/9, 3/9, 0, 0) and (0, 0, 9/13, 4/13).
    routing = routed("noisy_topk", LOGITS, 2)
    importance = np.array([6 / 9, 3 / 9, 9 / 13, 4 / 13])
    expected = importance.var() / importance.mean() ** 2
    assert float(balancing.importance_loss(routing)) == pytest.approx(expected, rel=1e-5)
    mask = jnp.ones((1, 2), bool)
    assert float(balancing.load_loss(routing, mask)) == pytest.approx(0.0, abs=1e-6)  # each expert once
    smooth = jnp.asarray([[[0.9, 0.1, 0.0, 0.0], [0.7, 0.3, 0.0, 0.0]]])
    load = np.array([1.6, 0.4, 0, 0])
    routing = dataclasses.replace(routing, smooth_load=smooth)
    assert float(balancing.load_loss(routing, mask)) == pytest.approx(load.var() / load.mean() ** 2, rel=1e-5)
    half = balancing.load_loss(routing, jnp.asarray([[True, False]]))
    assert float(half) == pytest.approx(np.var([0.9, 0.1, 0, 0]) / 0.0625, rel=1e-5)


def test_deepseek_v3_balance_loss_counts_the_top_scores_without_bias_and_groups():
    # Scores (0.8, 0.5, 0.6, 0.2) and (0.1, 0.3, 0.4, 0.9), K = 1. The bias sends both tokens to expert 1, but the
    # scores alone choose experts 0 and 3 (DeepSeek-V3 2024, equation 18): f = (1/2, 0, 0, 1/2).
    routing = routed("deepseek_v3", SIGMOID_LOGITS, 1, selection_bias=jnp.asarray([0.0, 9.0, 0.0, 0.0]))
    np.testing.assert_array_equal(routing.expert_index, [[[1], [1]]])
    p = (SIGMOIDS / SIGMOIDS.sum(-1, keepdims=True))[0].mean(0)
    mask = jnp.ones((1, 2), bool)
    loss = balancing.load_balancing_loss(routing, mask, counts=GATES["deepseek_v3"].balance_counts)
    assert float(loss) == pytest.approx(4 * (p[0] + p[3]) / 2, rel=1e-6)
    assert float(balancing.load_balancing_loss(routing, mask)) == pytest.approx(4 * p[1], rel=1e-6)
    # Of groups (0, 1) and (2, 3) token 0 keeps the first, token 1 the second; the scores alone take 0 and 2, 3 and 2.
    limited = routed("deepseek_v3", SIGMOID_LOGITS, 2, expert_groups=2, kept_expert_groups=1)
    np.testing.assert_array_equal(limited.expert_index, [[[0, 1], [3, 2]]])
    loss = balancing.load_balancing_loss(limited, mask, counts="top_scores")
    assert float(loss) == pytest.approx(4 * (p[0] / 4 + p[2] / 2 + p[3] / 4), rel=1e-6)


def test_device_balance_by_hand():
    # Top-1 of (6, 3, 1, 2)/12 and (1, 2, 9, 4)/16: f = (1/2, 0, 1/2, 0); P = mean. Two groups of two experts.
    routing = routed("switch", LOGITS, 1)
    p = (np.array([6, 3, 1, 2]) / 12 + np.array([1, 2, 9, 4]) / 16) / 2
    expected = 2 * (0.5 * (p[0] + p[1]) + 0.5 * (p[2] + p[3]))
    report = balancing.report(routing, jnp.ones((1, 2), bool), routing.chosen, expert_groups=2)
    assert float(report.device_balance_loss) == pytest.approx(expected, rel=1e-6)
    collapsed = np.broadcast_to([100.0, 0, 0, 0], (1, 8, 4))
    for groups in (1, 2, 4):
        routing = routed("switch", collapsed, 1)
        report = balancing.report(routing, jnp.ones((1, 8), bool), routing.chosen, expert_groups=groups)
        assert float(report.device_balance_loss) == pytest.approx(groups, rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (4, 2)])
def test_scopes_of_the_load_balancing_loss(shape):
    """Two rows of four, each collapsed onto its own expert: balanced over the batch, E = 2 within a row."""
    groups, rows = shape[0], 2
    logits = np.repeat(100 * np.eye(2), 4, axis=0).reshape(*shape, 2)
    per_group = 1.0 if groups == 1 else 2.0
    for parts, expected in ((1, 1.0), (groups, per_group), (rows, 2.0)):
        loss = balancing.load_balancing_loss(routed("switch", logits, 1), jnp.ones(shape, bool), parts=parts)
        assert float(loss) == pytest.approx(expected, rel=1e-5), parts
        # The second row being padding, it is no part of the mean.
        mask = np.arange(8).reshape(shape) < 4
        loss = balancing.load_balancing_loss(routed("switch", logits, 1, mask), jnp.asarray(mask), parts=parts)
        assert float(loss) == pytest.approx(2.0, rel=1e-5), parts


@pytest.mark.parametrize(("scope", "parts"), [("batch", 1), ("group", 4), ("sequence", 2)])
def test_the_layer_takes_the_loss_over_its_scope(scope, parts, monkeypatch):
    """Two rows of eight in groups of four."""
    config = tiny_model(gate="switch", balance_scope=scope, group_size=4)
    asked, report = [], balancing.report
    monkeypatch.setattr(balancing, "report", lambda *a, parts, **k: asked.append(parts) or report(*a, parts=parts, **k))
    x = jax.ShapeDtypeStruct((2, 8, config.d_model), jnp.float32)
    jax.eval_shape(lambda x: MoELayer(config, rngs=nnx.Rngs(0))(x, jnp.ones((2, 8), bool))[1], x)
    assert asked == [parts]


def test_sequence_loss_of_deepseek_v3_by_hand():
    """Equations 17-20 for one sequence of two tokens: f_i = E/(K·T)·count, P_i = mean of s/sum s; ours is their sum."""
    routing = routed("deepseek_v3", SIGMOID_LOGITS, 2)
    shares = SIGMOIDS / SIGMOIDS.sum(-1, keepdims=True)
    counts = np.array([1, 0, 2, 1])
    expected = float((4 / (2 * 2) * counts * shares[0].mean(0)).sum())
    loss = balancing.load_balancing_loss(routing, jnp.ones((1, 2), bool))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


# --- Loss-free balancing ---------------------------------------------------------------------------------------------


def test_next_selection_bias_by_hand():
    bias = balancing.next_selection_bias(jnp.asarray([0.1, 0.0, -0.1]), jnp.asarray([0.5, 1 / 3, 1 / 6]), 0.01)
    np.testing.assert_allclose(bias, [0.09, 0.0, -0.09], atol=1e-6)


def test_loss_free_balancing_balances(rng):
    """A router that prefers expert 0 is brought to balance by the bias alone, its weights staying sigmoids."""
    logits = jnp.asarray(rng.normal(size=(1, 512, 4)) + np.array([1.5, 0, 0, -1]), jnp.float32)

    @jax.jit
    def step(bias):
        routing = routed("deepseek_v3", logits, 1, selection_bias=bias)
        load = balancing.report(routing, jnp.ones((1, 512), bool), routing.chosen).expert_load
        return balancing.next_selection_bias(bias, load, 0.01), load

    bias, first = step(jnp.zeros(4))
    for _ in range(100):
        bias, last = step(bias)
    assert float(balancing.max_violation(first)) > 1
    assert float(balancing.max_violation(last)) < 0.2


def _program(gate, mesh=None, **moe):
    config = Config()
    tree = to_config_dict(config)
    tree.model.moe.gate = gate
    for name, value in moe.items():
        tree.model.moe[name] = value
    sizes = {"vocab_size": 48, "d_model": 16, "num_layers": 3, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    for name, value in sizes.items():
        tree.model[name] = value
    tree.model.d_ff = tree.model.moe.d_ff = 16
    tree.data.sequence_length, tree.train.batch_size = 8, 8
    for axis, size in (mesh or {"data": 1}).items():
        tree.mesh[axis] = size
    config = from_config_dict(tree)
    devices = math.prod((mesh or {"data": 1}).values())
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    validate_mesh(config, mesh.shape)
    return build(config, mesh)


def _batch(program, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 48, (8, 9)).astype(np.int32)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((8, 8), np.int32)}
    rows["positions"] = np.broadcast_to(np.arange(8, dtype=np.int32), (8, 8))
    return place(rows, program.mesh)


def test_train_step_moves_the_bias_by_the_load_and_nothing_else_does(tmp_path):
    """On a mesh, over a pattern of dense and sparse layers; and the bias comes back from a checkpoint."""
    import orbax.checkpoint as ocp

    program = _program(
        "deepseek_v3",
        {"data": 2, "expert": 2},
        every=1,
        first_dense=1,
        experts_per_token=2,
        expert_groups=4,
        kept_expert_groups=2,
        bias_update_rate=0.125,
    )
    with jax.set_mesh(program.mesh):
        state = program.init()
        assert not any("bias" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer))
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.biases))
        state, metrics = program.train_step(state, _batch(program))
        load = np.asarray(metrics.layers.expert_load)
        expected = selection_biases(
            program.config.model, jnp.asarray(0.125 * np.sign(load.mean(-1, keepdims=True) - load))
        )
        assert len(jax.tree.leaves(state.biases)) == 1
        assert jax.tree.leaves(state.biases)[0].shape == (2, 8)
        jax.tree.map(np.testing.assert_allclose, state.biases, expected)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", program.state)
        jax.tree.map(np.testing.assert_array_equal, restored.biases, state.biases)
        # The model reads it: the same step from the same parameters with this bias sends tokens elsewhere.
        _, moved = program.train_step(dataclasses.replace(program.init(), biases=restored.biases), _batch(program))
        assert np.abs(np.asarray(moved.layers.expert_load) - load).max() > 0.01


def test_only_deepseek_v3_has_a_selection_bias():
    for gate, count in (("deepseek_v3", 1), ("switch", 0)):
        model = nnx.eval_shape(
            lambda gate=gate: MoELayer(tiny_model(gate=gate, num_experts=8, experts_per_token=2), rngs=nnx.Rngs(0))
        )
        assert len(jax.tree.leaves(nnx.state(model, SelectionBias))) == count


def test_broken_logits_are_counted_in_a_train_step_and_harm_no_other_token(rng):
    x = jnp.asarray(rng.normal(size=(1, 6, 4)), jnp.float32)
    weights = {
        "router": rng.normal(size=(4, 3)),
        "up": rng.normal(size=(3, 4, 5)),
        "gate_matrix": rng.normal(size=(3, 4, 5)),
        "down": rng.normal(size=(3, 5, 4)),
    }
    mask = jnp.ones((1, 6), bool)
    for mode in CONFIG_MODES:
        layer = single_layer("switch", **weights, eval_capacity_factor=3.0, dispatch=mode)
        run = jax.jit(lambda x, layer=layer: layer(x, mask))
        expected, _, _ = run(x)
        y, report, _ = run(x.at[0, 2].set(jnp.nan))
        assert float(report.broken_tokens) == 1
        others = np.arange(6) != 2
        np.testing.assert_allclose(y[0, others], expected[0, others], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(y[0, 2], np.zeros(4))


# --- Drops -----------------------------------------------------------------------------------------------------------


def _one_expert(weights):
    """Tokens that all want expert 0 (their second best is expert 1), with these weights."""
    probs = np.array([[[w, 0.9 * (1 - w), 0.1 * (1 - w)] for w in weights]])
    return routed("switch", np.log(probs), 1)


def test_drop_policies_by_hand():
    routing = _one_expert([0.5, 0.9, 0.6, 0.8])
    for policy, kept in (("position", [1, 1, 0, 0]), ("probability", [0, 1, 0, 1])):
        plan = make_plan(routing, 2, drop_policy=policy)
        np.testing.assert_array_equal(plan.kept[0, :, 0], np.array(kept, bool), err_msg=policy)
        assert sorted(np.asarray(plan.position_in_expert)[plan.kept]) == [0, 1]


def test_priority_is_the_router_probability_and_not_the_renormalised_weight():
    # First choices by probability: 0.46, 0.48, 0.42; by Mixtral's weight: 0.46/0.90 = 0.51, 0.48/0.93 = 0.52 and
    # 0.42/0.72 = 0.58. Of two rows, the third token's is the one beyond the capacity.
    probs = np.array([[[0.46, 0.10, 0.44], [0.48, 0.45, 0.07], [0.42, 0.28, 0.30]]])
    routing = routed("mixtral", np.log(probs), 2)
    plan = make_plan(routing, 2, drop_policy="probability")
    np.testing.assert_array_equal(plan.kept[0, :, 0], [True, True, False])


def test_random_drops_are_fair():
    routing = _one_expert([0.9] * 6)
    plans = jax.vmap(lambda key: make_plan(routing, 2, drop_policy="random", rng=key).kept)(
        jax.random.split(jax.random.key(0), 600)
    )
    assert (np.asarray(plans).sum((1, 2, 3)) == 2).all()
    # Each of six tokens is kept with probability 1/3: 200 of 600, ± sqrt(600·2/9) = 11.5.
    assert np.abs(np.asarray(plans).sum((0, 1, 3)) - 200).max() < 58


def test_first_choices_have_priority_over_second_ones_under_probability():
    # Token 0's weights: 0.6 for expert 0, 0.4 for 1. Token 1: 0.55 for 1, 0.45 for 0. With C = 1 both keep their first
    # choice, and token 0, with the higher probability, does not displace token 1's.
    routing = routed("mixtral", np.log([[[0.6, 0.4], [0.45, 0.55]]]), 2)
    plan = make_plan(routing, 1, drop_policy="probability")
    np.testing.assert_array_equal(plan.kept, [[[True, False], [True, False]]])


def test_overflow_goes_to_the_next_best_expert_after_all_others():
    # C = 1: token 0 keeps expert 0. Tokens 1 and 2 overflow to expert 1, which takes token 1 with the weight
    # p_1 = 0.9·(1 − 0.9) = 0.09 and drops token 2.
    routing = _one_expert([0.5, 0.9, 0.6])
    moved, plan = overflow_to_next(routing, make_plan(routing, 1))
    np.testing.assert_array_equal(moved.expert_index[0, :, 0], [0, 1, 1])
    np.testing.assert_array_equal(plan.kept[0, :, 0], [True, True, False])
    np.testing.assert_allclose(moved.combine_weights[0, :2, 0], [0.5, 0.09], rtol=1e-5)


# --- Replay ----------------------------------------------------------------------------------------------------------


def test_routing_is_recorded_and_replayed_under_another_mode_and_mesh(rng):
    """Other routers, another mode, eight devices: the recorded routing decides, and the logits are the same."""
    config = tiny_model(
        gate="gshard", num_layers=3, first_dense=1, num_experts=8, d_model=16, num_kv_heads=4, eval_capacity_factor=0.5
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(rng.integers(0, 48, (8, 6)))
    recorded = jax.jit(lambda tokens: model(tokens, return_routing=True))(tokens)
    assert recorded.routing.expert_index.shape == (2, 8, 6, 2)
    assert 0 < float(recorded.layers.fraction_tokens_dropped.mean()) < 1
    other = Transformer(
        dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch="einsum")), rngs=nnx.Rngs(0)
    )
    # Asked, this router would choose the two worst of eight experts instead of the two best.
    router = other.segment_1.block_0.moe.router
    router.kernel[...] = -router.kernel[...]
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    with jax.set_mesh(mesh):
        replayed = jax.jit(lambda tokens, routing: other(tokens, routing=routing, return_routing=True))(
            tokens, recorded.routing
        )
    np.testing.assert_allclose(replayed.logits, recorded.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(replayed.routing.expert_index, recorded.routing.expert_index)


def test_replay_in_other_groups_is_refused(rng):
    layer = single_layer(
        "switch", router=np.ones((3, 2)), up=np.ones((2, 3, 3)), down=np.ones((2, 3, 3)), activation="relu"
    )
    routing = routed("switch", rng.normal(size=(2, 4, 2)), 1)
    with pytest.raises(ValueError, match="cannot be replayed"):
        layer(jnp.ones((2, 2, 3)), jnp.ones((2, 2), bool), routing=routing)


# --- Layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["gather", "dropless"])
def test_expert_dropout_drops_hidden_activations_in_training_alone(mode):
    # x = 1, up = 1: hidden 1 in 4000 units, down averages them with weights w_j = j/sum: y is the kept weight over 0.6.
    f = 4000
    down = np.arange(1, f + 1) / (f * (f + 1) / 2)
    weights = {"up": np.ones((1, 1, f)), "down": down[None, :, None], "router": np.zeros((1, 1))}
    layer = single_layer("switch", **weights, activation="relu", expert_dropout=0.4, dispatch=mode, jitter=0.0)
    x, mask, key = jnp.ones((1, 3, 1)), jnp.ones((1, 3), bool), jax.random.key(0)
    noisy = jax.jit(lambda x: layer(x, mask, train=True, rng=key)[0])(x)
    # Each weight is kept or not: variance 0.6·0.4·sum w²/0.36, sum w² = 4/3f.
    np.testing.assert_allclose(noisy, np.ones((1, 3, 1)), atol=5 * math.sqrt(0.24 / 0.36 * 4 / (3 * f)))
    assert len(np.unique(noisy)) == 3, "each token draws its own"
    quiet = jax.jit(lambda x: layer(x, mask, rng=key)[0])(x)
    np.testing.assert_allclose(quiet, np.ones((1, 3, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("gate", "leaks"), [("expert_choice", True), ("soft_moe", True), ("switch", False), ("deepseek_v3", False)]
)
def test_who_looks_ahead(gate, leaks, rng):
    """Changing the last token changes an earlier one's output only under the gates that are refused for it."""
    assert GATES[gate].looks_ahead == leaks
    soft = gate == "soft_moe"
    weights = {
        "router": rng.normal(size=(4, 4, 1) if soft else (4, 4)) * 2,
        "up": rng.normal(size=(4, 4, 5)),
        "gate_matrix": rng.normal(size=(4, 4, 5)),
        "down": rng.normal(size=(4, 5, 4)),
    }
    fields = {"expert_groups": 1, "kept_expert_groups": 1, "experts_per_token": 2} if gate == "deepseek_v3" else {}
    mode = "einsum" if soft else "gather"
    layer = single_layer(gate, **weights, eval_capacity_factor=1.0, accept_future_leak=True, dispatch=mode, **fields)
    if not leaks:
        layer.config = dataclasses.replace(layer.config, eval_capacity_factor=4.0)
    x = jnp.asarray(rng.normal(size=(1, 8, 4)), jnp.float32)
    run = jax.jit(lambda x: layer(x, jnp.ones((1, 8), bool))[0])
    changed = max(
        float(jnp.abs(run(x)[0, :-1] - run(x.at[0, -1].set(jnp.asarray(last)))[0, :-1]).max())
        for last in rng.normal(size=(4, 4)) * 3
    )
    assert (changed > 1e-4) == leaks


REFUSED = [
    ({"gate": "expert_choice"}, "accept_future_leak"),
    ({"gate": "soft_moe", "dispatch": "einsum"}, "accept_future_leak"),
    ({"gate": "soft_moe", "accept_future_leak": True}, "must be einsum"),
    ({"gate": "deepseek_v3", "num_experts": 12}, "model.moe.expert_groups=8: must be at least 1 and divide"),
    ({"gate": "deepseek_v3", "num_experts": 16, "kept_expert_groups": 9}, "must be from 1 to expert_groups=8"),
    ({"gate": "deepseek_v3", "num_experts": 8}, "must be at most the 4 experts"),
    ({"gate": "mixtral", "num_experts": 4, "experts_per_token": 5}, "must be at most num_experts=4"),
    ({"gate": "gshard", "experts_per_token": 3}, "exists for 2 only"),
    ({"gate": "switch", "num_experts": 4, "expert_groups": 3}, "divide num_experts=4"),
    ({"gate": "mixtral", "renormalise": 0}, "is fixed by the gate"),
    ({"gate": "mixtral", "routing_scale": 2.0}, "needs a DeepSeek gate"),
    ({"gate": "mixtral", "load_weight": 0.1}, "needs the gate noisy_topk"),
    ({"gate": "mixtral", "bias_update_rate": 0.1}, "needs the gate deepseek_v3"),
    ({"gate": "switch", "capacity_factor": 0.0}, "must be positive"),
    ({"gate": "switch", "balance_scope": "world"}, "must be one of batch, group, sequence"),
    ({"gate": "switch", "drop_policy": "luck"}, "must be one of position, probability, random"),
    ({"gate": "switch", "expert_dropout": 1.0}, r"must be in \[0, 1\)"),
    ({"gate": "switch", "slots_per_expert": 2}, "needs the gate soft_moe"),
    ({"gate": "mixtral", "num_experts": 3, "overflow_to_next": True}, "needs num_experts >= 2"),
    ({"gate": "mixtral", "dispatch": "dropless", "overflow_to_next": True}, "a capacity"),
    ({"gate": "mixtral", "experts_per_token": 1}, "must be at least 2 with the gate 'mixtral', which renormalises"),
    ({"gate": "st_moe", "experts_per_token": 1}, "must be at least 2"),
    ({"gate": "noisy_topk", "experts_per_token": 1}, "must be at least 2"),
    ({"gate": "switch", "renormalise": 1}, "renormalise=1: must be 0 with experts_per_token=1"),
    (
        {"gate": "deepseek_v3", "experts_per_token": 1, "expert_groups": 1, "kept_expert_groups": 1},
        "renormalise=1: must be 0 with experts_per_token=1",
    ),
    ({"gate": "st_moe", "drop_policy": "probability"}, "accept_future_leak=True"),
    ({"gate": "switch", "drop_policy": "random"}, "accept_future_leak=True"),
    ({"gate": "expert_choice", "accept_future_leak": True, "drop_policy": "random"}, "drops no assignment"),
    ({"gate": "hash", "jitter": 0.1}, "jitter=0.1: must be 0: the gate 'hash' has no router"),
    ({"gate": "random", "load_balancing_weight": 0.1}, "load_balancing_weight=0.1: must be 0"),
    ({"gate": "hash", "z_loss_weight": 0.1}, "z_loss_weight=0.1: must be 0"),
    ({"gate": "hash", "router_dtype": "bfloat16"}, "has no router"),
    ({"gate": "dense_mixture", "load_balancing_weight": 0.1}, "the loss is constant"),
    ({"gate": "deepseek_moe", "device_balance_weight": 0.05}, "needs expert_groups above 1"),
    (
        {"gate": "soft_moe", "dispatch": "einsum", "accept_future_leak": True, "capacity_factor": 2.0},
        "soft_moe has slots_per_expert instead",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_impossible_settings_are_refused(fields, message):
    tree = to_config_dict(Config())
    for name, value in fields.items():
        tree.model.moe[name] = value
    with pytest.raises(ConfigError, match=message):
        from_config_dict(tree)


@pytest.mark.parametrize("gate", sorted(GATES))
def test_every_gate_has_a_valid_config_with_its_papers_constants(gate):
    tree = to_config_dict(Config())
    tree.model.moe.gate, tree.model.moe.num_experts = gate, 64
    tree.model.moe.accept_future_leak = True
    tree.model.moe.dispatch = "einsum" if gate == "soft_moe" else "gather"
    moe = validate(resolve(from_config_dict(tree))).model.moe
    for name in ("load_balancing_weight", "balance_scope", "drop_policy", "routing_scale", "capacity_factor"):
        assert getattr(moe, name) == getattr(GATES[gate], name)


def test_single_layer_refuses_missing_and_misshapen_arrays():
    arrays = {"router": np.zeros((4, 2)), "up": np.zeros((2, 4, 3)), "down": np.zeros((2, 3, 4))}
    with pytest.raises(ConfigError, match="gate_matrix=None"):
        single_layer("switch", **arrays)
    with pytest.raises(ConfigError, match="router of shape"):
        single_layer("switch", **(arrays | {"router": np.zeros((2, 4))}), activation="relu")
