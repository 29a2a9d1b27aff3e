"""Gated DeltaNet: chunks against one token at a time, packed documents, its state, and a mesh of 8 devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Config, ConfigError, DeltaNetConfig, MeshConfig, ModelConfig
from moe.config.mixers import GatedDelta
from moe.layers.inputs import Rows
from moe.layers.mixers.delta_net import CHUNK, GatedDeltaNet, delta_rule, delta_step
from moe.layers.mixers.recurrence import short_convolution
from moe.parallel.mesh import make_mesh
from moe.parallel.partition_specs import BATCH, HEADS, shardings
from tests.helpers import slow_case

CONFIG = ModelConfig(d_model=12, pattern="delta", delta_net=DeltaNetConfig(2, 6, 4, 5, 3))


def _arrays(rng, length, rows=2, heads=(2, 3), dims=(4, 5), steps=8.0):
    """Queries, keys, values, log decays of up to about -steps per token, and write strengths beta."""
    m, j = heads
    query, key = (rng.normal(size=(rows, length, m, dims[0])) for _ in range(2))
    value = rng.normal(size=(rows, length, m, j, dims[1]))
    decay = -rng.exponential(size=(rows, length, m, j)) * rng.choice([1e-3, 0.1, steps], size=(rows, length, m, j))
    beta = rng.uniform(size=(rows, length, m, j))
    return tuple(jnp.asarray(x, jnp.float32) for x in (query, key, value, decay, beta))


def _segments(rng, rows, length, share=0.05):
    """Documents that begin anywhere, and padding at the end of the second row."""
    segment_ids = 1 + np.cumsum(rng.random((rows, length)) < share, axis=1)
    segment_ids[1, -length // 5 :] = 0
    return segment_ids.astype(np.int32)


def _recurrent(query, key, value, decay, beta, segment_ids):
    """Equation 10, one token at a time."""

    def token(memory, inputs):
        *arrays, segment, before = inputs
        begins = (segment != before) & (segment > 0)
        memory = jnp.where(begins[:, None, None, None, None], 0, memory)
        y, updated = delta_step(*arrays, memory)
        return jnp.where((segment > 0)[:, None, None, None, None], updated, memory), y

    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    inputs = [jnp.swapaxes(jnp.asarray(x), 0, 1) for x in (query, key, value, decay, beta, segment_ids, before)]
    memory = jnp.zeros((*value.shape[:1], *value.shape[2:4], key.shape[-1], value.shape[-1]), jnp.float32)
    memory, y = jax.lax.scan(token, memory, inputs)
    return jnp.swapaxes(y, 0, 1), memory


def _plain(query, key, value, decay, beta):
    """Equation 10 as written, in NumPy and float64, for one head and row."""
    memory, outputs = np.zeros((key.shape[-1], value.shape[-1])), []
    for t in range(len(query)):
        unit_key = key[t] / np.sqrt(key[t] @ key[t] + 1e-6)
        unit_query = query[t] / np.sqrt(query[t] @ query[t] + 1e-6)
        identity = np.eye(len(unit_key))
        memory = np.exp(decay[t]) * (identity - beta[t] * np.outer(unit_key, unit_key)) @ memory
        memory += beta[t] * np.outer(unit_key, value[t])
        outputs.append(memory.T @ unit_query / np.sqrt(len(unit_query)))
    return np.array(outputs), memory


def test_one_token_at_a_time_is_the_equation(rng):
    arrays = _arrays(rng, 30)
    y, memory = jax.jit(_recurrent)(*arrays, np.ones((2, 30), np.int32))
    for b, m, j in np.ndindex(2, 2, 3):
        query, key, value, decay, beta = (np.asarray(x, np.float64)[b, :, m] for x in arrays)
        want, after = _plain(query, key, value[:, j], decay[:, j], beta[:, j])
        np.testing.assert_allclose(y[b, :, m, j], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(memory[b, m, j], after, rtol=1e-5, atol=1e-6)


def _weighted(rule, weights):
    """A loss that depends on every output and on the final memory."""

    def loss(*arrays):
        y, memory = rule(*arrays)
        y = jnp.where((arrays[-1] > 0)[..., None, None, None], y, 0)
        return jnp.sum(y * weights[0]) + jnp.sum(memory * weights[1]), (y, memory)

    return loss


def _program(rule, weights):
    """Values and gradients."""
    return jax.value_and_grad(_weighted(rule, weights), argnums=range(5), has_aux=True)


def _assert_close(got, want):
    """Compare outputs and memory to 1e-5, and every gradient to 1e-5 of its largest value."""
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(np.max(np.abs(theirs)))))


@pytest.mark.parametrize(("length", "steps"), [slow_case(1, 1.0), slow_case(5, 1.0), (2 * CHUNK + 7, 25.0)])
def test_chunks_have_the_values_and_gradients_of_the_recurrence(rng, length, steps):
    arrays = (*_arrays(rng, length, steps=steps), _segments(rng, 2, length))
    weights = rng.normal(size=arrays[2].shape), rng.normal(size=(2, 2, 3, 4, 5))
    _assert_close(*(jax.jit(_program(rule, weights))(*arrays) for rule in (delta_rule, _recurrent)))


def test_equal_keys_do_not_lose_precision(rng):
    """With equal keys a power series of the triangular matrix would have terms of 1e17."""
    query, key, value, decay, beta = _arrays(rng, CHUNK)
    arrays = query, jnp.broadcast_to(key[:, :1], key.shape), value, 0 * decay, jnp.ones_like(beta)
    segment_ids = np.ones((2, CHUNK), np.int32)
    got, want = (jax.jit(rule)(*arrays, segment_ids)[0] for rule in (delta_rule, _recurrent))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_over_eight_devices(rng):
    """Rows over data and fsdp, heads over tensor: equal values and gradients, without all-gathers or all-to-alls."""
    arrays = (*_arrays(rng, CHUNK + 9, rows=4, heads=(2, 2)), _segments(rng, 4, CHUNK + 9))
    weights = rng.normal(size=arrays[2].shape), rng.normal(size=(4, 2, 2, 4, 5))
    want = jax.jit(_program(_recurrent, weights))(*arrays)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(arrays, shardings(mesh, (*[HEADS] * 5, BATCH)))
    with jax.set_mesh(mesh):
        compiled = jax.jit(_program(delta_rule, weights)).lower(*placed).compile()
        got = compiled(*placed)
    assert "all-gather" not in compiled.as_text()
    assert "all-to-all" not in compiled.as_text()
    _assert_close(got, want)


def test_short_convolution_by_hand():
    """Taps of 3 for the token itself and 2 for the previous one: 3, 3·2 + 2·1, and 3·3 where a document begins."""
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    y = short_convolution(x, jnp.asarray([2.0, 3.0]).reshape(2, 1, 1), jnp.asarray([[1, 1, 2, 2]]))
    np.testing.assert_allclose(y.ravel(), jax.nn.silu(jnp.asarray([3.0, 8.0, 9.0, 18.0])), rtol=1e-6)


@pytest.fixture(scope="module")
def layer():
    return GatedDeltaNet(CONFIG, GatedDelta.of(CONFIG), rngs=nnx.Rngs(0))


def _rows(segment_ids):
    return Rows(segment_ids, segment_ids, segment_ids)  # a delta net reads only the document ids


@pytest.mark.slow  # tests/models/test_hybrid.py tests the same in a model
def test_packed_documents_run_by_themselves(layer, rng):
    x = jnp.asarray(rng.normal(size=(1, 11, 12)), jnp.float32)
    run = jax.jit(lambda x, segment_ids: layer.prefill(x, _rows(segment_ids))[0])
    packed = run(x, jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]]))
    for start, stop in ((0, 4), (4, 9)):
        alone = run(x[:, start:stop], jnp.ones((1, stop - start), jnp.int32))
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-6, atol=1e-6)
    assert np.all(np.isfinite(packed))


def test_state_goes_on_from_prompts_of_unequal_length(layer, rng):
    """Prompts of 6 and 2 tokens, the latter padded on the right and on the left, followed by three single tokens, equal
    one pass over the whole rows."""
    x = jnp.asarray(rng.normal(size=(2, 9, 12)), jnp.float32)
    want = jax.jit(lambda x: layer.prefill(x, _rows(jnp.ones(x.shape[:2], jnp.int32)))[0])(x)
    padding = jnp.full((4, 12), 7.0)
    prompts = [x[0, :6], jnp.concatenate([x[1, :2], padding]), jnp.concatenate([padding, x[1, :2]])]
    real = jnp.asarray([[1] * 6, [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]])
    _, state = jax.jit(layer.prefill)(jnp.stack(prompts), _rows(real))
    step = jax.jit(layer.step)
    for i in range(3):
        heads, state = step(jnp.stack([x[0, 6 + i], x[1, 2 + i], x[1, 2 + i]])[:, None], _rows(None), state)
        expected = jnp.stack([want[0, 6 + i], want[1, 2 + i], want[1, 2 + i]])
        np.testing.assert_allclose(heads[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_the_memory_in_float32(layer):
    x, segment_ids = jax.ShapeDtypeStruct((2, 5, 12), jnp.bfloat16), jax.ShapeDtypeStruct((2, 5), jnp.int32)
    heads, state = jax.eval_shape(layer.prefill, x, _rows(segment_ids))
    one = jax.ShapeDtypeStruct((2, 1, 12), jnp.bfloat16)
    after, again = jax.eval_shape(layer.step, one, _rows(None), state)
    assert heads.dtype == after.dtype == jax.eval_shape(layer.join, heads, x).dtype == jnp.bfloat16
    assert {inputs.dtype for inputs in (*state.inputs, *again.inputs)} == {jnp.dtype(jnp.bfloat16)}
    assert state.memory.dtype == again.memory.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, state)


def test_decay_starts_between_its_bounds(layer):
    steps = jax.nn.softplus(layer.decay_bias[...])
    assert np.all((steps > 0.99e-3) & (steps < 0.101))
    assert np.all(np.exp(layer.log_decay_scale[...]) <= 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "delta", "encoder_layers": 1}, "model.pattern='delta': must be '' with model.encoder_layers"),
        ({"pattern": "delta", "relative_buckets": 8}, "model.pattern='delta': must be '' .*relative_buckets"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config(model=ModelConfig(**changes))


def test_value_heads_must_be_a_multiple_of_key_heads():
    with pytest.raises(ConfigError, match=r"model\.delta_net\.value_heads=6: must be a multiple of key_heads=4"):
        DeltaNetConfig(value_heads=6)
