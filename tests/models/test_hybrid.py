"""Models of gated DeltaNet and gated attention: packed documents, generation, 8 devices, optimizers, refusals."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import (
    Config,
    ConfigError,
    DataConfig,
    DeltaNetConfig,
    LoraConfig,
    MeshConfig,
    TrainConfig,
    layer_kinds,
    validate_mesh,
)
from moe.config.mixers import GatedDelta, GroupedQuery
from moe.models import sampling, speculation
from moe.models.adapters import initial_adapters
from moe.models.factory import abstract_model
from moe.models.segments import part_of, segments
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings
from moe.training.optimizer import decay_mask, make_optimizer
from tests.helpers import random_parameters, tiny_model
from tests.models.test_generate import GREEDY, PROMPTS, _without_cache

DELTA = DeltaNetConfig(key_heads=2, value_heads=4, key_dim=4, value_dim=5, conv_width=3)
NEW = {"pattern": "delta attention", "delta_net": DELTA, "gated_attention": True, "zero_centred_norms": True}
NEW |= {"rope_dim": 2, "qk_norm": "head"}


def _hybrid(**changes):
    return tiny_model(
        **{"num_layers": 4, "dispatch": "einsum", "eval_capacity_factor": 2.0, "gate": "mixtral", **NEW, **changes}
    )


@functools.cache
def _case():
    """A model, its parameters, and its logits as a compiled function."""
    config = _hybrid(shared_d_ff=8, shared_gate=True)
    graphdef, parameters = random_parameters(config)

    @jax.jit
    def logits(parameters, tokens, segment_ids, positions):
        return nnx.merge(graphdef, parameters)(tokens, segment_ids, positions).logits

    return config, graphdef, parameters, logits


def test_layers_are_stacked_in_pairs():
    kinds = layer_kinds(_case()[0])
    assert [type(kind.mixer) for kind in kinds] == [GatedDelta, GroupedQuery] * 2
    assert [(len(unit), repeats) for unit, repeats in segments(kinds)] == [(2, 2)]
    windowed = layer_kinds(_hybrid(pattern="delta sliding", sliding_window=3))
    assert [kind.window for kind in windowed] == [0, 3, 0, 3]


def test_packed_documents_are_as_if_alone(rng):
    """Two documents and padding in one row equal each document in a separate row with padding before or after it."""
    _, _, parameters, logits = _case()
    first, second = rng.integers(1, 48, 5), rng.integers(1, 48, 7)
    tokens = np.zeros((3, 14), np.int32)
    tokens[0, :12], tokens[1, :5], tokens[2, 7:] = [*first, *second], first, second
    segment_ids = np.array([[1] * 5 + [2] * 7 + [0] * 2, [1] * 5 + [0] * 9, [0] * 7 + [1] * 7])
    columns = np.arange(14)
    positions = np.array([[*range(5), *range(7), 0, 0], columns, np.maximum(columns - 7, 0)])
    found = np.asarray(logits(parameters, tokens, segment_ids, positions))
    np.testing.assert_allclose(found[0, :5], found[1, :5], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[0, 5:12], found[2, 7:], rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(found))


def test_greedy_text_with_state_equals_that_without():
    config = _hybrid(num_layers=2, gate="none")
    _, parameters = random_parameters(config)
    texts = sampling.sample(config, parameters, PROMPTS, 6, GREEDY)
    np.testing.assert_array_equal(texts, _without_cache(config, parameters, PROMPTS, 6))


@pytest.mark.slow
def test_eight_devices_have_the_values_and_gradients_of_one(rng):
    """Rows over fsdp, heads over tensor, remat. Normalising short queries and keys amplifies rounding: parameters that
    differ in their last bit change a gradient as much as a mesh may. A layer by itself is within 1e-5
    (tests/layers/test_gated_delta_net.py)."""
    config = dataclasses.replace(_case()[0], remat="attention")
    graphdef, parameters = random_parameters(config)
    tokens = jnp.asarray(rng.integers(1, 48, (4, 10)), jnp.int32)
    segment_ids = jnp.asarray([[1] * 4 + [2] * 6, [1] * 10, [1] * 7 + [2] * 3, [1] * 8 + [0] * 2])

    def loss(parameters, tokens, segment_ids):
        output = nnx.merge(graphdef, parameters)(tokens, segment_ids, train=True)
        return jnp.mean(jax.nn.logsumexp(output.logits, axis=-1) * (segment_ids > 0))

    program = jax.jit(jax.value_and_grad(loss))
    want = program(parameters, tokens, segment_ids)

    def last_bit(parameter):
        return parameter * jnp.asarray(1 + 2.0**-24 * rng.choice([-1, 2], parameter.shape), jnp.float32)

    nearby = [program(jax.tree.map(last_bit, parameters), tokens, segment_ids) for _ in range(4)]
    rounding = max(max(map(_error, jax.tree.leaves(each), jax.tree.leaves(want))) for each in nearby)
    assert rounding < 1e-3
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    state = nnx.state(nnx.eval_shape(lambda: nnx.merge(graphdef, parameters)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(parameters, parameter_shardings(mesh, state))
        query = placed["segment_0"]["block_0"]["delta_net"]["query"]
        assert query.sharding.shard_shape(query.shape) == (2, 4, 1, 4)  # [L,D,M,H]: D over fsdp, M over tensor
        rows = jax.device_put((tokens, segment_ids), partition_specs.shardings(mesh, (partition_specs.BATCH,) * 2))
        got = program(placed, *rows)
    for path, theirs in jax.tree_util.tree_leaves_with_path(want):
        ours = functools.reduce(lambda node, key: node[getattr(key, "key", getattr(key, "idx", None))], path, got)
        assert np.abs(theirs).max() > 0, path
        assert _error(ours, theirs) < 2 * rounding, path


def _error(ours, theirs):
    """Largest difference, relative to the largest value."""
    return float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs)))


def test_parts_adapters_and_optimizers_cover_delta_net_parameters():
    config, _, parameters, _ = _case()
    state = nnx.state(nnx.eval_shape(lambda: nnx.merge(_case()[1], parameters)))
    layer = parameters["segment_0"]["block_0"]["delta_net"]
    assert {part_of(("segment_0", "block_0", "delta_net", name)) for name in layer} == {"attention"}
    adapters = initial_adapters(state, LoraConfig(rank=2), jax.random.key(0))
    adapted = nnx.to_pure_dict(adapters)["segment_0"]["block_0"]["delta_net"]
    assert set(adapted) == {"query", "key", "value", "gate", "beta", "decay", "out"}
    kept = {"log_decay_scale", "decay_bias", "query_conv", "key_conv", "value_conv"}  # vectors, as in muP's table
    decays = decay_mask(parameters)["segment_0"]["block_0"]["delta_net"]
    assert {name for name, leaf in decays.items() if leaf is False} == kept
    assert not decays["norm"]["scale"]
    optimizer = make_optimizer(dataclasses.replace(Config().optimizer, name="muon"), 1000)
    moments = jax.eval_shape(optimizer.init, parameters)
    sizes = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(moments) if "delta_net" in str(path)}
    assert {"query", "gate", "out", "query_conv", "log_decay_scale", "beta"} <= sizes
    assert config.delta_net == DELTA


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig(objective="prefix_lm")}, r"model.pattern='delta attention': must be '' where data"),
    ],
)
def test_impossible_runs(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config(model=_hybrid(), **changes)


def test_meshes_that_cannot_split_a_delta_net_are_refused():
    config = Config(model=_hybrid(group_size=64), train=TrainConfig(batch_size=2, sample_tokens=0, num_steps=200))
    with pytest.raises(ConfigError, match=r"model.pattern='delta attention': must be '' with mesh.context=4"):
        validate_mesh(config, {"data": 2, "fsdp": 1, "expert": 1, "tensor": 1, "context": 4})
    wide = dataclasses.replace(config, model=_hybrid(delta_net=dataclasses.replace(DELTA, key_heads=1)))
    sizes = {"data": 2, "fsdp": 1, "expert": 1, "tensor": 2}
    with pytest.raises(ConfigError, match=r"model.delta_net.key_heads=1: must be divisible by mesh.tensor = 2"):
        validate_mesh(wide, sizes)
    unused = dataclasses.replace(wide.model, pattern="")
    validate_mesh(dataclasses.replace(config, model=unused), sizes)


def test_a_multi_token_prediction_layer_has_the_mixer_of_the_last_layer():
    config = _hybrid(num_layers=3, pattern="delta attention delta", prediction_layers=1)
    graphdef, state = nnx.split(abstract_model(config))
    variables, tokens = nnx.to_pure_dict(state), jax.ShapeDtypeStruct((2, 6), jnp.int32)
    assert "delta_net" in variables["prediction"]["block"]
    output = jax.eval_shape(lambda v, tokens: nnx.merge(graphdef, v)(tokens, train=True), variables, tokens)
    assert [hidden.shape for hidden in output.report.handed["prediction"]] == [(2, 6, 16)]


def test_drafts_are_refused():
    config = _hybrid(prediction_layers=1)
    with pytest.raises(ConfigError, match=r"model.pattern=.*must be '' to draft tokens"):
        speculation.sample(config, {}, [[1]], 2)
