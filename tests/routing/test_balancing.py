"""Losses and metrics of balance: reference values of the papers, and no effect of padding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config.registry import LAYERS
from moe.dispatch.buffers import make_plan
from moe.routing import balancing
from moe.routing.balancing import dead_experts, max_violation, router_z_loss, token_mean
from moe.training.evaluation import routing_metrics
from moe.training.losses import auxiliary_loss, mean_reports
from moe.training.metrics import mean_row
from tests.gate_helpers import load_balancing_loss
from tests.helpers import FOUR, routed, slow_case, tiny_model

E = 8
# Jitted as one program, like load_balancing_loss.
report = jax.jit(balancing.report, static_argnames=("counts", "k"))
make_plan = jax.jit(make_plan, static_argnames="capacity")


def _cyclic(scale: float) -> np.ndarray:
    """[1,E,E] logits: token s prefers expert s, then s+1, and so on; summed over tokens all experts are equal."""
    row = -scale * np.arange(E)
    return np.stack([np.roll(row, s) for s in range(E)])[None]


def _collapsed(tokens: int = 24) -> np.ndarray:
    """[1,S,E] logits: expert 0 has all the probability; the others' is below float32's resolution."""
    return np.broadcast_to(np.where(np.arange(E) == 0, 200.0, -np.arange(E)), (1, tokens, E))


def _mask(logits: np.ndarray) -> np.ndarray:
    return np.ones(logits.shape[:2], bool)


@pytest.mark.parametrize(("gate", "k"), [("switch", 1), ("switch", 2), ("mixtral", 2), ("gshard", 2), ("mixtral", E)])
def test_load_balancing_loss_is_one_at_perfect_balance(gate, k):
    logits = _cyclic(0.7)
    loss = load_balancing_loss(routed(gate, logits, k=k), _mask(logits))
    assert float(loss) == pytest.approx(1.0, rel=1e-6)


# Collapsed, P = (1, 0, ...). One choice: f = (1, 0, ...), E·1·1. Two: f = (1/2, 1/2, 0, ...), E·(1/2)·1.
@pytest.mark.parametrize(("k", "expected"), [(1, E), (2, E / 2)])
def test_load_balancing_loss_at_collapse(k, expected):
    logits = _collapsed()
    loss = load_balancing_loss(routed("switch", logits, k=k), _mask(logits))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_load_balancing_loss_by_hand():
    # Three tokens over two experts: P of expert 0 is 3/4, 3/4, 1/4, mean 7/12; two of three choose it: f = (2/3, 1/3).
    # 2·(2/3·7/12 + 1/3·5/12) = 2·(14 + 5)/36 = 19/18.
    logits = np.log([[[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]])
    loss = load_balancing_loss(routed("switch", logits, k=1), _mask(logits))
    assert float(loss) == pytest.approx(19 / 18, rel=1e-6)


def _gshard_auxiliary_loss(logits: np.ndarray) -> float:
    """GShard, algorithm 1, one group: (1/E)·sum of (c_e/S)·m_e, c_e the first choices of e, m_e its mean gate."""
    probs = np.exp(logits[0]) / np.exp(logits[0]).sum(-1, keepdims=True)
    tokens, num_experts = probs.shape
    counts = [int((probs.argmax(-1) == e).sum()) for e in range(num_experts)]
    return sum(counts[e] / tokens * probs[:, e].mean() for e in range(num_experts)) / num_experts


@pytest.mark.parametrize(
    ("logits", "expected"),
    [(_cyclic(0.7), 1 / E**2), (_collapsed(), 1 / E), (np.random.default_rng(0).normal(size=(1, 40, E)), None)],
    ids=["uniform", "collapse", "random"],
)
def test_gshard_auxiliary_loss_is_ours_over_e_squared(logits, expected):
    ours = float(load_balancing_loss(routed("gshard", logits), _mask(logits), counts="first_choice")) / E**2
    assert ours == pytest.approx(_gshard_auxiliary_loss(logits), rel=1e-5)
    assert expected is None or ours == pytest.approx(expected, rel=1e-5)


def test_gshard_is_the_only_gate_that_counts_only_first_choices():
    assert [gate for gate in FOUR if LAYERS[gate].losses.counts == "first_choice"] == ["gshard"]
    # One token, second choice expert 1: over both choices f = (1/2, 1/2), over the first f = (1, 0); P = (2/3, 1/3).
    routing = routed("gshard", np.log([[[2.0, 1.0]]]))
    mask = jnp.ones((1, 1), bool)
    kept = routing.chosen
    assert float(report(routing, mask, kept, counts="first_choice").load_balancing_loss) == pytest.approx(2 * 2 / 3)
    assert float(report(routing, mask, kept).load_balancing_loss) == pytest.approx(1.0)


def test_load_balancing_gradient_flows_through_the_mean_probability_only(rng):
    logits = jnp.asarray(rng.normal(size=(2, 10, E)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 10)) < 0.7)
    routing = routed("switch", logits, mask=mask, k=2)
    share = np.zeros(E)
    for g, s in np.argwhere(np.asarray(mask)):
        for e in np.asarray(routing.expert_index[g, s]):
            share[e] += 1 / (2 * int(mask.sum()))

    def with_constant_share(logits):
        probs = jax.nn.softmax(logits, axis=-1)
        mean = jnp.stack([probs[g, s] for g, s in np.argwhere(np.asarray(mask))]).mean(0)
        return E * jnp.sum(jnp.asarray(share, jnp.float32) * mean)

    def ours(logits):
        return load_balancing_loss(routed("switch", logits, mask=mask, k=2), mask)

    gradient = jax.jit(jax.grad(ours))(logits)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(with_constant_share))(logits), rtol=1e-5, atol=1e-8)
    assert float(jnp.abs(gradient).max()) > 1e-3


def test_router_z_loss():
    mask = jnp.ones((1, 5), bool)
    # logsumexp of eight zeros is ln 8 = 2.0794, squared 4.324.
    assert float(router_z_loss(jnp.zeros((1, 5, 8)), mask)) == pytest.approx(4.324, abs=1e-3)
    # Adding a constant c to the logits adds it to the logsumexp: (ln 8 + 3)².
    assert float(router_z_loss(jnp.full((1, 5, 8), 3.0), mask)) == pytest.approx((math.log(8) + 3) ** 2, rel=1e-6)


# Balanced; all to one; each token to the same K = 2 (half of the assignments each): 8/2 − 1.
@pytest.mark.parametrize(
    ("load", "violation", "dead"),
    [(np.full(8, 1 / 8), 0.0, 0), (np.eye(8)[0], 7.0, 7), (np.eye(8)[0] / 2 + np.eye(8)[3] / 2, 3.0, 6)],
)
def test_max_violation_and_dead_experts(load, violation, dead):
    assert float(max_violation(jnp.asarray(load, jnp.float32))) == pytest.approx(violation, abs=1e-6)
    assert int(dead_experts(jnp.asarray(load, jnp.float32))) == dead
    # One value per layer for stacked layers.
    stacked = jnp.stack([jnp.full(8, 1 / 8), jnp.asarray(load, jnp.float32)])
    np.testing.assert_allclose(max_violation(stacked), [0.0, violation], atol=1e-6)
    np.testing.assert_array_equal(dead_experts(stacked), [0, dead])


def test_report_by_hand():
    # Three tokens, E = 2, K = 1, C = 1: experts 0, 0, 1, so the second token is dropped.
    logits = np.log([[[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]])
    routing = routed("switch", logits)
    out = report(routing, _mask(logits), make_plan(routing, 1).kept)
    np.testing.assert_allclose(out.expert_load, [2 / 3, 1 / 3], rtol=1e-6)
    assert float(out.fraction_tokens_dropped) == pytest.approx(1 / 3)
    # −(3/4)·ln(3/4) − (1/4)·ln(1/4) = 0.2158 + 0.3466 = 0.5623 for every token.
    assert float(out.router_entropy) == pytest.approx(0.5623, abs=1e-4)
    assert float(out.load_balancing_loss) == pytest.approx(19 / 18, rel=1e-6)


def test_the_entropy_has_no_gradient():
    """Its slope is infinite at a probability of 0, which ReMoE's experts have."""
    logits = jnp.asarray([[[2.0, 1.0, -1.0, -3.0]]])
    routing, mask = routed("remoe", logits, k=2), jnp.ones((1, 1), bool)

    def entropy(probs):
        return balancing.report(dataclasses.replace(routing, router_probs=probs), mask, routing.chosen).router_entropy

    assert routing.router_probs[0, 0, 3] == 0
    np.testing.assert_array_equal(jax.grad(entropy)(routing.router_probs), 0.0)


def test_entropy_of_an_undecided_router_is_ln_e():
    routing = routed("switch", np.zeros((1, 4, E)))
    assert float(report(routing, jnp.ones((1, 4), bool), routing.chosen).router_entropy) == (
        pytest.approx(math.log(E), rel=1e-6)
    )


@pytest.mark.parametrize("gate", ["gshard", *map(slow_case, ("switch", "dense_mixture", "mixtral"))])
def test_padding_changes_nothing(gate, rng):
    logits = rng.normal(size=(2, 12, 5))
    padded = np.concatenate([logits, rng.normal(size=(2, 7, 5)) * 10], axis=1)
    mask = np.concatenate([np.ones((2, 12)), np.zeros((2, 7))], axis=1).astype(bool)
    counts = LAYERS[gate].losses.counts
    plain = routed(gate, logits)
    with_padding = routed(gate, padded, mask=mask)
    plain_report = report(plain, _mask(logits), make_plan(plain, 4).kept, counts=counts)
    padded_report = report(with_padding, mask, make_plan(with_padding, 4).kept, counts=counts)
    # Equal to rounding: a sum with zeros appended may be taken in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), padded_report, plain_report)
    assert 0 < float(plain_report.fraction_tokens_dropped) < 1 or gate == "dense_mixture"


def test_a_batch_of_padding_reports_zeros():
    routing = routed("mixtral", np.ones((2, 3, 4)), mask=np.zeros((2, 3), bool))
    out = report(routing, jnp.zeros((2, 3), bool), routing.chosen)
    assert not any(np.any(values) for values in jax.tree.leaves(out))


def test_a_broken_token_counts_in_no_loss_and_no_mean():
    """It reports as padding does, except for the count of broken tokens."""
    logits = np.log([[[3.0, 1.0], [3.0, 1.0], [1.0, 3.0], [1.0, 1.0]]])
    as_padding = routed("quantile_balancing", logits, 1, [[True, True, True, False]], train=True)
    logits[0, 3, 0] = np.nan
    broken = routed("quantile_balancing", logits, 1, train=True)
    expected = report(as_padding, as_padding.chosen[..., 0], as_padding.chosen, k=1)
    found = report(broken, _mask(logits), broken.chosen, k=1)
    np.testing.assert_allclose(expected.sums.bias_target, [-0.25, 0.0], atol=1e-6)
    assert (float(found.broken_tokens), float(expected.broken_tokens)) == (1, 0)
    found = dataclasses.replace(found, broken_tokens=expected.broken_tokens)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_declined_choices_are_not_counted():
    # Both tokens want experts 0 then 1; second choices of token 0 declined by hand: assignments 0:2, 1:1.
    routing = routed("gshard", np.log([[[2.0, 1.0, 0.5], [2.0, 1.0, 0.5]]]))
    routing = dataclasses.replace(routing, chosen=routing.chosen.at[0, 0, 1].set(False))
    out = report(routing, jnp.ones((1, 2), bool), routing.chosen, counts="first_choice")
    np.testing.assert_allclose(out.expert_load, [2 / 3, 1 / 3, 0], rtol=1e-6)
    assert float(out.fraction_tokens_dropped) == 0


def test_token_mean_covers_only_real_tokens():
    values = jnp.asarray([[[1.0, 10.0], [3.0, 30.0], [100.0, 1000.0]]])
    np.testing.assert_allclose(token_mean(values, jnp.asarray([[True, True, False]])), [2.0, 20.0])


def test_broken_tokens_are_counted_over_microbatches_and_steps():
    logits = np.zeros((1, 4, E))
    logits[0, :3, 0] = np.nan
    routing = routed("switch", logits)
    one = report(routing, jnp.ones((1, 4), bool), routing.chosen)
    none = dataclasses.replace(one, broken_tokens=jnp.zeros(()))
    stacked = jax.tree.map(lambda *values: jnp.stack(values), one, none)
    assert float(mean_reports(stacked).broken_tokens) == 3
    assert float(mean_reports(stacked).router_entropy) == pytest.approx(float(one.router_entropy))
    steps = [{"skipped": skipped, "broken_tokens": [3, 0], "expert_load": [[1.0], [1.0]]} for skipped in (0, 1, 0)]
    assert mean_row(steps)["broken_tokens"] == [9, 0]


def test_the_mean_of_a_row_leaves_out_skipped_steps():
    steps = [{"skipped": skipped, "loss": loss} for skipped, loss in ((0, 1.0), (1, math.nan), (0, 3.0))]
    assert mean_row(steps) == {"skipped": 1, "loss": 2.0}
    assert mean_row([{"skipped": 1, "loss": loss} for loss in (1.0, 2.0)]) == {"skipped": 2, "loss": 1.5}


def test_metrics_of_several_batches_equal_those_of_one():
    """Six tokens to experts 0 0 0 0 1 1 with C = 2, and two to expert 1: 2 of 8 are dropped, not (1/3 + 0)/2, since the
    padded batch is weighted by its tokens."""
    logits = np.log([[[3.0, 1.0]] * 4 + [[1.0, 3.0]] * 2, [[1.0, 3.0]] * 2 + [[1.0, 1.0]] * 4])
    mask = np.asarray([[True] * 6, [True] * 2 + [False] * 4])
    batches = []
    for group in (0, 1):
        routing = routed("switch", logits[group : group + 1], mask=mask[group : group + 1])
        out = report(routing, jnp.asarray(mask[group : group + 1]), make_plan(routing, 2).kept)
        batches.append(jax.tree.map(lambda value: value[None], out))  # one layer
    metrics = routing_metrics(batches)
    assert metrics["fraction_tokens_dropped"] == [pytest.approx(2 / 8)]
    np.testing.assert_allclose(metrics["expert_load"], [[4 / 8, 4 / 8]], rtol=1e-6)
    # Every real token has probabilities 3/4 and 1/4, and one expert.
    assert metrics["router_entropy"] == [pytest.approx(0.5623, abs=1e-4)]
    assert metrics["active_experts"] == [pytest.approx(1.0)]


def test_metrics_of_microbatches_are_those_of_all_their_tokens():
    """Four tokens of K = 2 to experts 0 and 1, all dropped, and one to experts 2 and 3: loads (4, 4, 1, 1)/10, 8 of 10
    dropped, entropy (4 x 0.5 + 1.0)/5; the losses are the objective's, a mean over microbatches."""
    zeros = {field.name: jnp.zeros((2,)) for field in dataclasses.fields(balancing.LayerReport)}
    per_expert = jnp.zeros((2, 4))
    sums = balancing.BalanceSums(per_expert, per_expert, jnp.array([4.0, 1.0]), jnp.array([8.0, 2.0]), per_expert)
    values = {
        "expert_load": jnp.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        "fraction_tokens_dropped": jnp.array([1.0, 0.0]),
        "router_entropy": jnp.array([0.5, 1.0]),
        "active_experts": jnp.array([2.0, 1.0]),
        "load_balancing_loss": jnp.array([3.0, 1.0]),
    }
    mean = mean_reports(balancing.LayerReport(**zeros | values | {"sums": sums}))
    np.testing.assert_allclose(mean.expert_load, [0.4, 0.4, 0.1, 0.1], rtol=1e-6)
    assert float(mean.fraction_tokens_dropped) == pytest.approx(0.8)
    assert float(mean.router_entropy) == pytest.approx(0.6)
    assert float(mean.active_experts) == pytest.approx(1.8)
    assert float(mean.load_balancing_loss) == 2


def test_losses_of_weight_zero_are_left_out_of_the_objective():
    """Multiplied by 0, XLA would still compute their gradients."""
    reports = report(routed("switch", np.zeros((1, 4, E))), jnp.ones((1, 4), bool), jnp.ones((1, 4, 1), bool))
    moe = tiny_model().moe
    moe = dataclasses.replace(moe, losses=dataclasses.replace(moe.losses, balance=0.5, z=0.0))
    jaxpr = jax.make_jaxpr(lambda reports: auxiliary_loss(reports, moe))(reports).jaxpr
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    fields = [path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(reports)]
    read = {name for name, variable in zip(fields, jaxpr.invars, strict=True) if id(variable) in used}
    assert read == {"load_balancing_loss", "sparsity_penalty"}
    assert float(auxiliary_loss(reports, moe)) == pytest.approx(0.5)  # 1 at perfect balance
