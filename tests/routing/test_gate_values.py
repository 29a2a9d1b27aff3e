"""Routing by the gates: values computed by hand, and draws against their distribution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from moe.config.registry import LAYERS
from moe.dispatch.buffers import make_plan
from moe.layers.moe_layer import MoELayer
from moe.routing import balancing
from tests.gate_helpers import LOGITS, SIGMOID_LOGITS, SOFTPLUS_LOGITS
from tests.helpers import FOUR, routed, tiny_model

#: DeepSeek-V3 without renormalisation or scale: weights are the sigmoids.
RAW = {"renormalise": False, "scale": 1.0}

HAND_COMPUTED = [
    # Without a key no noise: softmax(ln 6, ln 3) = (6, 3)/9; softmax(ln 9, ln 4) = (9, 4)/13.
    ("noisy_topk", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 9, 3 / 9], [9 / 13, 4 / 13]]),
    ("st_moe", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 9, 3 / 9], [9 / 13, 4 / 13]]),
    ("deepseek_moe", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 12, 3 / 12], [9 / 16, 4 / 16]]),
    # Two groups, one kept, by its best expert: token 0 keeps (0, 1), token 1 keeps (2, 3). Renormalised and doubled.
    (
        "deepseek_moe",
        np.log([[[6.0, 1.0, 3.0, 2.0], [1.0, 2.0, 9.0, 4.0]]]),
        {"groups": 2, "kept_groups": 1, "renormalise": True, "scale": 2.0},
        [[0, 1], [2, 3]],
        [[2 * 6 / 7, 2 * 1 / 7], [2 * 9 / 13, 2 * 4 / 13]],
    ),
    ("deepseek_v3", SIGMOID_LOGITS, RAW, [[0, 2], [3, 2]], [[0.8, 0.6], [0.9, 0.4]]),
    # 0.8/1.4·2.5 and 0.6/1.4·2.5; 0.9/1.3·2.5 and 0.4/1.3·2.5.
    (
        "deepseek_v3",
        SIGMOID_LOGITS,
        {},
        [[0, 2], [3, 2]],
        [[2.0 / 1.4, 1.5 / 1.4], [2.25 / 1.3, 1.0 / 1.3]],
    ),
    # The bias decides the choice, the weights are the unbiased sigmoids: 0.2 + 0.5 = 0.7 beats 0.6 and 0.5; then 0.9.
    (
        "deepseek_v3",
        SIGMOID_LOGITS,
        RAW | {"selection_bias": jnp.asarray([0.0, 0.0, 0.0, 0.5])},
        [[0, 3], [3, 2]],
        [[0.8, 0.2], [0.9, 0.4]],
    ),
    # Groups (0, 1) and (2, 3) by the sum of two: 1.3 against 0.8; 0.4 against 1.3.
    (
        "deepseek_v3",
        SIGMOID_LOGITS,
        RAW | {"groups": 2, "kept_groups": 1},
        [[0, 1], [3, 2]],
        [[0.8, 0.5], [0.9, 0.4]],
    ),
    # A group's bias counts in its score: with −0.8 on expert 0, (0, 1) has 0.5 against 0.8.
    (
        "deepseek_v3",
        SIGMOID_LOGITS,
        RAW | {"groups": 2, "kept_groups": 1, "selection_bias": jnp.asarray([-0.8, 0.0, 0.0, 0.0])},
        [[2, 3], [3, 2]],
        [[0.6, 0.2], [0.9, 0.4]],
    ),
    # Any score under any top-k gate: sigmoids 0.8 and 0.6 renormalised; a bias of 0.9 on expert 3 wins over 6/12.
    (
        "mixtral",
        SIGMOID_LOGITS,
        {"score": "sigmoid"},
        [[0, 2], [3, 2]],
        [[8 / 14, 6 / 14], [9 / 13, 4 / 13]],
    ),
    (
        "switch",
        LOGITS,
        {"selection_bias": jnp.asarray([0.0, 0.0, 0.0, 0.9])},
        [[3, 0], [3, 2]],
        [[2 / 12, 6 / 12], [4 / 16, 9 / 16]],
    ),
    # softplus(ln(e⁴ − 1)) = 4: the square roots of (4, 1, 9, 16) are 2, 1, 3, 4; two groups by their best expert.
    ("deepseek_v4", SOFTPLUS_LOGITS, {}, [[3, 2]], [[1.5 * 4 / 7, 1.5 * 3 / 7]]),
    ("deepseek_v4", SOFTPLUS_LOGITS, RAW | {"groups": 2, "kept_groups": 1}, [[3, 2]], [[4.0, 3.0]]),
    ("quantile_balancing", SIGMOID_LOGITS, {}, [[0, 2], [3, 2]], [[8 / 14, 6 / 14], [9 / 13, 4 / 13]]),
    ("smebu", SIGMOID_LOGITS, {}, [[0, 2], [3, 2]], [[8 / 14, 6 / 14], [9 / 13, 4 / 13]]),
    # Logits (ln 4, 0, ln 1.5, -ln 4) with 2 on expert 3, where a bias of its sigmoid would put it first.
    (
        "kolibri",
        SIGMOID_LOGITS,
        {"selection_bias": jnp.asarray([0.0, 0.0, 0.0, 2.0])},
        [[0, 3], [3, 2]],
        [[0.8, 0.2], [0.9, 0.4]],
    ),
    ("cosine", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 12, 3 / 12], [9 / 16, 4 / 16]]),
    ("matryoshka", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 12, 3 / 12], [9 / 16, 4 / 16]]),
    ("coupled", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 12, 3 / 12], [9 / 16, 4 / 16]]),
    # Cosines are their own weights; a bias of 0.5 on expert 3 puts it before 0.6 and 0.4.
    (
        "k_means",
        np.array([[[0.8, 0.3, 0.6, 0.2], [-0.1, 0.4, 0.1, 0.9]]]),
        {"selection_bias": jnp.asarray([0.0, 0.0, 0.0, 0.5])},
        [[0, 3], [3, 1]],
        [[0.8, 0.2], [0.9, 0.4]],
    ),
    ("power_iteration", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 12, 3 / 12], [9 / 16, 4 / 16]]),
    ("sinkhorn", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 12, 3 / 12], [9 / 16, 4 / 16]]),
    ("moe_plus_plus", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 12, 3 / 12], [9 / 16, 4 / 16]]),
    # The sums of the two tokens, of (6, 3, 1, 2)/12 and (1, 2, 9, 4)/16: 27, 18, 31, 20 of 48. Half of the experts are
    # the pool (0, 2), and the weights are of it: 6/7 and 1/7, 9/10 and 1/10.
    ("emo", LOGITS, {"pool": 0.5}, [[0, 2], [2, 0]], [[6 / 7, 1 / 7], [9 / 10, 1 / 10]]),
    # Two documents of one token: each has its own pool, (0, 1) and (2, 3).
    (
        "emo",
        LOGITS,
        {"pool": 0.5, "segment_ids": jnp.asarray([[1, 2]])},
        [[0, 1], [2, 3]],
        [[6 / 9, 3 / 9], [9 / 13, 4 / 13]],
    ),
    # Near: logits at most 2·0.01·max(|logit|, best) below the best remaining one, in each round separately. Token 0: 10
    # and 9.9 (within 0.2), not 9.7; then 9.9 alone, since 9.7 is not within 0.198. Token 1: −1 and −1.02 (within
    # 0.0204), not −1.04; then −1.02 and −1.04 (within 0.0208).
    (
        "sparse_mixer",
        np.array([[[9.9, 10.0, 9.7, 1.0], [-1.02, -1.04, -3.0, -1.0]]]),
        {},
        [[1, 0], [3, 0]],
        [[1 / (1 + np.exp(-0.1)), 1.0], [1 / (1 + np.exp(-0.02)), 1 / (1 + np.exp(-0.02))]],
    ),
    # Round-robin, weights the softmax over the chosen.
    ("balanced", LOGITS, {}, [[0, 1], [2, 3]], [[6 / 9, 3 / 9], [9 / 13, 4 / 13]]),
    # Of 6/12, 1/12, 2/12 and 3/12 the last, which returns 0, is chosen with 1 less; weights are not renormalised.
    ("zaya", np.log([[[6.0, 1.0, 2.0, 3.0]]]), {}, [[0, 2]], [[6 / 12, 2 / 12]]),
    # Sigmoids 0.8, 0.1, 0.6, 0.5: (0, 1) has the best expert, (2, 3) the larger sum of two, 1.1 against 0.9.
    (
        "deepseek_v3",
        np.log([[[0.8 / 0.2, 0.1 / 0.9, 0.6 / 0.4, 0.5 / 0.5]]]),
        RAW | {"groups": 2, "kept_groups": 1},
        [[2, 3]],
        [[0.6, 0.5]],
    ),
]


@pytest.mark.parametrize(("gate", "logits", "given", "experts", "weights"), HAND_COMPUTED)
def test_hand_computed_values(gate, logits, given, experts, weights):
    routing = routed(gate, logits, 2, **given)
    np.testing.assert_array_equal(routing.expert_index, [experts])
    np.testing.assert_allclose(routing.combine_weights, [weights], rtol=1e-5)
    assert bool(jnp.all(routing.chosen))


def test_every_gate_has_a_hand_computed_value_or_a_separate_test():
    own = {
        "expert_choice",
        "expert_threshold",
        "running_thresholds",
        "soft_moe",
        "hash",
        "deepseek_v4_hash",
        "random",
        "switch_sampled",
        "remoe",
    }
    assert {gate for gate, *_ in HAND_COMPUTED} | own | set(FOUR) == set(LAYERS)


@pytest.mark.parametrize("gate", sorted(set(LAYERS) - {"expert_choice", "expert_threshold", "remoe"}))
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
    report = jax.jit(balancing.report)(routing, jnp.asarray(mask), routing.chosen)
    assert float(report.broken_tokens) == 2
    for path, values in jax.tree_util.tree_leaves_with_path(report):
        assert np.isfinite(values).all(), path


def test_broken_noise_breaks_its_token_and_underflowing_noise_does_not(rng):
    logits, noise = rng.normal(size=(1, 5, 4)), np.full((1, 5, 4), -200.0)  # softplus(-200) is 0 in float32
    noise[0, 1, 2] = np.nan
    logits[0, 3] = 1.0  # equal logits: 0/0 without a minimum deviation

    def load(noise):
        routing = routed("noisy_topk", logits, 2, noise_logits=noise, rng=jax.random.key(0))
        return balancing.load_loss(routing, ~routing.broken), routing

    gradient, routing = jax.jit(jax.grad(load, has_aux=True))(jnp.asarray(noise, jnp.float32))
    np.testing.assert_array_equal(routing.broken[0], np.arange(5) == 1)
    assert not routing.chosen[0, 1].any()
    assert np.isfinite(routing.smooth_load).all()
    assert np.isfinite(gradient).all()


def test_sparse_mixer_samples_and_has_the_gradient_of_the_probability():
    logits = np.broadcast_to([9.9, 10.0, 9.7, 1.0], (1, 4000, 4))  # near the best: 9.9 and 10
    best = 1 / (1 + np.exp(-0.1))  # 0.525

    def weights(logits):
        routing = routed("sparse_mixer", logits, rng=jax.random.key(0))
        return routing.combine_weights[..., 0].sum(), routing

    gradient, routing = jax.grad(weights, has_aux=True)(jnp.asarray(logits, jnp.float32))
    first, weight = routing.expert_index[0, :, 0], routing.combine_weights[0, :, 0]
    assert set(np.unique(first)) == {0, 1}
    assert abs((first == 1).mean() - best) < 4 * 0.5 / np.sqrt(4000)
    np.testing.assert_allclose(weight[first == 1], best, rtol=1e-5)
    other = weight[first == 0] / (1 - best)  # a third in three of four draws
    np.testing.assert_allclose(np.unique(np.round(other, 4)), [0.3333, 1.0])
    assert abs((other > 0.5).mean() - 0.25) < 4 * 0.5 / np.sqrt(1900)
    slope = best * (1 - best)  # derivative of either probability by its own logit
    sign = np.where(np.asarray(first == 1)[:, None], [-1, 1, 0, 0], [1, -1, 0, 0])
    np.testing.assert_allclose(gradient[0], slope * sign, rtol=1e-4, atol=1e-7)


def test_expert_choice_by_hand():
    # p of expert 0 for three tokens: 0.9, 0.6, 0.2. With C = 2, expert 0 takes tokens 0 and 1, expert 1 tokens 2 and 1.
    probs = np.array([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]])
    routing = routed("expert_choice", np.log(probs), 1, expert_capacity=2)
    np.testing.assert_array_equal(routing.chosen, [[[True, False], [True, True], [False, True]]])
    np.testing.assert_allclose(routing.combine_weights, np.where(routing.chosen, probs, 0), rtol=1e-6)
    # With token 0 as padding, expert 0 takes the two others.
    padded = routed("expert_choice", np.log(probs), 1, [[False, True, True]], expert_capacity=2)
    np.testing.assert_array_equal(padded.chosen, [[[False, False], [True, True], [True, True]]])
    # So they do if its logits are not finite.
    broken = routed("expert_choice", [[[np.nan, 0.0], *np.log(probs[0, 1:])]], 1, expert_capacity=2)
    np.testing.assert_array_equal(broken.chosen, padded.chosen)
    # Without a given capacity it is K·S/E = 1.5, rounded up.
    np.testing.assert_array_equal(routed("expert_choice", np.log(probs), 1).chosen, routing.chosen)


def test_expert_choice_never_drops_and_is_balanced(rng):
    routing = routed("expert_choice", rng.normal(size=(3, 16, 4)), 2, expert_capacity=8)
    np.testing.assert_array_equal(routing.chosen.sum(1), np.full((3, 4), 8))
    np.testing.assert_array_equal(make_plan(routing, 8).kept, routing.chosen)


def test_hash_depends_only_on_the_token():
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
    # A count is 1600 ± sqrt(8000·0.2·0.8) = 36; the bound is five of them.
    assert np.abs(load - 1600).max() < 180


def test_random_draws_differ_by_key_and_evaluation_draws_nothing():
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
    # Two draws without replacement differ, and without a key nothing is drawn.
    pairs = np.asarray(routed("switch_sampled", np.log(probs), 2, rng=jax.random.key(1)).expert_index)
    assert (pairs[..., 0] != pairs[..., 1]).all()
    np.testing.assert_array_equal(routed("switch_sampled", np.log(probs), 2).expert_index[0, 0], [0, 1])


def test_balanced_skips_padding_and_continues_in_the_next_group():
    mask = [[True, False, True, True], [True, True, True, True]]
    routing = routed("balanced", np.zeros((2, 4, 3)), 1, mask)
    # Group 0: real tokens take 0, 1, 2; group 1 starts at token 4: 1, 2, 0, 1.
    experts = np.asarray(routing.expert_index)[..., 0]
    np.testing.assert_array_equal(experts[0][np.array(mask[0])], [0, 1, 2])
    np.testing.assert_array_equal(experts[1], [1, 2, 0, 1])


def test_noise_is_softplus_of_its_own_logits():
    shape = (1, 5000, 3)
    # softplus(0.5) = 0.974 for expert 1 and almost no noise for the others. Expert 0 is 1 ahead of expert 1.
    noise = jnp.broadcast_to(jnp.asarray([-20.0, 0.5, -20.0]), shape)
    logits = jnp.broadcast_to(jnp.asarray([1.0, 0.0, -9.0]), shape)
    routing = routed("noisy_topk", logits, 1, noise_logits=noise, rng=jax.random.key(0))
    share = float(jnp.mean(routing.expert_index == 1))
    expected = scipy.stats.norm.sf(1 / math.log1p(math.exp(0.5)))  # 0.152
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 5000)
    np.testing.assert_array_equal(
        routed("noisy_topk", logits, 1, noise_logits=noise).expert_index, np.zeros((1, 5000, 1))
    )


def test_smooth_load_is_the_probability_to_stay_chosen_under_new_noise():
    """Shazeer 2017, equation 8, estimated by redrawing expert i's noise with the others' held fixed."""
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
    # Six equal weights are below 0.2 too: each is sent with probability 5/6, but the first always.
    chosen = routed("st_moe", np.zeros((1, 400, 6)), 6, rng=jax.random.key(2)).chosen
    assert bool(jnp.all(chosen[..., 0]))
    assert abs(float(jnp.mean(chosen[..., 1:])) - 5 / 6) <= 5 * math.sqrt(5 / 36 / 2000)


@pytest.mark.parametrize(("gate", "expected"), [("gshard", 0.8), ("st_moe", 1.0)])
def test_later_choices_are_sent_by_their_share_whatever_the_weights(gate, expected):
    # Shares 3/5 and 2/5: 2·0.4 = 0.8 and 0.4/0.2 > 1. By the weights, 0.09 and 0.06, it would be 0.12 and 0.3.
    logits = np.broadcast_to(np.log([0.09, 0.06] + [0.85 / 17] * 17), (1, 200, 19))
    chosen = routed(gate, logits, 2, renormalise=False, rng=jax.random.key(0)).chosen
    assert abs(float(chosen[..., 1].mean()) - expected) <= 5 * math.sqrt(0.16 / 200) * (expected < 1)


@pytest.mark.parametrize("gate", ["deepseek_v3", "remoe"])
def test_scores_that_underflow_have_a_gradient(gate):
    """Sums of scores whose square is 0 in float32: sigmoids of -46 are 1e-20, those of -200 are 0."""

    def sums(logits):
        routing = routed(gate, logits, 2)
        weights, columns = routing.combine_weights, jnp.arange(4.0)
        return jnp.sum(weights * columns[: weights.shape[-1]]) + jnp.sum(routing.router_probs * columns)

    low = [[-46.0] * 4, [-200.0] * 4] if gate == "deepseek_v3" else [[1e-20] * 4, [0.0] * 4]
    gradient = jax.grad(sums)(jnp.asarray([low]))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0, 1], np.zeros(4))
