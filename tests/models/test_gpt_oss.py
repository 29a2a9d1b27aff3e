"""Parts of gpt-oss: attention sinks, biases of router and experts, the clamped SwiGLU, in every form and on a mesh."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Config, ConfigError, MeshConfig, ModelConfig, MoEConfig
from moe.dispatch.ffn import activate
from moe.layers.attention import attend, cpu
from moe.layers.attention.scoring import Scoring, append_sink
from moe.layers.moe_layer import MoELayer
from moe.models import kv_cache
from moe.models.decoder import Transformer
from moe.parallel import partition_specs, target
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_specs
from tests.helpers import moe_config, random_model, slow_case

MODEL = ModelConfig(
    **{"vocab_size": 48, "d_model": 16, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "head_dim": 4},
    **{"sliding_window": 3, "pattern": "sliding attention", "attention_bias": "all", "attention_sinks": True},
    activation="swiglu_clamped",
    moe=MoEConfig(num_experts=4, d_ff=12, bias="all", dispatch="dropless"),
)


def _model(**changes) -> Transformer:
    """A model with nonzero biases and sinks."""
    return random_model(dataclasses.replace(MODEL, **changes))


def test_clamped_swiglu_by_hand():
    """Slope 1.702, limit 7: a gate of 10 and an up of -9 become 7 and -7; -1 and 2, and a gate of -9, are unchanged."""
    got = activate("swiglu_clamped", jnp.array([-9.0, 2.0, 2.0]), jnp.array([10.0, -1.0, -9.0]))
    want = [7 / (1 + math.exp(-1.702 * 7)) * (-7 + 1), -1 / (1 + math.exp(1.702)) * (2 + 1)]
    want.append(-9 / (1 + math.exp(1.702 * 9)) * (2 + 1))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("kind", ["full", "blocked"])
def test_a_sink_by_hand(kind):
    """Keys of zeros give scores of 0, and the sink adds exp(ln 2) = 2: token t gets Σ_{u≤t} v_u / (t + 1 + 2)."""
    zeros, value = jnp.zeros((1, 3, 1, 8)), jnp.ones((1, 3, 1, 8)) * jnp.array([1.0, 2.0, 3.0])[None, :, None, None]
    segments, sinks = jnp.ones((1, 3), jnp.int32), jnp.log(jnp.array([2.0]))
    got = attend.attend(zeros, zeros, value, segments, kind=kind, scoring=Scoring(sinks=sinks))
    np.testing.assert_allclose(got[0, :, 0, 0], [1 / 3, 3 / 4, 6 / 5], rtol=1e-6)


def test_the_gradient_of_a_sink_is_a_sum_in_float32():
    """4095 queries with a gradient of 1, whose sum in bfloat16 is 4096."""
    query, key = jnp.ones((1, 4095, 2, 4), jnp.bfloat16), jnp.ones((1, 1, 1, 4), jnp.bfloat16)

    def logits(sinks):
        queries = append_sink(sinks, query, key, key, jnp.ones((1, 4095, 1), bool), None, 0.5)[0]
        return jnp.sum(queries[..., 4].astype(jnp.float32))

    np.testing.assert_array_equal(jax.jit(jax.grad(logits))(jnp.zeros(2)), 4095 / 0.5)


@pytest.mark.parametrize("window", [slow_case(0), 7])
def test_forms_of_attention_with_sinks(window, monkeypatch):
    """All forms equal a softmax over the scores and the sink, in values and gradients, including those of the sinks."""
    monkeypatch.setattr(attend, "largest_divisor", lambda length, largest: 8)
    monkeypatch.setattr(cpu, "_SMALLEST_BLOCK", 10)
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, 32, 4, 8))
    key, value = (jax.random.normal(keys[i], (2, 32, 2, 8)) for i in (1, 2))
    sinks = jnp.array([-1.0, 0.0, 1.0, 3.0])
    segment_ids = jnp.sort(jax.random.randint(keys[3], (2, 32), 0, 3), axis=1)

    def plain(query, key, value, sinks):
        distance = jnp.arange(32)[:, None] - jnp.arange(32)
        visible = (distance >= 0) & (distance < (window or 32))
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None])
        scores = jnp.einsum("btnh,bunh->bntu", query, jnp.repeat(key, 2, axis=2)) / math.sqrt(8)
        scores = jnp.where(visible[:, None], scores, -jnp.inf)
        beside = jnp.broadcast_to(sinks[None, :, None, None], (2, 4, 32, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, beside], axis=-1), axis=-1)[..., :-1]
        return jnp.einsum("bntu,bunh->btnh", weights, jnp.repeat(value, 2, axis=2))

    def results(attention):
        def loss(*arrays):
            output = attention(*arrays)
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(query, key, value, sinks)

    def form(kind):
        return lambda q, k, v, s: attend.attend(q, k, v, segment_ids, kind=kind, scoring=Scoring(window, sinks=s))

    want = results(plain)
    got = [results(form("full")), results(form("blocked"))]
    monkeypatch.setattr(target, "is_cpu", lambda: False)
    got.append(results(form("full")))
    for each in got:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), each, want)


def _every_expert(layer: MoELayer, x):
    """Run all experts on all tokens; each token keeps the two with the largest logits."""
    experts, router = layer.experts, layer.router
    logits = x @ router.kernel[...] + router.logit_bias[...]
    second = jnp.sort(logits, axis=-1)[..., -2:-1]
    shares = jax.nn.softmax(jnp.where(logits >= second, logits, -jnp.inf), axis=-1)
    gate, up = (
        jnp.einsum("btd,edf->btef", x, matrix[...]) + bias[...]
        for matrix, bias in ((experts.gate, experts.gate_bias), (experts.up, experts.up_bias))
    )
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    hidden = gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    outputs = jnp.einsum("btef,efd->bted", hidden, experts.down[...]) + experts.down_bias[...]
    return jnp.einsum("bte,bted->btd", shares, outputs)


def test_a_dropped_assignment_adds_no_output_bias():
    """Two equal tokens choose the same expert, which has a capacity of one."""
    settings = {"gate": "switch", "dispatch": "einsum", "capacity": {"train": 1.0, "eval": 1.0}, "bias": "all"}
    layer = MoELayer(**settings, d_model=4, d_ff=4, num_experts=2, activation="swiglu_clamped", rngs=nnx.Rngs(0))
    layer.experts.down_bias[...] = jnp.ones((2, 4))
    y = jax.jit(lambda x: layer(x)[0])(jnp.ones((1, 2, 4)))
    np.testing.assert_array_equal((y != 0).all(-1), [[True, False]])
    np.testing.assert_array_equal(y[0, 1], np.zeros(4))


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        slow_case("einsum", None),
        ("dropless", None),
        slow_case("gather", (1, 2, 2, 2)),
        slow_case("einsum", (1, 2, 2, 2)),
        slow_case("dropless", (1, 2, 2, 2)),
    ],
)
def test_an_expert_layer_with_biases(mode, sizes, rng):
    """Values, and gradients of all parameters, on one device and with experts and their hidden dim split."""
    settings = {"dispatch": mode, "capacity": {"train": 4.0, "eval": 4.0}}
    settings |= {"d_model": 8, "d_ff": 16, "num_experts": 4, "activation": "swiglu_clamped", "bias": "all"}
    layer = MoELayer(**settings, rngs=nnx.Rngs(0))
    state = nnx.state(layer)
    nnx.update(layer, jax.tree.map(lambda leaf: leaf + 0.5 * rng.normal(size=leaf.shape).astype(np.float32), state))
    x = jnp.asarray(rng.normal(size=(4, 5, 8)), jnp.float32)

    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x)[0]))

    plain = nnx.jit(nnx.value_and_grad(lambda layer, x: jnp.sum(jnp.sin(_every_expert(layer, x)))))
    want, gradients = plain(layer, x)
    if sizes is None:
        got, ours = nnx.jit(nnx.value_and_grad(loss))(layer, x)
    else:
        mesh = make_mesh(MeshConfig(*sizes))
        specs = parameter_specs(nnx.state(layer))
        with jax.set_mesh(mesh):
            placed = jax.device_put(nnx.to_pure_dict(nnx.state(layer)), partition_specs.shardings(mesh, specs))
            layer = nnx.merge(nnx.graphdef(layer), placed)
            got, ours = nnx.jit(nnx.value_and_grad(loss))(layer, x)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, gradients)
    assert float(jnp.abs(gradients["experts"]["down_bias"][...]).max()) > 0.1


@pytest.mark.slow
def test_over_a_mesh():
    """Loss and gradients of a whole model with sinks over tensor and experts over expert."""
    model = _model(attention="blocked")
    tokens = np.arange(8 * 9).reshape(8, 9) % 48

    def loss(model, tokens):
        return jnp.mean(jax.nn.logsumexp(model(tokens).logits, axis=-1) ** 2)

    want, gradients = nnx.jit(nnx.value_and_grad(loss))(model, tokens)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    parameters = nnx.to_pure_dict(nnx.state(model))
    with jax.set_mesh(mesh):
        specs = parameter_specs(nnx.state(model))
        assert specs["segment_0"]["block_0"]["attention"]["sinks"] == jax.P(None, "tensor")
        placed = jax.device_put(parameters, partition_specs.shardings(mesh, specs))
        got, sharded = nnx.jit(nnx.value_and_grad(loss))(nnx.merge(nnx.graphdef(model), placed), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), sharded, gradients)


@pytest.mark.slow
def test_the_cache_has_the_sinks_too():
    """Logits after each token are equal with the cache and without."""
    model, tokens = _model(), jnp.arange(2 * 9).reshape(2, 9) % 48
    want = model(tokens).logits
    caches = kv_cache.empty(model.config, 2, 9)
    x, caches, _ = kv_cache.run_prompt(model, tokens[:, :5], jnp.array([5, 5]), caches)
    logits = kv_cache.prompt_logits(model, x, jnp.array([5, 5]))
    for t in range(5, 9):
        np.testing.assert_allclose(logits, want[:, t - 1], rtol=1e-4, atol=1e-4)
        x, caches, _ = kv_cache.extend(model, tokens[:, t : t + 1], jnp.full((2, 1), t), jnp.ones(2, bool), caches)
        logits = kv_cache.next_logits(model, x)


def test_refusals():
    with pytest.raises(ConfigError, match=r"model\.moe\.bias='all': must be none with the gate soft_moe"):
        moe_config(gate="soft_moe", bias="all", dispatch="einsum", accept_future_leak=True)
    latent = {"kv_lora_rank": 4, "rope_dim": 2, "value_dim": 4, "num_kv_heads": 8}
    with pytest.raises(ConfigError, match=r"model\.attention_sinks=True: must be False where model\.kv_lora_rank"):
        Config(model=ModelConfig(**latent, attention_sinks=True))
