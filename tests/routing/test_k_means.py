"""The router whose centroids move by online k-means."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import ConfigError
from moe.config.registry import LAYERS
from moe.conformance import oracle, oracle_cases
from moe.interop.layers import single_layer
from moe.layers.k_means import KMeansMoE
from moe.routing.balancing_rules import Centroids
from tests.helpers import eight_devices_equal_one, gate_named, slow_case

MODES = ["einsum", slow_case("gather"), slow_case("dropless")]


def layer_of(rng, **fields):
    """A layer of two plain experts with the centroids (2, 0) and (0, 5), K = 1."""
    return single_layer(
        {"name": "k_means", "k": 1},
        router_parts={"bias.centroids": np.array([[2.0, 0.0], [0.0, 5.0]])},
        up=rng.normal(size=(2, 2, 3)),
        down=rng.normal(size=(2, 3, 2)),
        activation="relu",
        **fields,
    )


def test_cosines_and_sums_of_tokens_by_hand(rng):
    """x = (3, 4) and (40, 30) have the cosines 0.6 and 0.8, and 0.8 and 0.6; padding and a broken token do not
    count."""
    layer = layer_of(rng)
    x = jnp.asarray([[[3.0, 4.0], [40.0, 30.0], [0.0, 1.0], [7.0, 7.0], [np.nan, 0.0]]])
    mask = jnp.asarray([[True, True, True, False, True]])
    _, report, routing = jax.jit(lambda x: layer(x, mask, train=True))(x)
    np.testing.assert_allclose(routing.router_logits[0, :3], [[0.6, 0.8], [0.8, 0.6], [0, 1]], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(routing.expert_index[0, :3, 0], [1, 0, 1])
    np.testing.assert_allclose(routing.combine_weights[0, :, 0], [0.8, 0.8, 1, 0, 0], rtol=1e-5)
    # (40, 30) alone; (3, 4) + (0, 1) of two tokens.
    np.testing.assert_allclose(report.sums.routed, [[40, 30, 1], [3, 5, 2]])
    assert float(report.broken_tokens) == 1
    assert not hasattr(jax.jit(lambda x: layer(x, mask)[1])(x).sums, "routed"), "in training only"


def test_centroids_and_bias_move_by_hand():
    """Rates 1/4 and 0.1, two layers at once; the second has an expert without tokens."""
    assert LAYERS["k_means"].gate.balancing == Centroids(1e-3, 0.01)
    rule = Centroids(0.1, 0.25)
    routed = jnp.asarray([[[40.0, 30.0, 1.0], [3.0, 5.0, 2.0]], [[0.0, 0.0, 0.0], [4.0, 8.0, 4.0]]])
    load = jnp.asarray([[1 / 3, 2 / 3], [0.0, 1.0]])
    report = types.SimpleNamespace(expert_load=load, sums=types.SimpleNamespace(routed=routed))
    state = {"bias": jnp.zeros((2, 2)), "centroids": jnp.asarray([[[2.0, 0.0], [0.0, 5.0]]] * 2)}
    moved = rule.next_state(state, rule.signal(report, 1))
    # 2 + (40 − 2)/4 and 30/4; (3/2)/4 and 5 + (5/2 − 5)/4. Then (2, 0) stays; 1/4 and 5 + (2 − 5)/4.
    expected = [[[11.5, 7.5], [0.375, 4.375]], [[2.0, 0.0], [0.25, 4.25]]]
    np.testing.assert_allclose(moved["centroids"], expected, rtol=1e-6)
    np.testing.assert_allclose(moved["bias"], [[0.1, -0.1], [0.1, -0.1]], rtol=1e-6)


def test_fresh_centroids_are_random_unit_vectors():
    layer = KMeansMoE(d_model=16, d_ff=4, num_experts=8, gate="k_means", rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(layer.router))
    assert list(state) == ["bias"], "no parameters"
    centroids = state["bias"]["centroids"]
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=-1), np.ones(8), rtol=1e-5)
    assert np.abs(np.asarray(centroids @ centroids.T) - np.eye(8)).max() < 0.95, "eight different ones"


@pytest.mark.slow
def test_values_and_gradients_equal_the_oracle():
    cases = [case for case in (*oracle_cases.CASES, *oracle_cases.edges()) if case.gate == "k_means"]
    rows = [row for case in cases for row in oracle.against_oracle(case, seed=2)]
    assert [row for row in rows if not row.passes] == []
    assert len(rows) == 3 * len(cases) >= 9


@pytest.mark.parametrize("mode", MODES)
def test_eight_devices_compute_what_one_does(mode, rng):
    """Also the sums of the tokens that experts were sent, which the report contains."""
    given = oracle.arguments(oracle.read_by("k_means", oracle.weights_of(8, 8, 8, 11, gate="k_means")))
    eight_devices_equal_one(single_layer({"name": "k_means", "k": 3}, **given, dispatch=mode), rng)


def test_impossible_settings_are_refused():
    for message, fields in (
        (r"gate\.score='sigmoid': must be softmax with centroids", {"score": "sigmoid"}),
        (r"gate\.bias='quantile': must be sign with centroids", {"bias": "quantile"}),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(LAYERS["k_means"].gate, **fields)
    hashed = LAYERS["hash"].gate
    with pytest.raises(ConfigError, match=r"layer_gates=\('hash',\): must be empty with centroids"):
        KMeansMoE(d_model=4, d_ff=4, gate=gate_named("k_means", 1), layer_gates=(hashed,), rngs=nnx.Rngs(0))
