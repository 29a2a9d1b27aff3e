"""The diagnosis of other libraries' layers: planted bugs are named, correct layers pass."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe import MoELayer
from moe.config import Capacity, ConfigError
from moe.config.registry import find_gate
from moe.conformance import recorded
from moe.conformance.judge import equations, evidence
from moe.conformance.judge.diagnosis import diagnose, page
from moe.conformance.judge.errors import InputError
from moe.conformance.judge.rule import Layer, Rule, Variant
from moe.dispatch import buffers
from tests.helpers import slow_case

#: The losses have enough weight in the differentiated sum that their gradients are compared too.
RULE = Rule(k=2, renormalise=True, capacity_factor=1.0, balance_weight=10.0, z_weight=1.0)
LAYER = evidence.random_layer(RULE, groups=2, tokens=9, d=8, f=6, num_experts=4)
MASK = jnp.asarray(LAYER.mask)
K, E = RULE.k, LAYER.num_experts


def ours(weights, x, mask, *, gate="mixtral", k=K, counted=None, **settings):
    """This package's layer with these weights; ``counted``: the mask that it gets instead of the true one."""
    fields = {"capacity": Capacity(eval=RULE.capacity_factor), "dispatch": "einsum", **settings}
    rule = find_gate(gate).with_k(k)
    layer = MoELayer(d_model=8, d_ff=6, num_experts=E, gate=rule, rngs=nnx.Rngs(0), **fields)
    layer.router.kernel[...] = weights["router"]
    for name in ("up", "gate", "down"):
        getattr(layer.experts, name)[...] = weights[name]
    y, report, _ = layer(x, mask if counted is None else counted)
    return y, {"balance_loss": report.load_balancing_loss, "z_loss": report.router_z_loss}


def diagnosis(function):
    return diagnose(RULE, LAYER, evidence.run(function, RULE, LAYER))


def scaled(array, factor):
    """The array with its gradient multiplied by ``factor``."""
    return array * factor + jax.lax.stop_gradient(array * (1 - factor))


def with_weights(change):
    return lambda weights, x, mask: ours({**weights, **change(weights)}, x, mask)


def with_losses(**change):
    def layer(weights, x, mask):
        y, losses = ours(weights, x, mask)
        return y, {name: change.get(name, lambda value: value)(value) for name, value in losses.items()}

    return layer


def sharded_balance(weights, x, mask):
    """Megatron-LM 5047: a mean of the losses of two devices, each over its own tokens."""
    halves = [ours(weights, x[i : i + 1], mask[i : i + 1])[1]["balance_loss"] for i in range(2)]
    y, losses = ours(weights, x, mask)
    return y, losses | {"balance_loss": sum(halves) / 2}


def floor_capacity(weights, x, mask):
    rounded = lambda factor, k, tokens, experts: int(factor * k * tokens / experts)  # noqa: E731
    with mock.patch.object(buffers, "expert_capacity", rounded):
        return ours(weights, x, mask)


#: Bug → (layer, words that name it).
MUTANTS = {
    "not renormalised": (
        lambda w, x, m: ours(w, x, m, gate="switch"),
        "softmax before the top-k without renormalising",
    ),
    "capacity rounded down": (floor_capacity, "the capacity is rounded down"),
    "no capacity": (lambda w, x, m: ours(w, x, m, dispatch="dropless"), "nothing is dropped"),
    "one expert too many": (lambda w, x, m: ours(w, x, m, k=3), "3 experts per token instead of 2"),
    "padding routed": (lambda w, x, m: ours(w, x, m, counted=jnp.ones_like(m)), "the mask is ignored"),
    "gate and up swapped": (with_weights(lambda w: {"gate": w["up"], "up": w["gate"]}), "projections are swapped"),
    "experts off by one": (
        with_weights(lambda w: {name: jnp.roll(w[name], 1, 0) for name in ("up", "gate", "down")}),
        "expert e + 3 is applied",
    ),
    "expert gradients divided by TP": (
        with_weights(lambda w: {name: scaled(w[name], 0.25) for name in ("up", "gate", "down")}),
        "0.25 times the expected value = 1/E or 1/4 devices",
    ),
    "expert gradients multiplied by EP": (
        with_weights(lambda w: {name: scaled(w[name], 8.0) for name in ("up", "gate", "down")}),
        "8 times the expected value = 8 devices (TP, EP or DP)",
    ),
    "router without gradient": (
        lambda w, x, m: (ours({**w, "router": jax.lax.stop_gradient(w["router"])}, x, m)[0], ours(w, x, m)[1]),
        "the router's matrix gets no gradient through the combine weights",
    ),
    "balance loss times K": (with_losses(balance_loss=lambda loss: loss * K), "2 times the expected value = K"),
    "balance loss over E": (with_losses(balance_loss=lambda loss: loss / E), "0.25 times the expected value = 1/E"),
    "balance loss detached": (with_losses(balance_loss=jax.lax.stop_gradient), "the balance loss has no gradient"),
    "balance loss a mean over devices": (sharded_balance, "a mean over 2 shards"),
    "z-loss detached": (with_losses(z_loss=jax.lax.stop_gradient), "the z-loss has no gradient"),
}


def test_this_layer_conforms():
    result = diagnosis(ours)
    assert result.conforms, page(RULE, result)
    assert {check.quantity for check in result.checks} >= {"y", "balance_loss", "z_loss", "grad_router", "grad_x"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_named(name):
    layer, words = MUTANTS[name]
    result = diagnosis(layer)
    assert not result.conforms
    text = page(RULE, result)
    assert words in text, text


def test_output_of_one_wrong_token_is_decomposed_into_experts_and_weights():
    exact = equations.compute(RULE, Variant(), LAYER)
    y, token = exact["y"].copy(), int(np.argmax(exact["kept"][0].all(-1)))
    first = int(exact["expert_index"][0, token, 0])
    y[0, token] += 0.5 * exact["outputs"][0, token, first]
    text = page(RULE, diagnose(RULE, LAYER, {"y": y}))
    weight = exact["combine"][0, token, first]
    assert f"token {token} of group 0: expert {first} with weight {weight + 0.5:.4g} instead of {weight:.4g}" in text


def test_a_layer_without_a_mask_is_named():
    """Its outputs of real tokens are right, and its gradients hold what padding's outputs add."""
    rule = dataclasses.replace(RULE, capacity_factor=0.0)
    exact = equations.compute(rule, Variant(), dataclasses.replace(LAYER, mask=np.ones_like(LAYER.mask)))
    found = diagnose(rule, LAYER, {name: exact[name] for name in ("y", "z_loss", "grad_router", "grad_up", "grad_x")})
    assert [check.quantity for check in found.checks if check.passes] == ["y"]
    text = page(rule, found)
    assert "the mask is ignored: padding has outputs" in text
    assert "padding counts in the losses" in text
    assert not found.unexplained, text


def test_hand_computed_layer():
    """Two experts, two tokens, one dimension: weights e/(1+e) and 1/(1+e), relu experts y = down · max(up · x, 0)."""
    layer = Layer(
        x=np.asarray([[[1.0], [2.0]]]),
        mask=np.ones((1, 2), bool),
        router=np.asarray([[1.0, 0.0]]),
        logits=None,
        up=np.asarray([[[1.0]], [[3.0]]]),
        gate=None,
        down=np.asarray([[[2.0]], [[1.0]]]),
    )
    exact = equations.compute(Rule(k=1, activation="relu"), Variant(), layer)
    e = np.exp(1.0)
    np.testing.assert_allclose(exact["y"][0, :, 0], [2 * e / (1 + e), 4 * e**2 / (1 + e**2)], rtol=1e-12)
    # Both tokens choose expert 0: f = (1, 0), P_0 = mean of e/(1+e) and e²/(1+e²); E · f_0 · P_0.
    mean = (e / (1 + e) + e**2 / (1 + e**2)) / 2
    assert exact["balance_loss"] == pytest.approx(2 * mean, rel=1e-12)
    # One row per expert: capacity 1.0 · 1 · 2 / 2; the second token is dropped.
    limited = equations.compute(Rule(k=1, activation="relu", capacity_factor=1.0), Variant(), layer)
    assert limited["kept"][0, :, 0].tolist() == [True, False]
    assert limited["y"][0, 1, 0] == 0


def test_hand_computed_gpt_oss_expert():
    """Gate 9·1 − 1 = 8, clamped to 7; up 2·1 + 1 = 3; 7 · σ(1.702 · 7) · (3 + 1) · 0.5 + 0.25."""
    one = np.ones((1, 1, 1))
    arrays = {"up": 2 * one, "gate": 9 * one, "down": 0.5 * one, "router": np.zeros((1, 1))}
    biases = {"up_bias": np.ones((1, 1)), "gate_bias": -np.ones((1, 1)), "down_bias": 0.25 * np.ones((1, 1))}
    layer = Layer(x=one, mask=np.ones((1, 1), bool), logits=None, **arrays, **biases)
    exact = equations.compute(Rule(k=1, activation="gpt_oss"), Variant(), layer)
    assert exact["y"].item() == pytest.approx(7 / (1 + np.exp(-1.702 * 7)) * 4 * 0.5 + 0.25, rel=1e-12)


#: Deviations of other libraries' routers: change of the variant → words.
ROUTERS = {
    "bias_on_logits": (Variant(bias_on_logits=True), "the selection bias is added to the logits"),
    "zero_outside_groups": (Variant(zero_outside_groups=True), "outside the kept groups have a score of 0"),
    "balance_softmax": (Variant(balance_softmax=2), "a softmax of a softmax"),
    "plain_balance": (Variant(balance_softmax=1), "those of a plain softmax router"),
}


@pytest.mark.parametrize(
    "name",
    ["bias_on_logits", *map(slow_case, ("plain_balance", "zero_outside_groups", "balance_softmax"))],
)
def test_a_router_of_groups_with_another_rule_is_named(name):
    variant, words = ROUTERS[name]
    rule = Rule(k=1, score="sigmoid", groups=4, kept_groups=3, balance_weight=10.0)
    layer = dataclasses.replace(LAYER, bias=np.array([-2.0, -2.1, -2.2, -2.3]))
    exact = equations.compute(rule, variant, layer)
    results = {name: exact[name] for name in ("y", "balance_loss", "grad_router")}
    text = page(rule, diagnose(rule, layer, results, devices=(2,)))
    assert words in text, text


def test_npz_round_trip(tmp_path):
    exact = equations.compute(RULE, Variant(), LAYER)
    results = {name: exact[name] for name in ("y", "expert_index", "grad_router")}
    results["combine_weights"] = np.take_along_axis(exact["combine"], exact["expert_index"], -1)
    recorded.write(tmp_path / "layer.npz", LAYER, results)
    layer, read = recorded.read(str(tmp_path / "layer.npz"))
    assert diagnose(RULE, layer, read).conforms
    for wrong, says in ((2 * read["combine_weights"], "2 times"), (read["combine_weights"][..., :1], "shape")):
        (check,) = diagnose(RULE, layer, {"combine_weights": wrong}).checks
        assert not check.passes
        assert says in check.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wieght": np.ones(1)}, "unknown array 'wieght'"),
        ({"router": None}, "'router'"),
        ({"router_logits": np.ones((2, 9, 4))}, "has both 'router' and 'router_logits'"),
        ({"down": np.ones((4, 6, 7))}, "down has the shape"),
        ({"cotangent": None}, "need the array 'cotangent'"),
        ({"y": None, "grad_router": None}, "nothing to compare"),
        ({"x": np.ones(3)}, r"x has the shape \(3,\), not \[G,S,D\] or \[S,D\]"),
        ({"x": LAYER.x * np.nan}, "x holds values that are not finite"),
        ({"x": LAYER.x * 1j}, "x is of type complex128, must be real numbers"),
        ({"up": np.full(LAYER.up.shape, "1")}, "up is of type <U1, must be real numbers"),
        ({"up": np.array([None])}, "not a readable npz file of arrays"),
        ({"up": np.ones((0, 6, 5))}, r"up has the shape \(0, 6, 5\)"),
        ({"gate_up": np.ones((4, 6, 10))}, "gate_up .* stands beside gate or up"),
        ({"gate_up": np.ones((4, 6, 9)), "up": None, "gate": None}, r"gate_up has the shape \(4, 6, 9\), not"),
        ({"cotangent": LAYER.cotangent.T}, "cotangent has the shape"),
        ({"mask": LAYER.mask * 2}, "mask must be 1 or True for real tokens"),
        ({"mask": LAYER.mask & False}, "mask must be 1 or True for real tokens"),
        ({"y": np.ones(3)}, r"y has the shape \(3,\), for"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, words):
    arrays = dict(LAYER.weights) | {"cotangent": LAYER.cotangent, "y": LAYER.x, "grad_router": LAYER.router} | change
    np.savez(tmp_path / "bad.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ConfigError, match=words):
        recorded.read(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("experts", [99, -1, 0.5, np.nan])
def test_choices_that_are_no_valid_expert_are_refused(experts):
    index = np.full((*LAYER.mask.shape, 2), experts)
    with pytest.raises(InputError, match="expert_index must be whole numbers from 0 to"):
        diagnose(RULE, LAYER, {"expert_index": index, "combine_weights": np.ones(index.shape)})


def test_impossible_rules_are_refused():
    with pytest.raises(InputError, match="k=5"):
        diagnose(dataclasses.replace(RULE, k=5), LAYER, {"y": LAYER.x})
    with pytest.raises(InputError, match="groups=3"):
        diagnose(dataclasses.replace(RULE, groups=3), LAYER, {"y": LAYER.x})


@pytest.mark.parametrize(("stated", "used"), [("geglu", "geglu_exact"), ("gelu_exact", "gelu")])
def test_the_two_forms_of_gelu_are_told_apart(stated, used):
    """JAX's is by tanh, PyTorch's by erf; the difference had no explanation."""
    rule = dataclasses.replace(RULE, activation=stated)
    layer = dataclasses.replace(LAYER, gate=LAYER.gate if stated == "geglu" else None)
    results = {"y": equations.compute(dataclasses.replace(rule, activation=used), Variant(), layer)["y"]}
    found = diagnose(rule, layer, results)
    assert not found.conforms
    assert f"the activation is {used} instead of {stated}" in page(rule, found)
    assert diagnose(dataclasses.replace(rule, activation=used), layer, results).conforms
