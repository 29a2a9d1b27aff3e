"""ZAYA1's router: an MLP over a vector that is handed on, and an expert that returns 0."""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ConfigError
from moe.conformance import oracle, oracle_cases
from moe.interop.layers import single_layer
from tests.helpers import eight_devices_equal_one, moe_config, outputs, slow_case

#: Inputs, weights and outputs of ``ZayaSparseMoeBlock`` of transformers 5.24.0, layers 0 and 1, top-1 of four experts.
REFERENCE = Path(__file__).parents[1] / "data" / "zaya.npz"
#: Our parameter of the router → its array there, and whether it is a matrix [outputs,inputs].
_PARTS = {
    "down": ("down_proj.weight", True),
    "down_bias": ("down_proj.bias", False),
    "norm.scale": ("router_mlp.norm.weight", False),
    "first": ("router_mlp.fc1.weight", True),
    "first_bias": ("router_mlp.fc1.bias", False),
    "second": ("router_mlp.fc2.weight", True),
    "second_bias": ("router_mlp.fc2.bias", False),
}


def layer_of(arrays, layer, dispatch):
    """A layer with the reference's weights; its balancing biases are a selection bias."""

    def read(name, turned=False):
        array = arrays[f"{layer}/{name}"]
        return array.swapaxes(-1, -2) if turned else array

    parts = {ours: read(f"gate.{theirs}", turned) for ours, (theirs, turned) in _PARTS.items()}
    parts["carry_scale"] = read("gate.router_states_scale") if layer else np.ones(6)  # layer 0 has nothing below it
    gate_matrix, up = np.split(read("experts.gate_up_proj", turned=True), 2, axis=2)
    return single_layer(
        {"name": "zaya", "router_dim": 6, "skip_bias": 0.0, "bias": "sign", "bias_rate": 0.001},
        router=read("gate.router_mlp.out_proj.weight", turned=True),
        router_parts=parts,
        selection_bias=read("gate.balancing_biases"),
        up=up,
        gate_matrix=gate_matrix,
        down=read("experts.down_proj", turned=True),
        dispatch=dispatch,
        capacity={"eval": 4.0},  # room for every token: the reference drops none
    )


@pytest.mark.parametrize("dispatch", ["dropless", slow_case("gather"), slow_case("einsum")])
def test_two_layers_equal_those_of_transformers(dispatch):
    with np.load(REFERENCE) as file:
        arrays = dict(file)
    carry, skipped = None, 0
    for layer in range(2):
        x = jnp.asarray(arrays[f"{layer}/x"])
        y, routing = outputs(layer_of(arrays, layer, dispatch))(x, carry=carry)
        carry = routing.carry
        logits = arrays[f"{layer}/logits"].reshape(*x.shape[:2], -1)
        np.testing.assert_allclose(routing.router_logits, logits, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(carry, arrays[f"{layer}/state"], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(y, arrays[f"{layer}/y"], rtol=1e-5, atol=2e-6)
        skipped += np.sum(routing.expert_index == 4)
    assert skipped == 18


def test_one_token_by_hand():
    """x = 1 and r = 4 of the layer below: r = 2·1 + 1 + 1/2·4 = 5, whose norm is 1. The first layer has weight 0 and
    bias 1: gelu(1) = Φ(1) = 0.8413; the second weight 1: z = gelu(0.8413); logits z and -z. The expert returns
    silu(1)·1·3, and the second column 0."""
    z = (1 + math.erf(1 / 2**0.5)) / 2
    assert z == pytest.approx(0.841345, abs=1e-6)
    z *= (1 + math.erf(z / 2**0.5)) / 2
    parts = {name: np.zeros(1) for name in ("first_bias", "second_bias")} | {"first_bias": np.ones(1)}
    parts |= {"down": np.full((1, 1), 2.0), "down_bias": np.ones(1), "carry_scale": np.full(1, 0.5)}
    parts |= {"norm.scale": np.ones(1), "first": np.zeros((1, 1)), "second": np.ones((1, 1))}
    one = np.ones((1, 1, 1))
    for skip_bias, weight in ((-1.0, 1 / (1 + math.exp(-2 * z))), (1.0, 0.0)):
        layer = single_layer(
            {"name": "zaya", "router_dim": 1, "skip_bias": skip_bias},
            router=np.array([[1.0, -1.0]]),
            router_parts=parts,
            up=one,
            gate_matrix=one,
            down=3 * one,
        )
        y, routing = outputs(layer)(jnp.ones((1, 1, 1)), carry=jnp.full((1, 1, 1), 4.0))
        np.testing.assert_allclose(routing.router_logits, [[[z, -z]]], rtol=1e-5)
        np.testing.assert_allclose(routing.carry, [[[5.0]]])
        np.testing.assert_allclose(y, [[[3 * weight / (1 + math.exp(-1))]]], rtol=1e-5)


@pytest.mark.parametrize("mode", ["einsum", slow_case("gather"), slow_case("dropless")])
def test_eight_devices_compute_what_one_does(mode, rng):
    weights = oracle.weights_of(8, 8, 8, 11, null=(1, 0, 0, 0), gate="zaya")
    given = oracle.arguments(oracle.read_by("zaya", weights))
    eight_devices_equal_one(single_layer(oracle.own_fields("zaya"), **given, dispatch=mode), rng)


@pytest.mark.slow
def test_a_saturated_router_is_compared_where_float32_holds_its_gradient():
    """All experts chosen, capacity 1: the one token kept had a probability of 0.99996, whose gradient is rounding."""
    case = next(case for case in oracle_cases.edges() if case.gate == "zaya")
    row = next(oracle.against_oracle(case, seed=80))
    assert row.passes, row


def test_the_skipped_expert_must_be_there():
    with pytest.raises(ConfigError, match=r"model\.moe\.zero_experts=0: must be 1, and copy, .* with the gate 'zaya'"):
        moe_config(gate="zaya", zero_experts=0)


@pytest.mark.parametrize("dispatch", ["dropless", slow_case("gather"), slow_case("einsum")])
def test_logits_are_capped_by_hand(dispatch, rng):
    """x = (3, -1), W_g the identity: logits 2·tanh(3/2) and 2·tanh(-1/2); a router without logits has no cap."""
    fields = {"router": np.eye(2), "up": np.ones((2, 2, 3)), "down": np.ones((2, 3, 2)), "activation": "relu"}
    layer = single_layer("switch", **fields, dispatch=dispatch, router_softcap=2.0)
    _, routing = outputs(layer)(jnp.asarray([[[3.0, -1.0]]]))
    np.testing.assert_allclose(routing.router_logits, [[[2 * math.tanh(1.5), 2 * math.tanh(-0.5)]]], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"model\.moe\.router_softcap=2\.0: must be 0: the gate 'hash' has no router"):
        moe_config(gate="hash", router_softcap=2.0)
