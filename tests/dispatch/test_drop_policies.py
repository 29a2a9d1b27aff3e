"""Drop policies and overflow to the next expert."""

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import Capacity
from moe.dispatch.buffers import make_plan, overflow_to_next
from moe.interop.layers import single_layer
from tests.helpers import routed


def _one_expert(weights):
    """Routing of tokens that all prefer expert 0, then expert 1, with these weights of expert 0."""
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
    # 0.42/0.72 = 0.58. With a capacity of two, the third token is dropped.
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


def test_a_layer_drops_different_tokens_under_different_keys():
    """Keep C = 0.5 · 8 / 2 = 2 of eight tokens that all want expert 0."""
    weights = {"router": np.zeros((1, 2)), "up": np.ones((2, 1, 1)), "down": np.ones((2, 1, 1))}
    drops = {"drop_policy": "random", "accept_future_leak": True, "capacity": Capacity(train=0.5, eval=0.5)}
    layer = single_layer("switch", **weights, **drops, activation="relu", jitter=0.0, dispatch="einsum")
    run = jax.jit(lambda key: layer(jnp.ones((1, 8, 1)), train=True, rng=key)[0])
    kept = [np.asarray(run(jax.random.key(seed)))[0, :, 0] > 0 for seed in range(4)]
    assert [row.sum() for row in kept] == [2] * 4
    assert len({row.tobytes() for row in kept}) > 1


def test_first_choices_have_priority_over_second_ones_under_probability():
    # Token 0's weights: 0.6 for expert 0, 0.4 for 1. Token 1: 0.55 for 1, 0.45 for 0. With C = 1 both keep their first
    # choice, and token 0, with the higher probability, does not displace token 1's.
    routing = routed("mixtral", np.log([[[0.6, 0.4], [0.45, 0.55]]]), 2)
    plan = make_plan(routing, 1, drop_policy="probability")
    np.testing.assert_array_equal(plan.kept, [[[True, False], [True, False]]])


def test_overflow_goes_to_the_next_best_expert_after_all_others():
    # C = 1: token 0 keeps expert 0. Tokens 1 and 2 overflow to expert 1, which takes token 1 with the weight
    # p_1 = 0.9·(1 − 0.9) = 0.09 and drops token 2.
    overflow = jax.jit(lambda routing: overflow_to_next(routing, make_plan(routing, 1)))
    routing = _one_expert([0.5, 0.9, 0.6])
    moved, plan = overflow(routing)
    np.testing.assert_array_equal(moved.expert_index[0, :, 0], [0, 1, 1])
    np.testing.assert_array_equal(plan.kept[0, :, 0], [True, True, False])
    np.testing.assert_allclose(moved.combine_weights[0, :2, 0], [0.5, 0.09], rtol=1e-5)
    # Second choices of a probability that underflows to 0 keep a weight of 0, wherever they go.
    routing = routed("switch", [[[0.0, -200.0, -300.0, -400.0]] * 2], 2)
    moved, plan = overflow(routing)
    np.testing.assert_array_equal(plan.kept, [[[True, True], [True, True]]])
    np.testing.assert_array_equal(moved.combine_weights, [[[1, 0], [0, 0]]])


def test_overflow_of_improbable_choices_has_a_gradient():
    """The second choice's probability, e^-60, has a square that underflows to 0."""

    def weight(logits):
        routing = routed("switch", logits, 2)
        moved, plan = overflow_to_next(routing, make_plan(routing, 1))
        return jnp.sum(moved.combine_weights * jnp.asarray([1.0, 2.0])), plan.kept

    logits = jnp.asarray([[[0.0, -60.0, -61.0, -62.0]] * 2])
    gradient, kept = jax.jit(jax.grad(weight, has_aux=True))(logits)
    assert kept.all()  # the second token's choices overflow to experts 2 and 3
    np.testing.assert_allclose(gradient, np.zeros((1, 2, 4)), atol=1e-20)
