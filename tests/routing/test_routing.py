"""Gates: values computed by hand, draws, padding, and whether the router learns at K = 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import ConfigError
from moe.config.registry import LAYERS
from moe.layers.moe_layer import MoELayer
from moe.layers.router import Router
from moe.routing.gates import TopK
from moe.routing.interface import GateInputs, top_k
from moe.routing.routing import route
from tests.helpers import FOUR, routed, tiny_model

# Two tokens with probabilities in 12ths and 16ths: token 0 (6, 3, 1, 2)/12, token 1 (1, 2, 9, 4)/16.
LOGITS = np.log([[[6.0, 3.0, 1.0, 2.0], [1.0, 2.0, 9.0, 4.0]]])

HAND_COMPUTED = [
    # All experts in order, weights the softmax.
    ("dense_mixture", 4, [range(4), range(4)], [np.array([6, 3, 1, 2]) / 12, np.array([1, 2, 9, 4]) / 16]),
    # The top of the full softmax, not renormalised.
    ("switch", 1, [[0], [2]], [[6 / 12], [9 / 16]]),
    ("switch", 2, [[0, 1], [2, 3]], [[6 / 12, 3 / 12], [9 / 16, 4 / 16]]),
    # (6/12)/(6/12 + 3/12) = 2/3; (9/16)/(9/16 + 4/16) = 9/13.
    ("gshard", 2, [[0, 1], [2, 3]], [[2 / 3, 1 / 3], [9 / 13, 4 / 13]]),
    # softmax(ln 6, ln 3) = (6, 3)/9; softmax(ln 9, ln 4) = (9, 4)/13; for three, (6, 3, 2)/11 and (9, 4, 2)/15.
    ("mixtral", 2, [[0, 1], [2, 3]], [[6 / 9, 3 / 9], [9 / 13, 4 / 13]]),
    ("mixtral", 3, [[0, 1, 3], [2, 3, 1]], [[6 / 11, 3 / 11, 2 / 11], [9 / 15, 4 / 15, 2 / 15]]),
]


@pytest.mark.parametrize(("gate", "k", "experts", "weights"), HAND_COMPUTED)
def test_hand_computed_values(gate, k, experts, weights):
    routing = routed(gate, LOGITS, k=k)
    np.testing.assert_array_equal(routing.expert_index, [experts])
    np.testing.assert_allclose(routing.combine_weights, [weights], rtol=1e-6)
    assert bool(jnp.all(routing.chosen))
    np.testing.assert_allclose(routing.router_probs[0, 0], [6 / 12, 3 / 12, 1 / 12, 2 / 12], rtol=1e-6)


def test_every_gate_has_a_hand_computed_value():
    assert {gate for gate, *_ in HAND_COMPUTED} == set(FOUR)


@pytest.mark.parametrize("gate", ["gshard", "mixtral"])
def test_renormalised_weights_sum_to_one(gate, rng):
    routing = routed(gate, rng.normal(size=(2, 30, 6)) * 3)
    np.testing.assert_allclose(routing.combine_weights.sum(-1), np.ones((2, 30)), rtol=1e-6)


@pytest.mark.parametrize("gate", FOUR)
def test_padding_is_never_chosen(gate, rng):
    mask = rng.random((2, 30)) < 0.5
    routing = routed(gate, rng.normal(size=(2, 30, 6)), mask=mask)
    np.testing.assert_array_equal(routing.chosen, np.broadcast_to(mask[..., None], routing.chosen.shape))
    assert (np.asarray(routing.combine_weights)[~mask] == 0).all()
    assert (np.asarray(routing.combine_weights)[mask] > 0).all()


# 2·g2 for shares of the second expert of 0.1, 0.3 and 0.5; the last is above every draw from [0, 1).
@pytest.mark.parametrize(("second", "expected"), [(0.1, 0.2), (0.3, 0.6), (0.5, 1.0)])
def test_gshard_sends_the_second_expert_with_probability_2_g2(second, expected):
    tokens = 4000
    logits = np.log([1 - second, second, 1e-6]) * np.ones((1, tokens, 1))
    routing = routed("gshard", logits, rng=jax.random.key(7))
    # Five standard deviations of a binomial share: 5·sqrt(0.2·0.8/4000) = 0.032 at the first.
    bound = 5 * np.sqrt(expected * (1 - expected) / tokens)
    assert abs(routing.chosen[..., 1].mean() - expected) <= bound
    assert bool(jnp.all(routing.chosen[..., 0])), "the first expert is always sent"
    declined = ~np.asarray(routing.chosen[..., 1])
    np.testing.assert_allclose(routing.combine_weights[..., 0], 1 - second, rtol=1e-5)
    assert (np.asarray(routing.combine_weights[..., 1])[declined] == 0).all()


def test_gshard_without_a_key_sends_every_second_expert(rng):
    assert bool(jnp.all(routed("gshard", rng.normal(size=(2, 50, 5)) * 4).chosen))


@pytest.mark.parametrize("gate", sorted(set(FOUR) - {"gshard"}))
def test_other_gates_draw_nothing(gate, rng):
    logits = rng.normal(size=(1, 50, 5))
    without, with_key = routed(gate, logits), routed(gate, logits, rng=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, without, with_key)


def test_router_computes_in_float32(rng):
    logits = jnp.asarray(rng.normal(size=(1, 3, 4)), jnp.bfloat16)
    routing = route(LAYERS["switch"].gate, logits, GateInputs(jnp.ones((1, 3), bool)))
    assert routing.combine_weights.dtype == routing.router_probs.dtype == routing.router_logits.dtype == jnp.float32


def test_router_matmuls_use_the_highest_precision_on_tpus():
    config = tiny_model(gate="noisy_topk")
    router = Router(config, kind="noisy", rngs=nnx.Rngs(0))
    text = str(jax.make_jaxpr(lambda x: (router(x), router.noise_logits(x)))(jnp.ones((1, 2, config.d_model))))
    assert text.count("dot_general") == text.count("Precision.HIGHEST, Precision.HIGHEST") == 2


def test_top_k_is_that_of_lax(rng):
    # Integers, hence many ties: both give the lower index first.
    scores = jnp.asarray(rng.integers(0, 4, size=(3, 40, 7)), jnp.float32)
    for k in (1, 3, 7):
        values, index = top_k(scores, k)
        expected_values, expected_index = jax.lax.top_k(scores, k)
        np.testing.assert_array_equal(values, expected_values)
        np.testing.assert_array_equal(index, expected_index)


def test_top_k_gradient_is_that_of_lax(rng):
    scores = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)
    ours = jax.grad(lambda s: jnp.sum(top_k(s, 2)[0] * cotangent))(scores)
    np.testing.assert_array_equal(ours, jax.grad(lambda s: jnp.sum(jax.lax.top_k(s, 2)[0] * cotangent))(scores))


def _layer(**overrides):
    config = tiny_model(dispatch="einsum", **overrides)
    return config, MoELayer(config, rngs=nnx.Rngs(0))


def test_language_model_gradient_reaches_the_router_at_one_expert(rng):
    """Switch keeps p_top; a softmax over the single chosen logit is always 1, so that such a gate is refused."""
    with pytest.raises(ConfigError, match="the only weight is then always 1"):
        TopK(k=1, renormalise=True)
    config, layer = _layer(gate="switch", experts_per_token=1, jitter=0.0, eval_capacity_factor=4.0)
    x = jnp.asarray(rng.normal(size=(2, 5, config.d_model)), jnp.float32)
    graphdef, parameters = nnx.split(layer)

    def loss(parameters):
        y, _, _ = nnx.merge(graphdef, parameters)(x, jnp.ones((2, 5), bool))
        return jnp.sum(jnp.square(y))

    gradient = jax.jit(jax.grad(loss))(parameters)["router"]["kernel"][...]
    assert bool(jnp.any(jnp.abs(gradient) > 1e-4))


def test_jitter_moves_the_router_and_not_what_the_experts_receive(rng):
    """With one expert of weight p = 1 the output is expert(x) for any logits: only jitter in the experts' input could
    change it."""
    config, layer = _layer(gate="switch", num_experts=1, jitter=0.5, capacity_factor=1.0)
    x = jnp.asarray(rng.normal(size=(2, 5, config.d_model)), jnp.float32)
    mask = jnp.ones((2, 5), bool)

    @jax.jit
    def run(rng):
        y, _, routing = layer(x, mask, train=True, rng=rng)
        return y, routing.router_logits

    (quiet, quiet_logits), (noisy, noisy_logits) = run(None), run(jax.random.key(3))
    assert np.abs(np.asarray(quiet_logits) - np.asarray(noisy_logits)).max() > 0.1
    # Two programs, hence equal to rounding; the jitter is 0.5.
    np.testing.assert_allclose(quiet, noisy, rtol=1e-5, atol=1e-6)


def test_jitter_is_uniform_and_bounded():
    config = tiny_model(gate="switch", num_experts=1)
    router = Router(config, rngs=nnx.Rngs(0))
    # One entry of x and of the kernel is 1, the rest 0: the logit is that entry's factor.
    router.kernel[...] = jnp.zeros_like(router.kernel[...]).at[0].set(1.0)
    x = jnp.zeros((1, 2000, config.d_model)).at[..., 0].set(1.0)
    factors = np.asarray(router(x, jitter=0.1, rng=jax.random.key(0)))
    assert factors.min() >= 0.9
    assert factors.max() <= 1.1
    # A uniform on [0.9, 1.1] has mean 1 and deviation 0.2/sqrt(12) = 0.0577; 2000 draws: within 5·0.0577/sqrt(2000).
    assert abs(factors.mean() - 1) < 0.0065
    assert abs(factors.std() - 0.0577) < 0.004
    np.testing.assert_array_equal(router(x, jitter=0.1), np.ones((1, 2000, 1)))
    np.testing.assert_array_equal(router(x, jitter=0.0, rng=jax.random.key(0)), np.ones((1, 2000, 1)))
