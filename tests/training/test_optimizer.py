"""Optimizers: which parameters they update and decay, how their state is stored, and updates computed by hand."""

import dataclasses
import functools
import math
import sys
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe.config import ConfigError, MemoryConfig, OptimizerConfig
from moe.config.parse import from_config_dict
from moe.config.run_sections import Part
from moe.models.factory import abstract_parameters
from moe.models.segments import part_of
from moe.models.state import set_schedule_step
from moe.parallel import partition_specs
from moe.parallel.parameters import optimizer_specs
from moe.training.optimizer import (
    OPTIMIZERS,
    _averaging,
    averaged_weights,
    decay_mask,
    make_optimizer,
    probe_own,
)
from tests.helpers import tiny_encoder_decoder, tiny_model

RATE = 0.1
CONFIG = OptimizerConfig(
    learning_rate=RATE, warmup_steps=0, schedule="constant", weight_decay=0.0, gradient_clip=0.0, eps=1e-30
)


def tree(fill):
    """Two stacked layers with two experts of 3 x 4, their router, and a norm."""
    shapes = {"experts": {"up": (2, 2, 3, 4)}, "router": {"kernel": (2, 3, 2)}, "norm": {"scale": (2, 3)}}
    return jax.tree.map(fill, {"segment_0": shapes}, is_leaf=lambda leaf: isinstance(leaf, tuple))


def step(config, gradients, parameters):
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters, norm=jnp.ones(()))
    return updates["segment_0"]


def own(config, schedule):
    """Sign descent, an example of a user's optimizer."""
    return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(schedule))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "tests.training.test_optimizer:own"])
def test_frozen_parameters_stay_and_have_no_state(name):
    config = dataclasses.replace(CONFIG, name=name, frozen=("router",))
    parameters = tree(jnp.ones)
    updates = step(config, tree(jnp.ones), parameters)
    assert not np.any(updates["router"]["kernel"])
    assert np.all(updates["experts"]["up"] < 0)
    assert np.all(updates["norm"]["scale"] < 0)
    state = make_optimizer(config, 10).init(parameters)
    assert not any("router" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))


def test_each_parameter_belongs_to_one_part():
    """A shared expert's FFN is not a dense layer, relative biases belong to attention, and norms are a separate
    part."""
    encoder_decoder = nnx.to_pure_dict(abstract_parameters(tiny_encoder_decoder(shared_d_ff=12)))
    parts = {}
    for tree in (encoder_decoder, nnx.to_pure_dict(abstract_parameters(tiny_model(**EVERYTHING)))):
        for path, _ in jax.tree_util.tree_leaves_with_path(tree):
            names = [key.key for key in path]
            parts.setdefault(part_of(names), set()).add(".".join(names[-2:]))
    assert set(parts) == set(typing.get_args(Part))
    assert parts["dense"] == {"dense.gate", "dense.up", "dense.down", "prediction.project"}
    assert parts["shared"] == {"dense.gate", "dense.up", "dense.down", "shared.gate"}
    assert {"relative_bias.table", "kv_latent_norm.scale", "attention.query"} <= parts["attention"]
    norms = ("attention_norm", "ffn_norm", "norm", "final_norm", "embedding_norm", "hidden_norm", "output_norm")
    assert parts["norms"] == {f"{name}.scale" for name in norms}
    parameters = {"moe": {"shared": {"dense": {"up": jnp.ones((2, 3))}}}, "dense": {"up": jnp.ones((2, 3))}}
    optimizer = make_optimizer(dataclasses.replace(CONFIG, frozen=("dense",)), 10)
    updates, _ = optimizer.update(parameters, optimizer.init(parameters), parameters, norm=jnp.ones(()))
    assert not np.any(updates["dense"]["up"])
    assert np.all(updates["moe"]["shared"]["dense"]["up"] < 0)


def test_relative_biases_do_not_decay():
    parameters = {"relative_bias": {"table": jnp.ones((8, 2))}, "embedding": {"table": jnp.ones((8, 2))}}
    assert decay_mask(parameters) == {"relative_bias": {"table": False}, "embedding": {"table": True}}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_decoupled_and_spares_norm_scales(name):
    """Decay of 0.5 at a rate of 0.1 subtracts 0.05 from a matrix of ones, whatever the gradient."""
    gradients, parameters = tree(jnp.ones), tree(jnp.ones)
    plain, decayed = (
        step(dataclasses.replace(CONFIG, name=name, weight_decay=decay), gradients, parameters) for decay in (0.0, 0.5)
    )
    difference = jax.tree.map(jnp.subtract, plain, decayed)
    np.testing.assert_allclose(difference["experts"]["up"], 0.05, rtol=1e-4)
    np.testing.assert_allclose(difference["router"]["kernel"], 0.05, rtol=1e-4)
    np.testing.assert_array_equal(difference["norm"]["scale"], 0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bfloat16_take_half_the_memory_and_follow_those_in_float32(name, rng):
    """After ten steps on the same gradients, updates differ from those in float32 by bfloat16's rounding, 2^-8 per
    moment."""
    config = dataclasses.replace(CONFIG, name=name, gradient_clip=1.0, eps=1e-8)
    gradients = [tree(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)) for _ in range(10)]
    updates, sizes, first = [], [], []
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(config, moment_dtype=dtype), 10)
        state, parameters = optimizer.init(tree(jnp.ones)), tree(jnp.ones)
        # besides moments, Muon's state holds its three coefficients
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape != (3,)))
        for gradient in gradients:
            before = jax.tree.map(lambda leaf: leaf.dtype, state)
            update, state = optimizer.update(gradient, state, parameters, norm=jnp.ones(()))
            assert jax.tree.map(lambda leaf: leaf.dtype, state) == before
            first += [update] * (gradient is gradients[0])
        updates.append(update["segment_0"])
    assert sizes[1] * 2 == sizes[0]
    jax.tree.map(np.testing.assert_array_equal, *first)  # nothing has been rounded yet
    for ours, reference in zip(*map(jax.tree.leaves, reversed(updates)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, reference, atol=0.05 * RATE)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, updates), strict=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"name": "adafactor"}, "adamw and muon have"), ({"name": "adamw", "b2": 0.999}, "up to b2=0.99")],
)
def test_moments_that_bfloat16_cannot_hold_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        from_config_dict({"optimizer": fields | {"moment_dtype": "bfloat16"}})


def test_adafactor_scales_updates_by_the_rms_of_the_parameter():
    """The first update is the gradient's sign, of RMS 1, times the RMS of the parameter, 2, and the rate."""
    updates = step(dataclasses.replace(CONFIG, name="adafactor"), tree(jnp.ones), tree(lambda s: jnp.full(s, 2.0)))
    np.testing.assert_allclose(updates["router"]["kernel"], -2 * RATE, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "second", "expected"),
    [
        # m = (1/2·1/2·1 + 1/2·3) / (1 − 1/4) = 7/3, v = (3/4·1/4·1 + 1/4·9) / (1 − 9/16) = 39/7.
        ("adamw", 3.0, 7 / 3 / math.sqrt(39 / 7)),
        # v = β·1 + (1 − β)·1/4 with β = 1 − 2^−0.8; the parameters' RMS is 2.
        ("adafactor", 0.5, 2 * 0.5 / math.sqrt(1 - 0.75 * 2**-0.8)),
        # v = β·1 + (1 − β)·9: 3/√v = 1.27 is clipped at an RMS of 1.
        ("adafactor", 3.0, 2.0),
    ],
)
def test_the_second_update_by_hand(name, second, expected):
    """Gradients of 1, then of another size; all parameters are 2."""
    optimizer = make_optimizer(dataclasses.replace(CONFIG, name=name, b1=0.5, b2=0.75), 10)
    parameters = {"dense": {"up": jnp.full((2, 3), 2.0)}}
    state = optimizer.init(parameters)
    for size in (1.0, second):
        gradients = {"dense": {"up": jnp.full((2, 3), size)}}
        updates, state = optimizer.update(gradients, state, parameters, norm=jnp.ones(()))
    np.testing.assert_allclose(updates["dense"]["up"], -RATE * expected, rtol=1e-4)


def test_adafactor_factors_large_matrices():
    """Second moments of [2,256,128] are [2,256] and [2,128]; no array of the matrix's size is kept."""
    parameters = {"dense": {"up": jnp.ones((2, 256, 128))}}
    state = make_optimizer(dataclasses.replace(CONFIG, name="adafactor"), 10).init(parameters)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert {(2, 256), (2, 128)} <= shapes
    assert (2, 256, 128) not in shapes


def test_adafactor_factors_over_experts_if_they_outnumber_a_matrix_dimension():
    """Mesh TensorFlow's rule: the two largest dimensions, here 512 experts and F 256."""
    parameters = {"experts": {"up": jax.ShapeDtypeStruct((1, 512, 128, 256), jnp.float32)}}
    state = jax.eval_shape(make_optimizer(dataclasses.replace(CONFIG, name="adafactor"), 10).init, parameters)
    assert {(1, 512, 128), (1, 128, 256)} <= {leaf.shape for leaf in jax.tree.leaves(state)}


def test_muon_makes_each_experts_update_orthogonal(rng):
    """Rows of each expert's 3 x 4 update are orthogonal and of equal length, rate * 0.2 * sqrt(4)."""
    gradients = tree(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32))
    scaled = jax.tree.map(lambda gradient: 1000 * gradient, gradients)
    scaled["segment_0"]["experts"]["up"] = gradients["segment_0"]["experts"]["up"].at[0, 0].multiply(1000)
    config = dataclasses.replace(CONFIG, name="muon")
    updates, others = (step(config, tried, tree(jnp.ones)) for tried in (gradients, scaled))
    np.testing.assert_allclose(updates["experts"]["up"], others["experts"]["up"], rtol=0.05, atol=1e-3)
    for matrix in np.asarray(updates["experts"]["up"]).reshape(4, 3, 4):
        singular = np.linalg.svd(matrix, compute_uv=False) / (RATE * 0.2 * 2)
        assert 0.5 < singular.min() <= singular.max() < 1.4  # the accuracy of five Newton-Schulz steps
    np.testing.assert_allclose(np.abs(updates["router"]["kernel"]), RATE, rtol=1e-3)  # AdamW's first step


#: One model with every kind of parameter: latent attention, a dense layer, shared, latent, constant and novice experts,
#: a prediction layer, a memory of n-grams.
EVERYTHING = {
    "kv_lora_rank": 6,
    "q_lora_rank": 5,
    "rope_dim": 2,
    "value_dim": 4,
    "num_kv_heads": 4,
    "first_dense": 1,
    "gate": "moe_plus_plus",
    "shared_d_ff": 12,
    "shared_gate": True,
    "latent_dim": 8,
    "novice_experts": 2,
    "prediction_layers": 1,
    "memory": MemoryConfig(layers=(0,), heads=2, dim=4, rows=5),
}

#: Matrices that Muon updates, by the last two names of their paths.
ORTHOGONAL = {
    *(f"attention.{name}" for name in ("query_down", "query_up", "kv_down", "kv_up", "out")),
    *(f"{owner}.{name}" for owner in ("dense", "experts") for name in ("gate", "up", "down")),
    *("latent.down", "latent.up"),
    "prediction.project",
}


def test_which_parameters_muon_updates_and_which_decay():
    """Every parameter of a model by name: updated by Muon or AdamW, decayed or not; without gradients a step is the
    decay."""
    parameters = nnx.to_pure_dict(abstract_parameters(tiny_model(**EVERYTHING)))
    parameters = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), parameters)
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    names = {jax.tree_util.keystr(path): ".".join(key.key for key in path[-2:]) for path, _ in leaves}
    others = {"router.kernel", "shared.gate", "null.vectors", "null.mix", "null.novices", "embedding.table"}
    others |= {"memory.key", "memory.value", "memory.vectors", "memory.conv"}
    assert set(names.values()) > ORTHOGONAL | others
    config = dataclasses.replace(CONFIG, name="muon", weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(parameters)
    second_moments = {
        ".".join(key.key for key in path[-2:] if hasattr(key, "key"))
        for path, _ in jax.tree_util.tree_leaves_with_path(optax.tree_utils.tree_get_all_with_path(state, "nu"))
    }
    # AdamW has second moments of all others, and of no matrix that Muon updates.
    assert {name for name in second_moments if "." in name} == set(names.values()) - ORTHOGONAL
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = jax.jit(optimizer.update)(zeros, state, parameters, norm=jnp.ones(()))
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        spared = names[jax.tree_util.keystr(path)].endswith(("scale", "bias", ".vectors", "null.novices", "conv"))
        np.testing.assert_allclose(update, 0.0 if spared else -0.05, rtol=1e-4, atol=1e-9, err_msg=str(path))


@pytest.mark.parametrize(
    ("path", "heads"),
    [
        (("experts", "up"), -3),  # [layers, experts, D, F]
        (("attention", "query"), -2),  # [layers, D, heads, H], each head with muon_heads
        (("attention", "out"), -3),  # [layers, heads, H, D]
    ],
)
def test_muon_moves_stacked_matrices_as_it_would_each_alone(path, heads, rng):
    """Two layers of three experts, or heads, in one array equal six separate matrices."""
    owner, name = path
    axis, size = heads + 4, [2, 5, 4]
    size.insert(axis, 3)
    gradient = jnp.asarray(rng.normal(size=size), jnp.float32)

    @functools.partial(jax.jit, static_argnames=("owner", "name"))
    def updated(gradient, owner=owner, name=name):
        tree = {owner: {name: gradient}}
        optimizer = make_optimizer(dataclasses.replace(CONFIG, name="muon", muon_heads=owner == "attention"), 10)
        zeros = jax.tree.map(jnp.zeros_like, tree)
        return optimizer.update(tree, optimizer.init(zeros), zeros, norm=jnp.ones(()))[0][owner][name]

    matrices = jnp.moveaxis(gradient, axis, 1)  # [2,3,5,4]
    alone = jnp.stack([jnp.stack([updated(matrix, "experts", "up") for matrix in layer]) for layer in matrices])
    np.testing.assert_allclose(jnp.moveaxis(updated(gradient), axis, 1), alone, rtol=1e-4, atol=1e-7)
    with pytest.raises(ConfigError, match=r"muon_heads=True: needs optimizer\.name=muon"):
        dataclasses.replace(CONFIG, muon_heads=True)


def test_optimizer_state_is_sharded_like_its_parameter():
    """Adafactor's factored moments of [2,8,256,128] lack one axis and are not split over its devices."""
    parameters = {"segment_0": {"experts": {"up": jnp.ones((2, 8, 256, 128))}}}
    expected = jax.P(None, "expert", "fsdp", "tensor")
    specs = {"segment_0": {"experts": {"up": expected}}}
    factored = {jax.P(None, "expert", "fsdp"): 1, jax.P(None, "expert", "tensor"): 1}
    for name, counts in (("adamw", {expected: 2}), ("muon", {expected: 1}), ("adafactor", factored)):
        state = make_optimizer(dataclasses.replace(CONFIG, name=name), 10).init(parameters)
        found = jax.tree.leaves(optimizer_specs(parameters, specs, state), is_leaf=lambda leaf: isinstance(leaf, jax.P))
        assert {spec: found.count(spec) for spec in counts} == counts
        assert found.count(partition_specs.REPLICATED) == len(found) - sum(counts.values())


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.name='sgd': must be one of adamw, adafactor, muon, or module:f"):
        make_optimizer(dataclasses.replace(CONFIG, name="sgd"), 10)
    with pytest.raises(ConfigError, match=r"optimizer\.name='nowhere:at_all': no module 'nowhere'"):
        make_optimizer(dataclasses.replace(CONFIG, name="nowhere:at_all"), 10)
    for name, words in (("os:path", "TypeError: 'module' object is not callable"), ("builtins:max", "TypeError")):
        with pytest.raises(ConfigError, match=rf"optimizer\.name='{name}': calling it raises {words}"):
            make_optimizer(dataclasses.replace(CONFIG, name=name), 10)
    with pytest.raises(
        ConfigError, match=r"'builtins:print': must return an optax\.GradientTransformation, not NoneType"
    ):
        make_optimizer(dataclasses.replace(CONFIG, name="builtins:print"), 10)


@pytest.mark.parametrize(
    ("init", "update", "message"),
    [
        (lambda p: 1 / 0, lambda g, s, p=None: (g, s), "its init raises ZeroDivisionError"),
        (lambda p: "text", lambda g, s, p=None: (g, s), "its init raises TypeError"),
        (lambda p: jax.random.key(0), lambda g, s, p=None: (g, s), "its state holds key<fry>, must be of bool, int8"),
        (lambda p: (), lambda g, s, p=None: None, r"its update must return \(updates, state\), not NoneType"),
        (lambda p: (), lambda g, s, p=None: g["nothing"], "its update raises KeyError: 'nothing'"),
        (lambda p: (), lambda g, s, p=None: (jax.tree.map(jnp.sum, g), s), r"updates .* are float32\[\], not float32"),
        (lambda p: (), lambda g, s, p=None: ({}, s), "the updates that its update returns have another structure"),
        (lambda p: jnp.zeros(()), lambda g, s, p=None: (g, (s, s)), "the state .* have another structure"),
        (lambda p: jnp.zeros(()), lambda g, s, p=None: (g, s > 0), r"the state .* are bool\[\], not float32\[\]"),
    ],
)
def test_an_optimizer_that_cannot_update_is_refused(monkeypatch, init, update, message):
    module = types.ModuleType("failing_optimizers")
    vars(module)["make"] = lambda config, schedule: optax.GradientTransformation(init, update)
    monkeypatch.setitem(sys.modules, "failing_optimizers", module)
    config = dataclasses.replace(CONFIG, name="failing_optimizers:make", gradient_clip=0.0)
    parameters = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    with pytest.raises(ConfigError, match=rf"^optimizer\.name='failing_optimizers:make': .*{message}"):  # noqa: PT012
        optimizer = make_optimizer(config, 10)
        probe_own(config, optimizer, parameters, jax.eval_shape(optimizer.init, parameters))


def test_the_moving_average_of_the_weights_by_hand():
    """Decay 1/2: after two updates weights 1 and 3 count 1/4 and 1/2, divided by their sum: (0.25 + 1.5) / 0.75."""
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=0, ema_decay=0.5, frozen=("router",))
    averaging = _averaging(0.5)
    state = averaging.init({"w": jnp.zeros(1)})
    for weight, update in ((0.0, 1.0), (1.0, 2.0)):
        updates, state = averaging.update({"w": jnp.full(1, update)}, state, {"w": jnp.full(1, weight)})
        assert updates["w"] == update
    np.testing.assert_allclose(averaged_weights(config, (state,))["w"], 1.75 / 0.75, rtol=1e-6)
    # In the whole optimizer the average is of the updated weights, including those of frozen parts.
    optimizer = make_optimizer(config, 10)
    weights = {"router": {"kernel": jnp.ones((2, 2))}, "dense": {"up": jnp.ones((2, 2))}}
    state = optimizer.init(weights)
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, weights), state, weights, norm=jnp.ones(()))
    average = averaged_weights(config, state)
    after = optax.apply_updates(weights, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), average, after)
    assert (after["router"]["kernel"] == 1).all()
    assert (after["dense"]["up"] < 1).all()


@pytest.mark.parametrize("decay", [0.9, 0.99999, 0.999999])
def test_the_moving_average_of_constant_weights_is_constant(decay):
    averaging = _averaging(decay)
    weights, still = {"w": jnp.ones(1)}, {"w": jnp.zeros(1)}
    state = averaging.init(weights)
    for _ in range(3):
        _, state = averaging.update(still, state, weights)
        average = averaged_weights(dataclasses.replace(CONFIG, ema_decay=decay), (state,))
        np.testing.assert_allclose(average["w"], 1, rtol=1e-5)


def test_a_schedule_in_injected_hyperparameters_follows_the_step():
    optimizer = optax.chain(optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(1.0, 0.0, 10)))
    state = set_schedule_step(optimizer.init({"w": jnp.ones(1)}), jnp.asarray(4))
    updates, state = optimizer.update({"w": jnp.ones(1)}, state, {"w": jnp.zeros(1)})
    np.testing.assert_allclose(updates["w"], -0.6, rtol=1e-5)  # rate of step 4
    assert optax.tree_utils.tree_get(state, "mu")["w"] == pytest.approx(0.1)
    assert int(optax.tree_utils.tree_get(state[0].inner_state, "count", filtering=_of_adam)) == 1


def _of_adam(path, _):
    return "ScaleByAdamState" in str(path[-1])
