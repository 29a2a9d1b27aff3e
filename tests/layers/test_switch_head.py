"""Attention whose value and output projections are experts of each head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Config, ConfigError, MeshConfig, ModelConfig, TrainConfig
from moe.config.mixers import SwitchHead
from moe.config.registry import find_mixer
from moe.interop.config_json import write_config
from moe.layers.inputs import Rows
from moe.layers.mixers.switch_head import SwitchHeadAttention
from moe.models import flops
from moe.models.factory import abstract_parameters
from moe.models.segments import part_of
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings
from moe.training import update
from tests.helpers import random_parameters, slow_case, tiny_model

SMALL = SwitchHead(heads=2, head_dim=4, experts=3, k=2)
IDS = np.asarray([[1, 1, 0], [1, 2, 2], [1, 1, 1], [1, 0, 0]])
POSITIONS = np.asarray([[0, 1, 0], [0, 0, 1], [0, 1, 2], [0, 0, 0]])


def rows_of(ids, positions):
    return Rows(jnp.ones_like(ids), jnp.asarray(ids), jnp.asarray(positions))


def test_one_token_by_hand():
    """One token sees itself, so y = s'·s·x V O. As a key: logits (0, ln 3), sigmoids (1/2, 3/4), expert 1, and
    v = 3/4 · (1, 0) [[2, 0], [0, 0]] = (3/2, 0). As a query: logits (0, -ln 3), sigmoids (1/2, 1/4), expert 0, and
    y = 1/2 · (3/2, 0) [[0, 4], [0, 0]] = (0, 3). Balance losses: E · f · P of the chosen, P = 3/4 / (5/4) and
    1/2 / (3/4), so 2 · 3/5 and 2 · 2/3."""
    config = ModelConfig(d_model=2)
    mixer = SwitchHead(heads=1, head_dim=2, experts=2, k=1, balance=0.5)
    layer = SwitchHeadAttention(config, mixer, rngs=nnx.Rngs(0))
    layer.value_router[...] = jnp.asarray([[[0, np.log(3)]], [[9, 9]]], jnp.float32)  # [D,N,E]
    layer.out_router[...] = jnp.asarray([[[0, -np.log(3)]], [[9, 9]]], jnp.float32)
    layer.value[...] = jnp.zeros((2, 1, 2, 2)).at[0, 0, 1, 0].set(2).at[0, 0, 0].set(7)  # [D,N,E,H]
    layer.out[...] = jnp.zeros((1, 2, 2, 2)).at[0, 0, 0, 1].set(4).at[0, 1].set(7)  # [N,E,H,D]
    x, rows = jnp.asarray([[[1.0, 0.0]]]), rows_of(np.ones((1, 1), int), np.zeros((1, 1), int))

    @nnx.jit
    def run(layer, x):
        heads, _ = layer.prefill(x, rows)
        return heads, layer.join(heads, x), layer.report(x, rows)

    heads, joined, report = run(layer, x)
    np.testing.assert_allclose(heads, [[[[1.5, 0.0]]]], rtol=1e-6)
    np.testing.assert_allclose(joined, [[[0.0, 3.0]]], rtol=1e-6)
    np.testing.assert_array_equal(report.expert_load, [[0, 1], [1, 0]])  # as a key, as a query
    np.testing.assert_allclose(report.load_balancing_loss, [1.2, 4 / 3], rtol=1e-6)
    np.testing.assert_allclose(report.sparsity_penalty, [0.6, 2 / 3], rtol=1e-6)


def decide(weights, x):
    """Experts [B,T,N,K] of both routers, by name."""
    return {
        name: np.argsort(-np.einsum("btd,dne->btne", x, weights[name]), axis=-1, kind="stable")[..., : SMALL.k]
        for name in ("value_router", "out_router")
    }


def oracle(weights, x, experts):
    """y of every token, in loops over rows, tokens, heads and the experts that were chosen; differentiable."""

    def rotated(vector, position):  # pairs (i, i + H/2), base 10,000
        half = vector.shape[0] // 2
        angle = position * 10_000.0 ** (-np.arange(half) / half)
        a, b = vector[:half], vector[half:]
        return jnp.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    def mixed(router, b, t, n, matrices, vector):
        scores = 1 / (1 + jnp.exp(-x[b, t] @ weights[router][:, n]))
        return sum(scores[e] * (vector @ matrices(e)) for e in experts[router][b, t, n])

    def output(b, t):
        total, seen = jnp.zeros(x.shape[-1]), [u for u in range(t + 1) if IDS[b, u] == IDS[b, t]]
        for n in range(SMALL.heads):
            q = rotated(x[b, t] @ weights["query"][:, n], POSITIONS[b, t])
            keys = [rotated(x[b, u] @ weights["key"][:, n], POSITIONS[b, u]) for u in seen]
            shares = jax.nn.softmax(jnp.stack([q @ k for k in keys]) / SMALL.head_dim**0.5)
            values = [mixed("value_router", b, u, n, lambda e, n=n: weights["value"][:, n, e], x[b, u]) for u in seen]
            head = sum(share * v for share, v in zip(shares, values, strict=True))
            total += mixed("out_router", b, t, n, lambda e, n=n: weights["out"][n, e], head)
        return total

    real = {(b, t): output(b, t) for b, t in zip(*np.nonzero(IDS), strict=True)}
    return jnp.zeros_like(x).at[tuple(np.asarray(list(real)).T)].set(jnp.stack(list(real.values())))


def test_it_equals_the_loops_in_values_and_gradients_alone_and_on_eight_devices(rng):
    layer = SwitchHeadAttention(ModelConfig(d_model=8), SMALL, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    shapes = {name: array.shape for name, array in nnx.to_pure_dict(state).items()}
    weights = {name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32) for name, shape in shapes.items()}
    x, cotangent = jnp.asarray(rng.normal(size=(2, *IDS.shape, 8)), jnp.float32)

    def loss(weights, x):
        own, rows = nnx.merge(graphdef, weights), rows_of(IDS, POSITIONS)
        y = own.join(own.prefill(x, rows)[0], x) * (IDS > 0)[..., None]
        return jnp.sum(y * cotangent), y

    def exact(weights, x):
        y = oracle(weights, x, experts)
        return jnp.sum(y * cotangent), y

    experts = decide(weights, x)
    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    alone, expected = run(weights, x), jax.jit(jax.grad(exact, (0, 1), has_aux=True))(weights, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), alone, expected)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in expected[0][0].values())
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, parameter_shardings(mesh, state))
        assert placed["value"].sharding.shard_shape(shapes["value"]) == (2, 1, 3, 4)  # D over 4 devices, N over 2
        spread = run(placed, jax.device_put(x, partition_specs.shardings(mesh, partition_specs.BATCH)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), spread, alone)


def test_a_token_after_a_prompt_equals_the_last_of_a_row(rng):
    config = ModelConfig(d_model=8)
    layer = SwitchHeadAttention(config, SMALL, rngs=nnx.Rngs(0))
    x, ids = jnp.asarray(rng.normal(size=(1, 4, 8)), jnp.float32), np.ones((1, 4), int)
    positions = np.arange(4)[None]

    @nnx.jit
    def heads_of_last(layer, x):
        expected, _ = layer.prefill(x, rows_of(ids, positions))
        state = jax.tree.map(lambda leaf: leaf[0], SwitchHeadAttention.empty_state(config, SMALL, (1, 1), 4))
        _, found = layer.prefill(x[:, :3], rows_of(ids[:, :3], positions[:, :3]))
        state = layer.fill(state, found, jnp.asarray([3]))
        return layer.step(x[:, 3:], rows_of(ids[:, 3:], positions[:, 3:]), state)[0], expected

    heads, expected = heads_of_last(layer, x)
    np.testing.assert_allclose(heads, expected[:, 3:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gate", ["none", slow_case("mixtral")])
def test_a_model_reports_its_routers_and_the_objective_gets_their_losses(gate, rng):
    """Two layers of four routers; the second of two equal microbatches is half of the objective."""
    mixer = dataclasses.replace(SMALL, balance=0.25, z=0.125)
    config = Config(model=tiny_model(mixer=mixer, gate=gate), train=TrainConfig(batch_size=4, accumulation_steps=2))
    graphdef, variables = random_parameters(config.model)
    ids = jnp.asarray(rng.integers(0, 48, (2, 5)), jnp.int32)
    model = nnx.merge(graphdef, variables)
    output = model(ids, train=True)
    metrics = output.report.metrics
    assert metrics["mixer_expert_load"].shape == (8, 3)
    np.testing.assert_allclose(metrics["mixer_expert_load"].sum(-1), 1, rtol=1e-6)
    batch = {"tokens": ids, "targets": ids, "segment_ids": jnp.ones_like(ids)}
    unread: Any = None
    parts = update.Parts(config, graphdef, graphdef, unread, unread, config.objective)
    without = output.report.losses.keys() - {"mixer"}
    kept = output.report.replace(losses={name: output.report.losses[name] for name in without})
    (with_routers, (_, report)), (others, _) = (
        update._loss(parts, model, one, batch, jnp.asarray(20))
        for one in (output, dataclasses.replace(output, report=kept))
    )
    losses = 0.25 * metrics["mixer_load_balancing_loss"] + 0.125 * metrics["mixer_router_z_loss"]
    np.testing.assert_allclose(with_routers - others, losses.sum() / 2, rtol=1e-4)
    assert report.metrics.keys() == metrics.keys()


def test_it_is_counted_by_hand():
    """D 16, N 2, H 4, E 3: queries and keys 2 · 16·2·4 = 256, values and outputs 2 · 3·16·2·4 = 768, two routers of
    16·2·3 = 96 each, 1216 in each of two layers. Scores of a row of 7: 6 · N · 2H · (7 + 1)/2 = 384 a layer."""
    config = tiny_model(mixer=SMALL, gate="none", tie_embeddings=True)
    (total, active), (_, plain) = (
        flops.count_parameters(c) for c in (config, tiny_model(gate="none", tie_embeddings=True))
    )
    attention = 16 * 4 * 6 * 2 + 16 * 2 * 6 * 2  # of tiny_model: queries and outputs of 4 heads, keys and values of 2
    assert total == active == plain + 2 * (1216 - attention)
    assert flops.train_flops_per_token(config, 7) == 6 * active + 2 * 384
    parameters = nnx.to_pure_dict(abstract_parameters(config))
    paths = [[key.key for key in path] for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
    assert {part_of(path) for path in paths if "mixer" in path} == {"attention"}


def test_the_name_gives_it_and_what_it_lacks_is_refused():
    assert find_mixer("switch_head") == SwitchHead(heads=4, head_dim=100, experts=4, k=2, score="sigmoid")
    for wrong, message in (
        ({"k": 4}, r"model\.mixer\.k=4: must be at most experts=3"),
        ({"head_dim": 5}, r"model\.mixer\.head_dim=5: must be even"),
        ({"k": 1, "renormalise": True}, r"model\.mixer\.k=1: must be above 1 with renormalise"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(SMALL, **wrong)
    with pytest.raises(
        ConfigError, match=r"model\.mixer='switch': must be one of none, switch_head, kimi_delta, or module:object"
    ):
        find_mixer("switch")
    with pytest.raises(ConfigError, match=r"prediction_layers=1: must be 0 where model\.mixer='switch_head' is set"):
        tiny_model(mixer=SMALL, prediction_layers=1)
    with pytest.raises(ConfigError, match=r"no open architecture computes this model: .* lacks .*model\.mixer"):
        write_config(Config(model=tiny_model(mixer=SMALL)))
