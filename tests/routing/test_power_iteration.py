"""The router that is tied to its experts by power iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ConfigError
from moe.conformance import oracle, oracle_cases
from moe.interop.layers import single_layer
from moe.layers.power_iteration import power_step, retracted
from tests.helpers import eight_devices_equal_one, moe_config, outputs, slow_case

MODES = ["einsum", slow_case("gather"), slow_case("dropless")]


def test_logits_of_two_experts_by_hand():
    """Columns (1, 0) and (0, 2); matrices with the rows (1, 0), (1, 1) and (3, 0), (0, 4). The first makes (1, 0) of
    its column, and (1, 1) of that; the second (0, 8) and (0, 32). At the length C′/√2 = 2√2: (2, 2) and (0, 2√2)."""
    columns = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    matrices = jnp.array([[[1.0, 0.0], [1.0, 1.0]], [[3.0, 0.0], [0.0, 4.0]]])
    np.testing.assert_allclose(power_step(columns, matrices), [[1, 0], [1, 32]])
    for scale in (1.0, 1e-24):  # of any length, which the scaling takes away
        tied = retracted(scale * power_step(columns, matrices), 4.0)
        np.testing.assert_allclose(tied, [[2, 0], [2, 8**0.5]], rtol=1e-6)
    layer = single_layer(
        {"name": "power_iteration", "k": 1}, router=columns, up=matrices, down=matrices, activation="relu"
    )
    _, routing = outputs(layer)(jnp.asarray([[[1.0, 1.0], [-1.0, 3.0]]]))
    np.testing.assert_allclose(routing.router_logits, [[[4, 8**0.5], [4, 3 * 8**0.5]]], rtol=1e-6)
    np.testing.assert_array_equal(routing.expert_index, [[[0], [1]]])
    # Nothing comes of a column of zeros, without a NaN in its gradient.
    slope = jax.grad(lambda columns: jnp.sum(retracted(columns, 4.0)[0]))(jnp.zeros((2, 2)))
    assert np.isfinite(slope).all()


def test_repeated_steps_find_the_principal_direction(rng):
    """Section 3.1: the column becomes the left singular vector of the largest singular value."""
    matrices = jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32)
    columns = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    step = jax.jit(lambda columns: retracted(power_step(columns, matrices), 3**0.5))
    for _ in range(200):
        columns = step(columns)
    for column, matrix in zip(np.asarray(columns).T, np.asarray(matrices, np.float64), strict=True):
        principal = np.linalg.svd(matrix)[0][:, 0]
        np.testing.assert_allclose(abs(column @ principal), 1, rtol=1e-5)


def test_latent_experts_have_the_product_of_both_matrices(rng):
    """The logits are those of experts with W_down·W_e as their gate matrices."""
    weights = oracle.weights_of(6, 5, 4, 3, latent_dim=3)
    layer = single_layer({"name": "power_iteration", "k": 2}, **oracle.read_by("power_iteration", weights))
    x = rng.normal(size=(1, 5, 6)).astype(np.float32)
    whole = np.einsum("dp,epf->edf", weights["latent_down"], weights["gate_matrix"])
    expected = x @ retracted(power_step(*map(jnp.asarray, (weights["router"], whole))), 4.0)
    np.testing.assert_allclose(outputs(layer)(x)[1].router_logits, expected, rtol=1e-4, atol=1e-5)


def test_the_logits_have_the_bias_and_the_cap_of_the_router(rng):
    weights = oracle.read_by("power_iteration", oracle.weights_of(6, 5, 4, 3))
    fields = {"router_softcap": 0.5, "dispatch": "dropless"}
    plain, capped = (single_layer({"name": "power_iteration", "k": 2}, **weights, **more) for more in ({}, fields))
    x = jnp.asarray(rng.normal(size=(1, 5, 6)), jnp.float32)
    logits, limited = (outputs(layer)(x)[1].router_logits for layer in (plain, capped))
    np.testing.assert_allclose(limited, 0.5 * np.tanh(logits / 0.5), rtol=1e-5)


@pytest.mark.slow
def test_values_and_gradients_equal_the_oracle():
    """Among them those of W_g and of the gate matrices, which the logits depend on."""
    rows = [row for case in cases() for row in oracle.against_oracle(case, seed=2)]
    assert [row for row in rows if not row.passes] == []
    assert len(rows) == 3 * len(cases())


def cases():
    """Cases of the gate."""
    return [case for case in (*oracle_cases.CASES, *oracle_cases.edges()) if case.gate == "power_iteration"]


@pytest.mark.parametrize("mode", MODES)
def test_eight_devices_compute_what_one_does(mode, rng):
    weights = oracle.read_by("power_iteration", oracle.weights_of(8, 8, 8, 11))
    eight_devices_equal_one(single_layer({"name": "power_iteration", "k": 3}, **weights, dispatch=mode), rng)


def test_columns_without_a_matrix_are_refused():
    with pytest.raises(
        ConfigError, match=r"novice experts=1: must be 0 with the gate 'power_iteration', whose columns"
    ):
        moe_config(gate="power_iteration", zero_experts=1)
