"""Recorded experts with weights recomputed by the router: values, gradients, files, refusals."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import ConfigError
from moe.config.registry import LAYERS
from moe.routing.interface import Gate, GateInputs
from moe.routing.routing import Choices, Routing, load_routing, route, save_routing
from tests.gate_helpers import LOGITS
from tests.helpers import random_model, routed, tiny_model


def test_weights_of_recorded_experts_by_hand():
    # (6, 3, 1, 2)/12 and (1, 2, 9, 4)/16, replayed on experts (3, 1) and (0, 2): 2/5 and 3/5; 1/10 and 9/10.
    choices = Choices(jnp.asarray([[[3, 1], [0, 2]]]), jnp.asarray([[[True, True], [True, False]]]))
    routing = routed("mixtral", LOGITS, 2, replay=choices)
    np.testing.assert_array_equal(routing.expert_index, choices.expert_index)
    np.testing.assert_array_equal(routing.chosen, choices.chosen)
    np.testing.assert_allclose(routing.combine_weights, [[[2 / 5, 3 / 5], [1 / 10, 0.0]]], rtol=1e-5)


@pytest.mark.parametrize("gate", [name for name, layer in LAYERS.items() if layer.gate.reweighs])
def test_every_gate_weighs_its_own_choices_as_before(gate, rng):
    logits = rng.normal(size=(2, 6, 4))
    given = {"token_ids": jnp.asarray(rng.integers(0, 99, (2, 6)))}
    k = 2 if hasattr(LAYERS[gate].gate, "k") else None
    key = jax.random.key(0) if gate in ("random", "st_moe", "gshard", "switch_sampled") else None
    recorded = routed(gate, logits, k, rng=key, **given)
    again = routed(gate, logits, k, replay=recorded.choices, **given)  # without the key that drew them
    np.testing.assert_array_equal(again.expert_index, recorded.expert_index)
    np.testing.assert_array_equal(again.chosen, recorded.chosen)
    np.testing.assert_allclose(again.combine_weights, recorded.combine_weights, rtol=1e-5)
    if gate == "sparse_mixer":  # it weighs the second expert among those without the first
        return
    # If recorded in another order, as by engines that sort by weight, each expert keeps its weight.
    turned = dataclasses.replace(
        recorded.choices, expert_index=recorded.expert_index[..., ::-1], chosen=recorded.chosen[..., ::-1]
    )
    again = routed(gate, logits, k, replay=turned, **given)
    np.testing.assert_allclose(again.combine_weights, recorded.combine_weights[..., ::-1], rtol=1e-5)


def test_the_router_keeps_its_gradient_and_files_hold_everything(rng, tmp_path):
    """With another model's choices read from a file, the experts are that model's, and weights and gradient this
    router's.

    A replayed full routing gives the router no gradient.
    """
    sizes = {"num_experts": 8, "experts_per_token": 2, "eval_capacity_factor": 4.0, "dispatch": "einsum"}
    config = tiny_model(gate="deepseek_v4", num_layers=1, **sizes)
    theirs, ours = random_model(config), random_model(config)
    ours.segment_0.block_0.moe.router.kernel[...] *= -1.0  # chooses others
    tokens = jnp.asarray(rng.integers(1, 48, (2, 6)))
    recorded = nnx.jit(lambda model: model(tokens, return_routing=True).routing)(theirs)
    save_routing(str(tmp_path / "choices.npz"), recorded.choices)
    save_routing(str(tmp_path / "routing.npz"), recorded)
    choices, full = (load_routing(str(tmp_path / f"{name}.npz")) for name in ("choices", "routing"))
    assert isinstance(choices, Choices)
    assert isinstance(full, Routing)
    jax.tree.map(np.testing.assert_array_equal, full, recorded)
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "choices.npz").read_bytes()[:-30])
    np.savez(tmp_path / "no_routing.npz", weights=recorded.combine_weights)
    index, chosen = np.asarray(recorded.expert_index), np.asarray(recorded.chosen)
    np.savez(tmp_path / "fractions.npz", expert_index=index / 1, chosen=chosen)
    np.savez(tmp_path / "negative.npz", expert_index=index - 8, chosen=chosen)
    np.savez(tmp_path / "numbers.npz", expert_index=index, chosen=chosen.astype(int))
    np.savez(tmp_path / "other_shape.npz", expert_index=index, chosen=chosen[..., :1])
    np.savez(tmp_path / "wrapping.npz", expert_index=np.full(index.shape, 1 << 40, np.uint64), chosen=chosen)
    np.savez(tmp_path / "flat.npz", expert_index=index[0, 0], chosen=chosen[0, 0])
    np.savez(
        tmp_path / "unknown.npz",
        **{**np.load(tmp_path / "routing.npz"), "smooth_load": index / 2, "needed_bias": index / 2, "more": index},
    )
    os.mkfifo(tmp_path / "pipe.npz")  # reading it would wait for ever
    for name, says in (
        ("damaged", "not a readable npz file"),
        ("pipe", "is not a regular file"),
        ("no_routing", "broken is missing"),
        ("unknown", "more is not one of them"),
        ("fractions", "expert_index must be integers"),
        ("flat", "expert_index must be integers"),
        ("negative", "expert_index must be from 0 to"),
        ("wrapping", "expert_index must be from 0 to 2147483647"),
        ("numbers", "and chosen booleans"),
        ("other_shape", "must be of expert_index's shape"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}\.npz: .*{says}"):
            load_routing(str(tmp_path / f"{name}.npz"))
    np.savez(tmp_path / "other.npz", expert_index=recorded.expert_index, chosen=recorded.chosen)
    jax.tree.map(np.testing.assert_array_equal, load_routing(str(tmp_path / "other.npz")), choices)
    graphdef, parameters, rest = nnx.split(ours, nnx.Param, ...)

    @jax.jit
    def gradient(parameters, routing):
        def loss(parameters):
            output = nnx.merge(graphdef, parameters, rest)(tokens, routing=routing, return_routing=True)
            return jnp.sum(jnp.square(output.logits)), output.routing

        return jax.grad(loss, has_aux=True)(parameters)

    moved, routing = gradient(parameters, choices)
    np.testing.assert_array_equal(routing.expert_index, recorded.expert_index)
    # By hand: the scores of the recorded experts, over their sum, times 1.5.
    scores = np.sqrt(np.logaddexp(0, np.asarray(routing.router_logits, np.float64)))
    chosen = np.take_along_axis(scores, np.asarray(routing.expert_index), axis=-1)
    np.testing.assert_allclose(routing.combine_weights, 1.5 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-4)
    router = moved["segment_0"]["block_0"]["moe"]["router"]["kernel"][...]
    assert (np.abs(router).max(axis=(1, 2)) > 1e-6).all()
    still, _ = gradient(parameters, full)
    assert not np.any(still["segment_0"]["block_0"]["moe"]["router"]["kernel"][...])
    # The gradient is that of the loss with these experts: a central difference along a direction of the router.
    step = jax.tree.map(jnp.zeros_like, parameters)
    direction = jnp.asarray(rng.normal(size=router.shape), jnp.float32)
    step["segment_0"]["block_0"]["moe"]["router"]["kernel"] = step["segment_0"]["block_0"]["moe"]["router"][
        "kernel"
    ].replace(direction)

    @jax.jit
    def value(sign):
        parameters_there = jax.tree.map(lambda p, s: p + sign * 1e-2 * s, parameters, step)
        logits = nnx.merge(graphdef, parameters_there, rest)(tokens, routing=choices).logits
        return jnp.sum(jnp.square(logits))

    slope = (value(1.0) - value(-1.0)) / 2e-2
    np.testing.assert_allclose(jnp.sum(router * direction), slope, rtol=2e-2)


def test_a_gate_that_weighs_only_what_it_chooses_refuses_choices():
    assert not Gate.reweighs
    config = tiny_model(gate="soft_moe", dispatch="einsum", accept_future_leak=True)
    model = random_model(config)
    choices = Choices(jnp.zeros((2, 1, 6, 4), jnp.int32), jnp.ones((2, 1, 6, 4), bool))
    with pytest.raises(ValueError, match="a routing cannot be replayed by Soft MoE"):
        model(jnp.ones((1, 6), jnp.int32), routing=choices)


def test_padding_stays_out_of_replayed_choices():
    choices = Choices(jnp.zeros((1, 2, 1), jnp.int32), jnp.ones((1, 2, 1), bool))
    mask = jnp.asarray([[True, False]])
    routing = route(LAYERS["switch"].gate, jnp.asarray(LOGITS, jnp.float32), GateInputs(mask), replay=choices)
    np.testing.assert_array_equal(routing.chosen[0, :, 0], [True, False])
    assert dataclasses.fields(Choices)[0].name == "expert_index"
