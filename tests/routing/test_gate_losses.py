"""Balancing losses of the gates, and the selection bias of DeepSeek-V3."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Config, Losses, ModelConfig, MoEConfig, changes_of, validate_mesh
from moe.config.parse import from_config_dict
from moe.config.registry import LAYERS
from moe.layers.moe_layer import MoELayer
from moe.layers.router import SelectionBias
from moe.models.segments import selection_biases
from moe.parallel.mesh import make_mesh
from moe.routing import balancing
from moe.routing.balancing_rules import Sign
from moe.routing.gates import TopK
from moe.training.batches import place
from moe.training.step import build
from tests.gate_helpers import LOGITS, SIGMOID_LOGITS, SIGMOIDS, load_balancing_loss
from tests.helpers import random_state, routed, set_moe, slow_case, tiny_model

load_loss = jax.jit(balancing.load_loss)

# --- Losses ----------------------------------------------------------------------------------------------------------


def test_importance_and_load_loss_by_hand():
    # Weights given: expert 0 6/9 + 9/13·0, ... : G = (6/9, 3/9, 0, 0) and (0, 0, 9/13, 4/13).
    routing = routed("noisy_topk", LOGITS, 2)
    importance = np.array([6 / 9, 3 / 9, 9 / 13, 4 / 13])
    expected = importance.var() / importance.mean() ** 2
    assert float(jax.jit(balancing.importance_loss)(routing)) == pytest.approx(expected, rel=1e-5)
    mask = jnp.ones((1, 2), bool)
    assert float(load_loss(routing, mask)) == pytest.approx(0.0, abs=1e-6)  # each expert once
    smooth = jnp.asarray([[[0.9, 0.1, 0.0, 0.0], [0.7, 0.3, 0.0, 0.0]]])
    load = np.array([1.6, 0.4, 0, 0])
    routing = dataclasses.replace(routing, smooth_load=smooth)
    assert float(load_loss(routing, mask)) == pytest.approx(load.var() / load.mean() ** 2, rel=1e-5)
    half = load_loss(routing, jnp.asarray([[True, False]]))
    assert float(half) == pytest.approx(np.var([0.9, 0.1, 0, 0]) / 0.0625, rel=1e-5)


def test_deepseek_v3_balance_loss_counts_the_top_scores_without_bias_and_groups():
    # Scores (0.8, 0.5, 0.6, 0.2) and (0.1, 0.3, 0.4, 0.9), K = 1. The bias sends both tokens to expert 1, but the
    # scores alone choose experts 0 and 3 (DeepSeek-V3 2024, equation 18): f = (1/2, 0, 0, 1/2).
    routing = routed("deepseek_v3", SIGMOID_LOGITS, 1, selection_bias=jnp.asarray([0.0, 9.0, 0.0, 0.0]))
    np.testing.assert_array_equal(routing.expert_index, [[[1], [1]]])
    p = (SIGMOIDS / SIGMOIDS.sum(-1, keepdims=True))[0].mean(0)
    mask = jnp.ones((1, 2), bool)
    loss = load_balancing_loss(routing, mask, counts=LAYERS["deepseek_v3"].losses.counts)
    assert float(loss) == pytest.approx(4 * (p[0] + p[3]) / 2, rel=1e-6)
    assert float(load_balancing_loss(routing, mask)) == pytest.approx(4 * p[1], rel=1e-6)
    # Of groups (0, 1) and (2, 3) token 0 keeps the first, token 1 the second; the scores alone take 0 and 2, 3 and 2.
    limited = routed("deepseek_v3", SIGMOID_LOGITS, 2, groups=2, kept_groups=1)
    np.testing.assert_array_equal(limited.expert_index, [[[0, 1], [3, 2]]])
    loss = load_balancing_loss(limited, mask, counts="top_scores")
    assert float(loss) == pytest.approx(4 * (p[0] / 4 + p[2] / 2 + p[3] / 4), rel=1e-6)


def grouped_report(routing, groups):
    mask = jnp.ones(routing.chosen.shape[:2], bool)
    return jax.jit(functools.partial(balancing.report, expert_groups=groups))(routing, mask, routing.chosen)


def test_device_balance_by_hand():
    # Top-1 of (6, 3, 1, 2)/12 and (1, 2, 9, 4)/16: f = (1/2, 0, 1/2, 0); P = mean. Two groups of two experts.
    routing = routed("switch", LOGITS, 1)
    p = (np.array([6, 3, 1, 2]) / 12 + np.array([1, 2, 9, 4]) / 16) / 2
    expected = 2 * (0.5 * (p[0] + p[1]) + 0.5 * (p[2] + p[3]))
    report = grouped_report(routing, 2)
    assert float(report.device_balance_loss) == pytest.approx(expected, rel=1e-6)
    collapsed = np.broadcast_to([100.0, 0, 0, 0], (1, 8, 4))
    for groups in (1, 2, 4):
        routing = routed("switch", collapsed, 1)
        report = grouped_report(routing, groups)
        assert float(report.device_balance_loss) == pytest.approx(groups, rel=1e-5)


def test_a_layers_gate_without_groups_has_no_device_loss():
    """Over one group the loss is always 1: a constant to which the other layers' loss would be added."""
    losses = Losses(device=0.05)
    moe = MoEConfig(gate=TopK(k=2, groups=4, kept_groups=2), losses=losses, layer_gates=(TopK(k=2),))
    layer = MoELayer(ModelConfig(d_model=8, d_ff=8, moe=moe), gate=moe.layer_gates[0], rngs=nnx.Rngs(0))
    report = jax.jit(lambda x: layer(x)[1])(jax.random.normal(jax.random.key(0), (1, 8, 8)))
    assert float(report.device_balance_loss) == 0


@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (4, 2)])
def test_scopes_of_the_load_balancing_loss(shape):
    """Two rows of four, each collapsed onto a different expert: balanced over the batch, E = 2 within a row."""
    groups, rows = shape[0], 2
    logits = np.repeat(100 * np.eye(2), 4, axis=0).reshape(*shape, 2)
    per_group = 1.0 if groups == 1 else 2.0
    for parts, expected in ((1, 1.0), (groups, per_group), (rows, 2.0)):
        loss = load_balancing_loss(routed("switch", logits, 1), jnp.ones(shape, bool), parts=parts)
        assert float(loss) == pytest.approx(expected, rel=1e-5), parts
        # If the second row is padding, the mean leaves it out.
        mask = np.arange(8).reshape(shape) < 4
        loss = load_balancing_loss(routed("switch", logits, 1, mask), jnp.asarray(mask), parts=parts)
        assert float(loss) == pytest.approx(2.0, rel=1e-5), parts


@pytest.mark.parametrize(("scope", "parts"), [("batch", 1), ("group", 4), ("sequence", 2)])
def test_a_layer_computes_the_loss_over_its_scope(scope, parts, monkeypatch):
    """Two rows of eight in groups of four."""
    config = tiny_model(gate="switch", balance_scope=scope, group_size=4)
    asked, report = [], balancing.report
    monkeypatch.setattr(balancing, "report", lambda *a, parts, **k: asked.append(parts) or report(*a, parts=parts, **k))
    x = jax.ShapeDtypeStruct((2, 8, config.d_model), jnp.float32)
    jax.eval_shape(lambda x: MoELayer(config, rngs=nnx.Rngs(0))(x, jnp.ones((2, 8), bool))[1], x)
    assert asked == [parts]


def test_sequence_loss_of_deepseek_v3_by_hand():
    """Equations 17-20 for one sequence of two tokens: f_i = E/(K·T)·count, P_i = mean of s/sum s; the loss is Σ f_i
    P_i."""
    routing = routed("deepseek_v3", SIGMOID_LOGITS, 2)
    shares = SIGMOIDS / SIGMOIDS.sum(-1, keepdims=True)
    counts = np.array([1, 0, 2, 1])
    expected = float((4 / (2 * 2) * counts * shares[0].mean(0)).sum())
    loss = load_balancing_loss(routing, jnp.ones((1, 2), bool))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


# --- Loss-free balancing ---------------------------------------------------------------------------------------------


def test_next_selection_bias_by_hand():
    bias = Sign(0.01).next_state(jnp.asarray([0.1, 0.0, -0.1]), jnp.asarray([-1.0, 0.0, 1.0]))
    np.testing.assert_allclose(bias, [0.09, 0.0, -0.09], atol=1e-6)


def test_loss_free_balancing_balances(rng):
    """The bias by itself brings a router that prefers expert 0 to balance."""
    logits = jnp.asarray(rng.normal(size=(1, 512, 4)) + np.array([1.5, 0, 0, -1]), jnp.float32)

    @jax.jit
    def step(bias):
        routing = routed("deepseek_v3", logits, 1, selection_bias=bias)
        report = balancing.report(routing, jnp.ones((1, 512), bool), routing.chosen)
        return Sign(0.01).next_state(bias, Sign(0.01).signal(report, 1)), report.expert_load

    bias, first = step(jnp.zeros(4))
    for _ in range(100):
        bias, last = step(bias)
    assert float(balancing.max_violation(first)) > 1
    assert float(balancing.max_violation(last)) < 0.2


def _program(gate, mesh=None, **moe):
    config = Config()
    tree = changes_of(config)
    set_moe(tree, gate=gate, **moe)
    sizes = {"vocab_size": 48, "d_model": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    for name, value in sizes.items():
        tree.model[name] = value
    tree.model.d_ff = tree.model.moe.d_ff = 16
    tree.data.sequence_length, tree.train.batch_size = 8, 8
    for axis, size in (mesh or {"data": 1}).items():
        tree.mesh[axis] = size
    config = from_config_dict(tree)
    devices = math.prod((mesh or {"data": 1}).values())
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    validate_mesh(config, mesh.shape)
    return build(config, mesh)


def _batch(program, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 48, (8, 9)).astype(np.int32)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((8, 8), np.int32)}
    rows["positions"] = np.broadcast_to(np.arange(8, dtype=np.int32), (8, 8))
    return place(rows, program.mesh)


@pytest.mark.parametrize(
    ("mesh", "dispatch"),
    [
        ({"data": 2}, "einsum"),
        slow_case({"data": 2, "expert": 2}, "einsum"),
        slow_case({"data": 2, "expert": 2}, "gather"),
    ],
)
def test_train_step_moves_the_bias_by_the_load_and_nothing_else_does(mesh, dispatch, tmp_path):
    """On a mesh, over a pattern of dense and sparse layers; the bias is also restored from a checkpoint."""
    import orbax.checkpoint as ocp

    program = _program(
        "deepseek_v3",
        mesh,
        num_experts=8,
        every=1,
        first_dense=1,
        experts_per_token=2,
        expert_groups=4,
        kept_expert_groups=2,
        bias_update_rate=0.125,
        dispatch=dispatch,
    )
    with jax.set_mesh(program.mesh):
        state = random_state(program)
        assert not any("bias" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer))
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.biases))
        state, metrics = program.train_step(state, _batch(program))
        load = np.asarray(metrics.layers.expert_load)
        expected = selection_biases(
            program.config.model, jnp.asarray(0.125 * np.sign(load.mean(-1, keepdims=True) - load))
        )
        assert len(jax.tree.leaves(state.biases)) == 1
        assert jax.tree.leaves(state.biases)[0].shape == (1, 8)
        jax.tree.map(np.testing.assert_allclose, state.biases, expected)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", program.state)
        jax.tree.map(np.testing.assert_array_equal, restored.biases, state.biases)
        # The model uses it: the same step from the same parameters with this bias sends tokens to other experts.
        _, moved = program.train_step(
            dataclasses.replace(random_state(program), biases=restored.biases), _batch(program)
        )
        assert np.abs(np.asarray(moved.layers.expert_load) - load).max() > 0.01


def test_only_deepseek_v3_has_a_selection_bias():
    for gate, count in (("deepseek_v3", 1), ("switch", 0)):
        model = nnx.eval_shape(
            lambda gate=gate: MoELayer(tiny_model(gate=gate, num_experts=8, experts_per_token=2), rngs=nnx.Rngs(0))
        )
        assert len(jax.tree.leaves(nnx.state(model, SelectionBias))) == count
