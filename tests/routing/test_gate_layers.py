"""MoE layers under each gate: router precision, broken logits, replayed routing, dropout, future leaks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Capacity, MeshConfig
from moe.config.registry import LAYERS
from moe.conformance.oracle_cases import ONE_GROUP
from moe.dispatch.modes import CONFIG_MODES
from moe.interop.layers import single_layer
from moe.layers.moe_layer import MoELayer
from moe.layers.router import Router
from moe.layers.soft_moe import expert_logits, slot_weights
from moe.layers.tokens import Keys
from moe.parallel.mesh import make_mesh
from moe.routing import balancing
from tests.helpers import random_model, routed, tiny_model


def test_the_router_rounds_only_when_asked(rng):
    x, logits = jnp.asarray(rng.normal(size=(1, 4, 16)), jnp.float32), {}
    for dtype in ("float32", "bfloat16"):
        config = tiny_model(gate="switch", router_dtype=dtype)
        router = Router(config, rngs=nnx.Rngs(0))
        logits[dtype] = np.asarray(router(x))
        assert logits[dtype].dtype == np.float32
    rounded = logits["bfloat16"].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(logits["bfloat16"], rounded)
    assert (logits["float32"] != rounded).all()
    np.testing.assert_allclose(logits["float32"], rounded, atol=0.05)


def test_broken_logits_are_counted_in_a_train_step_and_harm_no_other_token(rng):
    x = jnp.asarray(rng.normal(size=(1, 6, 4)), jnp.float32)
    weights = {
        "router": rng.normal(size=(4, 3)),
        "up": rng.normal(size=(3, 4, 5)),
        "gate_matrix": rng.normal(size=(3, 4, 5)),
        "down": rng.normal(size=(3, 5, 4)),
    }
    mask = jnp.ones((1, 6), bool)
    for mode in CONFIG_MODES:
        layer = single_layer("switch", **weights, capacity=Capacity(eval=3.0), dispatch=mode)

        @jax.jit
        def run(x, layer=layer):
            y, report, _ = layer(x, mask)
            return y, report.broken_tokens

        expected, _ = run(x)
        y, broken = run(x.at[0, 2].set(jnp.nan))
        assert float(broken) == 1
        others = np.arange(6) != 2
        np.testing.assert_allclose(y[0, others], expected[0, others], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(y[0, 2], np.zeros(4))


def test_each_kind_of_noise_has_a_key_of_its_own():
    keys = Keys.split(jax.random.key(0))
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == len(Keys._fields) == 4
    assert Keys.split(None) == (None,) * 4


def test_without_a_router_no_loss_is_counted_and_a_shared_expert_adds_nothing_to_padding():
    layer = MoELayer(tiny_model(gate="hash", num_experts=2, shared_d_ff=4), rngs=nnx.Rngs(0))
    mask = jnp.asarray([[True, True, False]])
    x, ids = jnp.ones((1, 3, layer.d_model)), jnp.zeros((1, 3), jnp.int32)
    y, report, _ = jax.jit(lambda x: layer(x, mask, token_ids=ids))(x)
    np.testing.assert_array_equal((y != 0).any(-1)[0], mask[0])
    losses = [*(getattr(report, name) for name in balancing.AUXILIARY), report.sums.counts, report.sums.probs]
    assert not any(np.any(loss) for loss in losses)
    assert (float(report.sums.tokens), float(report.expert_load.max())) == (2, 1)


def test_weights_of_slots_by_hand():
    """Two experts with two slots each, two tokens and one of padding: a softmax over tokens to fill a slot, and one
    over all four slots to mix their outputs."""
    logits = np.log([[[[4.0, 2.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]], [[9.0, 9.0], [9.0, 9.0]]]])
    logits = jnp.asarray(logits, jnp.float32)
    dispatch, combine = slot_weights(logits, jnp.asarray([[True, True, False]]))
    first = [[4 / 5, 2 / 3], [1 / 2, 1 / 2]]
    np.testing.assert_allclose(dispatch[0], [first, 1 - np.array(first), np.zeros((2, 2))], rtol=1e-6)
    np.testing.assert_allclose(
        combine[0], [[[4 / 8, 2 / 8], [1 / 8, 1 / 8]], np.full((2, 2), 1 / 4), np.zeros((2, 2))], rtol=1e-6
    )
    # An expert's probability is that of its slots together; one slot that is not finite breaks the token.
    np.testing.assert_allclose(jax.nn.softmax(expert_logits(logits))[0, 0], [6 / 8, 2 / 8], rtol=1e-6)
    logits = logits.at[0, 0, 0, 1].set(-jnp.inf)
    np.testing.assert_array_equal(jnp.isnan(expert_logits(logits)), [[[True, False], [False] * 2, [False] * 2]])
    nothing = slot_weights(logits, jnp.zeros((1, 3), bool))
    assert not any(weights.any() for weights in nothing)


def test_routing_is_recorded_and_replayed_under_another_mode_and_mesh(rng):
    """With other routers, another mode and eight devices, the recorded routing decides and the logits are equal."""
    config = tiny_model(
        gate="gshard", num_layers=3, first_dense=1, num_experts=8, d_model=16, num_kv_heads=4, eval_capacity_factor=0.5
    )
    model = random_model(config)
    tokens = jnp.asarray(rng.integers(0, 48, (8, 6)))

    @jax.jit
    def record(tokens):
        output = model(tokens, return_routing=True)
        return output.logits, output.routing, output.layers.fraction_tokens_dropped.mean()

    logits, routing, dropped = record(tokens)
    assert routing.expert_index.shape == (2, 8, 6, 2)
    assert 0 < float(dropped) < 1
    other = random_model(dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch="einsum")))
    # By itself this router would choose the two worst of eight experts instead of the two best.
    router = other.segment_1.block_0.moe.router
    router.kernel[...] = -router.kernel[...]
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    with jax.set_mesh(mesh):

        @jax.jit
        def replay(tokens, routing):
            output = other(tokens, routing=routing, return_routing=True)
            return output.logits, output.routing.expert_index

        replayed, index = replay(tokens, routing)
    np.testing.assert_allclose(replayed, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(index, routing.expert_index)


def test_replay_in_other_groups_is_refused(rng):
    layer = single_layer(
        "switch", router=np.ones((3, 2)), up=np.ones((2, 3, 3)), down=np.ones((2, 3, 3)), activation="relu"
    )
    routing = routed("switch", rng.normal(size=(2, 4, 2)), 1)
    with pytest.raises(ValueError, match="cannot be replayed"):
        layer(jnp.ones((2, 2, 3)), jnp.ones((2, 2), bool), routing=routing)


@pytest.mark.parametrize("mode", ["gather", "dropless"])
def test_expert_dropout_drops_hidden_activations_only_in_training(mode):
    # x = 1, up = 1: 4000 hidden units of 1, averaged by down with weights w_j = j/sum: y is the kept weight over 0.6.
    f = 4000
    down = np.arange(1, f + 1) / (f * (f + 1) / 2)
    weights = {"up": np.ones((1, 1, f)), "down": down[None, :, None], "router": np.zeros((1, 1))}
    layer = single_layer("switch", **weights, activation="relu", expert_dropout=0.4, dispatch=mode, jitter=0.0)
    x, mask, key = jnp.ones((1, 3, 1)), jnp.ones((1, 3), bool), jax.random.key(0)
    noisy = jax.jit(lambda x: layer(x, mask, train=True, rng=key)[0])(x)
    # Each weight is kept or not: variance 0.6·0.4·sum w²/0.36, sum w² = 4/3f.
    np.testing.assert_allclose(noisy, np.ones((1, 3, 1)), atol=5 * math.sqrt(0.24 / 0.36 * 4 / (3 * f)))
    assert len(np.unique(noisy)) == 3, "each token draws its own"
    quiet = jax.jit(lambda x: layer(x, mask, rng=key)[0])(x)
    np.testing.assert_allclose(quiet, np.ones((1, 3, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("gate", "leaks"), [("expert_choice", True), ("soft_moe", True), ("switch", False), ("deepseek_v3", False)]
)
def test_who_looks_ahead(gate, leaks, rng):
    """Changing the last token changes an earlier one's output exactly under the gates that need accept_future_leak."""
    assert LAYERS[gate].gate.looks_ahead == leaks
    soft = gate == "soft_moe"
    weights = {
        "router": rng.normal(size=(4, 4, 1) if soft else (4, 4)) * 2,
        "up": rng.normal(size=(4, 4, 5)),
        "gate_matrix": rng.normal(size=(4, 4, 5)),
        "down": rng.normal(size=(4, 5, 4)),
    }
    section = {"name": gate} | (ONE_GROUP["gate"] | {"k": 2} if gate == "deepseek_v3" else {})
    layer = single_layer(section, **weights, capacity={"eval": 1.0}, accept_future_leak=True, dispatch="einsum")
    if not leaks:
        layer.config = dataclasses.replace(layer.config, capacity=Capacity(eval=4.0))
    x = jnp.asarray(rng.normal(size=(1, 8, 4)), jnp.float32)
    run = jax.jit(lambda x: layer(x, jnp.ones((1, 8), bool))[0])
    changed = max(
        float(jnp.abs(run(x)[0, :-1] - run(x.at[0, -1].set(jnp.asarray(last)))[0, :-1]).max())
        for last in rng.normal(size=(4, 4)) * 3
    )
    assert (changed > 1e-4) == leaks
