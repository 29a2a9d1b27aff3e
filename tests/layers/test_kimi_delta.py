"""Kimi delta attention: its equation by hand and in float64, packed documents, its state, and a mesh of 8 devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import ConfigError, MeshConfig, ModelConfig
from moe.config.mixers import KimiDelta
from moe.layers.inputs import Rows
from moe.layers.mixers.kimi_delta import (
    CHUNK,
    KimiDeltaAttention,
    decayed_products,
    kimi_delta_rule,
)
from moe.models import flops, sampling
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings
from tests.helpers import random_parameters, tiny_model
from tests.models.test_generate import GREEDY, PROMPTS, _without_cache

MIXER = KimiDelta(heads=2, dim=4, conv_width=3)
CONFIG = ModelConfig(d_model=12, mixer=MIXER)


def test_two_tokens_by_hand():
    """k = (1, 0), v = (4, 2), beta = 1/2: S = [[2, 1], [0, 0]]. Then the channels decay by 1/2 and 1/4, to
    [[1, 1/2], [0, 0]], which holds (.6, .3) for k = (.6, .8). With v = (1.6, .3) and beta = 1, S gains k (1, 0)^T and
    is [[1.6, 1/2], [.8, 0]]. The query (1, 0) reads (1.6, 1/2) and (0, 1) reads (.8, 0), both over sqrt(2)."""

    def tokens(*rows):
        return jnp.asarray(rows, jnp.float32)[None, :, None]

    key, value = tokens([1, 0], [0.6, 0.8]), tokens([4, 2], [1.6, 0.3])
    decay, beta = jnp.log(tokens([0.3, 0.7], [0.5, 0.25])), jnp.asarray([0.5, 1.0])[None, :, None]
    for query, read in (([3, 0], [1.6, 0.5]), ([0, 2], [0.8, 0])):
        y, memory = kimi_delta_rule(tokens([1, 0], query), key, value, decay, beta, jnp.ones((1, 2), jnp.int32))
        np.testing.assert_allclose(memory[0, 0], [[1.6, 0.5], [0.8, 0]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(y[0, 1, 0], np.asarray(read) / 2**0.5, rtol=1e-5, atol=1e-6)


def test_products_of_strong_decays_keep_their_digits(rng):
    """exp(sum up to i) exp(-sum up to j) would be 0 times infinity after 5 tokens that decay by exp(-20)."""
    x, y = rng.normal(size=(2, 8, 3))
    decay = -rng.choice([1e-3, 20.0], size=(8, 3))
    want = np.zeros((8, 8))
    for i, j in zip(*np.tril_indices(8, -1), strict=True):
        want[i, j] = np.sum(x[i] * y[j] * np.exp(decay[j + 1 : i + 1].sum(0)))
    arrays = (jnp.asarray(array, jnp.float32) for array in (x, y, decay))
    np.testing.assert_allclose(decayed_products(*arrays), want, rtol=1e-5, atol=1e-7)


def _equation(query, key, value, decay, beta, segment_ids):
    """Equation 1 as written, one token at a time."""

    def unit(x):
        return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)

    def token(memory, inputs):
        query, key, value, decay, beta, segment, before = inputs
        memory = jnp.where(((segment != before) & (segment > 0))[:, None, None, None], 0, memory)
        erased = jnp.eye(key.shape[-1]) - beta[..., None, None] * key[..., :, None] * key[..., None, :]
        updated = erased @ (jnp.exp(decay)[..., None] * memory)
        updated += beta[..., None, None] * key[..., :, None] * value[..., None, :]
        y = jnp.sum(updated * query[..., None], axis=-2)
        return jnp.where((segment > 0)[:, None, None, None], updated, memory), y

    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    arrays = unit(query) / query.shape[-1] ** 0.5, unit(key), value, decay, beta, segment_ids, before
    first = jnp.zeros((*key.shape[:1], *key.shape[2:], value.shape[-1]), value.dtype)
    memory, y = jax.lax.scan(token, first, [jnp.swapaxes(x, 0, 1) for x in arrays])
    return jnp.swapaxes(y, 0, 1), memory


def test_chunks_have_the_values_and_gradients_of_the_equation_in_float64(rng):
    """Three chunks, decays of up to exp(-100), documents that begin anywhere, padding at the end of a row."""
    shape = (2, 2 * CHUNK + 7, 2)
    query, key, value = rng.normal(size=(3, *shape, 4))
    decay = -rng.exponential(size=(*shape, 4)) * rng.choice([1e-3, 0.1, 25.0], size=(*shape, 4))
    segment_ids = 1 + np.cumsum(rng.random(shape[:2]) < 0.03, axis=1)
    segment_ids[1, -30:] = 0
    arrays = query, key, value, decay, rng.uniform(size=shape)
    weights = rng.normal(size=value.shape) * (segment_ids > 0)[..., None, None], rng.normal(size=(2, 2, 4, 4))

    def program(rule, dtype):
        def loss(*arrays):
            y, memory = rule(*arrays, jnp.asarray(segment_ids, jnp.int32))
            y = jnp.where((segment_ids > 0)[..., None, None], y, 0)
            return sum(jnp.sum(a * jnp.asarray(b, dtype)) for a, b in zip((y, memory), weights, strict=True)), (
                y,
                memory,
            )

        run = jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))
        return run(*(jnp.asarray(array, dtype) for array in arrays))

    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, program(_equation, jnp.float64))
    for ours, theirs in zip(jax.tree.leaves(program(kimi_delta_rule, jnp.float32)), jax.tree.leaves(want), strict=True):
        assert theirs.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(np.max(np.abs(theirs)))))


def _rows(segment_ids):
    return Rows(segment_ids, segment_ids, segment_ids)  # only the document ids are read


def test_state_goes_on_from_prompts_of_unequal_length(rng):
    """Prompts of 6 and 2 tokens, the latter padded, and one token more, equal one pass over the whole rows."""
    layer = KimiDeltaAttention(CONFIG, MIXER, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 7, 12)), jnp.float32)
    prompts = jnp.stack([x[0, :6], jnp.concatenate([x[1, :2], jnp.full((4, 12), 7.0)])])
    real, ones = jnp.asarray([[1] * 6, [1, 1, 0, 0, 0, 0]]), jnp.ones((2, 7), jnp.int32)

    @nnx.jit
    def run(layer):
        _, state = layer.prefill(prompts, _rows(real))
        one = jnp.stack([x[0, 6], x[1, 2]])[:, None]
        return layer.join(layer.prefill(x, _rows(ones))[0], x), layer.join(layer.step(one, _rows(None), state)[0], one)

    whole, one = run(layer)
    np.testing.assert_allclose(one[:, 0], jnp.stack([whole[0, 6], whole[1, 2]]), rtol=1e-5, atol=1e-6)
    steps = jax.nn.softplus(layer.decay_bias[...])
    assert np.all((steps > 0.99e-3) & (steps < 0.101))
    assert np.all((np.exp(layer.log_decay_scale[...]) >= 0.99) & (np.exp(layer.log_decay_scale[...]) <= 16.01))


def test_a_layer_on_eight_devices_equals_one_and_its_documents_are_as_if_alone(rng):
    layer = KimiDeltaAttention(CONFIG, MIXER, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    weights = nnx.to_pure_dict(state)
    x, cotangent = jnp.asarray(rng.normal(size=(2, 4, 9, 12)), jnp.float32)
    ids = np.asarray([[1] * 4 + [2] * 5, [1] * 9, [1] * 5 + [0] * 4, [1] * 4 + [0] * 5])
    x = x.at[3, :4].set(x[0, :4]).at[2, :5].set(x[0, 4:])

    def loss(weights, x):
        own = nnx.merge(graphdef, weights)
        y = own.join(own.prefill(x, _rows(jnp.asarray(ids)))[0], x) * (ids > 0)[..., None]
        return jnp.sum(y * cotangent), y

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    alone = run(weights, x)
    np.testing.assert_allclose(alone[1][0, :4], alone[1][3, :4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alone[1][0, 4:], alone[1][2, :5], rtol=1e-5, atol=1e-6)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, parameter_shardings(mesh, state))
        assert placed["decay_up"].sharding.shard_shape((4, 2, 4)) == (4, 1, 4)  # N over tensor
        spread = run(placed, jax.device_put(x, partition_specs.shardings(mesh, partition_specs.BATCH)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), spread, alone)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(alone[0]))


def test_greedy_text_with_state_equals_that_without():
    config = tiny_model(num_layers=2, gate="none", pattern="mixer attention", mixer=MIXER)
    _, parameters = random_parameters(config)
    texts = sampling.sample(config, parameters, PROMPTS, 6, GREEDY)
    np.testing.assert_array_equal(texts, _without_cache(config, parameters, PROMPTS, 6))


def test_flops_and_memory_by_hand():
    """2 heads of 4, D 16: 3·16·8 of queries, keys and values with 3 taps of 24 channels, 16·2 of beta, 2 low-rank gates
    of 16·4 + 4·8, 8 biases and 2 scales, a norm of 4 and 8·16 out; 3 products with 2·4·4 numbers, 2 FLOPs each, three
    times. A layer of attention, 2 heads of 4 with 1 of keys and values, has 16·(2·8 + 2·4) and 6·2·8·(T + 1)/2."""
    mixed, attending = (
        tiny_model(num_layers=1, gate="none", pattern=word, mixer=mixer, num_heads=2, num_kv_heads=1, head_dim=4)
        for word, mixer in (("mixer", MIXER), ("attention", None))
    )
    parameters = 3 * 16 * 8 + 3 * 24 + 16 * 2 + 2 * (16 * 4 + 4 * 8) + 8 + 2 + 4 + 8 * 16
    for length in (8, 800):
        per_token = 6 * (parameters - 16 * 24) + 18 * 2 * 4**2 - 6 * 2 * 8 * (length + 1) / 2
        found = flops.train_flops_per_token(mixed, length) - flops.train_flops_per_token(attending, length)
        assert found == per_token
    # On 2 devices: 5 arrays of 1 head and the inner vectors of both gates; the heads.
    assert MIXER.activations(2, 1) == (5 * 4 + 2 * 4, 4)


@pytest.mark.parametrize(("field", "message"), [({"conv_width": 0}, "model.mixer.conv_width=0: must be")])
def test_impossible_settings(field, message):
    with pytest.raises(ConfigError, match=message):
        KimiDelta(**field)
