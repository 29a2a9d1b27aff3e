"""Multi-head latent attention against plain loops, with its cache and over a mesh; scaled rotary positions."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Config, ConfigError, MeshConfig, ModelConfig, MoEConfig, RopeScalingConfig
from moe.config.mixers import MultiHeadLatent
from moe.interop import load_huggingface, save_huggingface
from moe.layers.attention.scoring import attention_factor, grow, inverse_frequencies
from moe.layers.inputs import Rows
from moe.layers.mixers.latent import LATENT_NORM_EPS, LatentAttention
from moe.models.decoder import Transformer
from moe.models.kv_cache import empty, prompt_logits, run_prompt
from moe.parallel.mesh import make_mesh
from tests.helpers import moe_config, random_model

CONFIG = ModelConfig(
    **{"d_model": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 6, "rope_dim": 2, "rope_interleaved": True},
    **{"kv_lora_rank": 5, "q_lora_rank": 4, "value_dim": 7},
)


def _reference(module: LatentAttention, x: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One query, head and key at a time, by DeepSeek-V2 2024, equations 37-47."""
    c = module.config
    weights = {
        name: np.asarray(leaf, np.float64)
        for name, leaf in nnx.to_pure_dict(nnx.state(module)).items()
        if not isinstance(leaf, dict)
    }

    def norm(v):
        return v / np.sqrt(np.mean(v * v) + LATENT_NORM_EPS)

    def turn(v, position):
        cos, sin = math.cos(position), math.sin(position)  # one pair: frequency 1
        return np.array([v[0] * cos - v[1] * sin, v[1] * cos + v[0] * sin])

    y = np.zeros_like(x, np.float64)
    for b, t in np.ndindex(*x.shape[:2]):
        query = np.einsum("r,rnh->nh", norm(x[b, t] @ weights["query_down"]), weights["query_up"])
        for n in range(c.num_heads):
            scores, values = [], []
            for u in range(t + 1):
                if segments[b, u] != segments[b, t]:
                    continue
                latent = x[b, u] @ weights["kv_down"]
                expanded = norm(latent[:5]) @ weights["kv_up"][:, n]
                key = np.concatenate([expanded[:4], turn(latent[5:], positions[b, u])])
                mine = np.concatenate([query[n, :4], turn(query[n, 4:], positions[b, t])])
                scores.append(mine @ key / math.sqrt(6))
                values.append(expanded[4:])
            probs = np.exp(scores - np.max(scores))
            y[b, t] += (probs / probs.sum()) @ np.array(values) @ weights["out"][n]
    return y


@pytest.fixture
def module():
    return LatentAttention(CONFIG, MultiHeadLatent.of(CONFIG), rngs=nnx.Rngs(0))


def test_against_plain_loops(module, rng):
    x = rng.normal(size=(2, 7, 8)).astype(np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1] * 7])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3], list(range(7))])
    got = jax.jit(lambda x, rows: module.join(module.prefill(x, rows)[0], x))(x, Rows(segments, segments, positions))
    np.testing.assert_allclose(got, _reference(module, x, segments, positions), rtol=1e-4, atol=1e-5)


def test_absorbed_projections_compute_the_same(module, rng):
    x = jnp.asarray(rng.normal(size=(2, 7, 8)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (2, 1, 7, 7))
    ones = jnp.ones((2, 7), jnp.int32)

    @jax.jit
    def run(x, positions):
        query, latent = module.project_cached(x, positions)
        assert latent.shape == (2, 7, 1, 5 + 2)
        got = module.join(module.attend_cached(query, latent, causal), x)
        return got, module.join(module.prefill(x, Rows(ones, ones, positions))[0], x)

    got, want = run(x, positions)
    with pytest.raises(ValueError, match="only grouped-query attention supports"):
        module.prefill(x, Rows(ones, ones, positions, prefix=ones))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_scale_of_cached_scores_is_not_rounded_to_bfloat16(monkeypatch):
    """1/sqrt(12) as a bfloat16 is 0.13 % larger, by which a weight of about exp(-28 / sqrt(12)) is 1 % smaller."""
    config = dataclasses.replace(CONFIG, head_dim=12)
    module = LatentAttention(config, MultiHeadLatent.of(config), rngs=nnx.Rngs(0))
    rotated = jnp.zeros((1, 1, 2, 12), jnp.bfloat16).at[..., -2].set(4)
    monkeypatch.setattr(LatentAttention, "_query", lambda *_: rotated)
    query, _ = module.project_cached(jnp.ones((1, 1, 8), jnp.bfloat16), jnp.zeros((1, 1), jnp.int32))
    key = jnp.zeros((1, 2, 1, 7), jnp.bfloat16).at[0, 0, 0, 5].set(7).at[0, 1, 0, 0].set(1)  # query·key: 28 and 0
    heads = jax.jit(module.attend_cached)(query, key, jnp.ones((1, 1, 1, 2), bool))
    of_second = 1 / (1 + math.exp(28 / math.sqrt(12)))
    want = of_second * np.asarray(module.kv_up[...][0, :, module.unrotated_dim :].astype(jnp.bfloat16), np.float64)
    assert np.abs(np.asarray(heads, np.float64)).sum() == pytest.approx(np.abs(want).sum(), rel=5e-3)


@pytest.mark.slow
def test_over_a_mesh(tmp_path):
    """Heads over tensor: logits, gradients and the shards that each device reads."""
    moe = moe_config(
        gate="deepseek_v3",
        num_experts=8,
        experts_per_token=2,
        d_ff=12,
        expert_groups=2,
        kept_expert_groups=1,
        dispatch="dropless",
    )
    model = dataclasses.replace(
        CONFIG, vocab_size=48, d_model=16, num_heads=4, num_kv_heads=4, num_layers=2, d_ff=20, kv_lora_rank=6, moe=moe
    )
    config = Config(model=model)
    original = Transformer(config.model, rngs=nnx.Rngs(0))
    save_huggingface(original, config, tmp_path)
    tokens = np.arange(4 * 10).reshape(4, 10) % 48

    def loss(model, tokens):
        return jnp.mean(jax.nn.logsumexp(model(tokens).logits, axis=-1) ** 2)

    want, gradients = nnx.jit(nnx.value_and_grad(loss))(original, tokens)
    # Latents of 6 are not divisible by fsdp x expert: ``expert`` splits the heads together with ``tensor``.
    devices = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    loaded, _ = load_huggingface(tmp_path, mesh=devices)
    with jax.set_mesh(devices):
        up = nnx.to_pure_dict(nnx.state(loaded))["segment_0"]["block_0"]["attention"]["kv_up"]
        assert up.sharding.shard_shape(up.shape)[2] == 1
        got, sharded = nnx.jit(nnx.value_and_grad(loss))(loaded, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), sharded, gradients)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_dim": 6}, "rope_dim=6"),
        ({"rope_dim": 3}, "rope_dim=3"),
        ({"value_dim": 0}, "value_dim=0"),
        ({"num_kv_heads": 1}, "num_kv_heads=1"),
        ({"qk_norm": "head"}, "qk_norm='head'"),
        ({"kv_lora_rank": 0}, r"q_lora_rank=4: must be 0 without model\.kv_lora_rank"),
        ({"kv_lora_rank": 0, "q_lora_rank": 0}, r"value_dim=7: must be 0 without model\.kv_lora_rank"),
    ],
)
def test_impossible_settings(changes, field):
    with pytest.raises(ConfigError, match=field):
        Config(model=dataclasses.replace(CONFIG, **changes))


def test_scaled_frequencies_by_hand():
    """theta 10^4, 4 dims: frequencies 1 and 1/100."""
    plain = np.array([1.0, 0.01])
    linear = RopeScalingConfig(kind="linear", factor=4.0)
    np.testing.assert_allclose(inverse_frequencies(4, 1e4, linear), plain / 4, rtol=1e-6)
    # Llama 3: 1024/2π = 163 rotations stay; 1024/200π = 1.63 lie (1.63 - 1)/(4 - 1) = 0.21 of the way from 1/8 to 1.
    llama = RopeScalingConfig(kind="llama3", factor=8.0, original_length=1024)
    smooth = (10.24 / (2 * math.pi) - 1) / 3
    want = plain * [1, (1 - smooth) / 8 + smooth]
    np.testing.assert_allclose(inverse_frequencies(4, 1e4, llama), want, rtol=1e-6)
    # YaRN: the pair with 32 rotations is number 4·ln(1024/64π)/(2·ln 10^4) = 0.35, floor 0; that with 1 is 1.11,
    # ceil 2: pair 1 is half interpolated.
    yarn = RopeScalingConfig(kind="yarn", factor=4.0, original_length=1024)
    np.testing.assert_allclose(inverse_frequencies(4, 1e4, yarn), [1, 0.01 * (0.5 / 4 + 0.5)], rtol=1e-6)
    assert attention_factor(yarn) == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor(dataclasses.replace(yarn, mscale=0.7, mscale_all_dim=0.7)) == 1


def test_queries_that_grow_by_hand():
    """β = 0.5, context 8: positions 0 to 7 stay; 8 to 15 are times 1 + 0.5·ln 2, 16 to 23 times 1 + 0.5·ln 3."""
    scaling = RopeScalingConfig(kind="yarn", factor=4.0, original_length=8, query_growth=0.5)
    positions = jnp.array([[0, 7, 8, 15, 16]])
    want = [1, 1, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(3)]
    grown = grow(jnp.ones((1, 5, 2, 4)), positions, scaling)
    np.testing.assert_allclose(grown, np.broadcast_to(np.reshape(want, (1, 5, 1, 1)), grown.shape), rtol=1e-6)


def test_frequencies_that_depend_on_the_length_by_hand():
    """theta 10^4, 4 dims, context 8. Dynamic, factor 2: rows of 16 get theta·(2·16/8 - 1)^(4/2) = 9·10^4."""
    dynamic = RopeScalingConfig(kind="dynamic", factor=2.0, original_length=8)
    lengths = jnp.array([5, 8, 16])
    want = [[1, 0.01], [1, 0.01], [1, 1 / 300]]
    np.testing.assert_allclose(inverse_frequencies(4, 1e4, dynamic, lengths), want, rtol=1e-6)
    # LongRoPE: divisors of short rows up to 8; heads times sqrt(1 + ln 64 / ln 8) = sqrt(3).
    longrope = RopeScalingConfig(
        kind="longrope", factor=64.0, original_length=8, short_factors=(1.0, 2.0), long_factors=(4.0, 8.0)
    )
    want = [[1, 0.01 / 2], [1, 0.01 / 2], [1 / 4, 0.01 / 8]]
    np.testing.assert_allclose(inverse_frequencies(4, 1e4, longrope, lengths), want, rtol=1e-6)
    assert attention_factor(longrope) == pytest.approx(math.sqrt(3))
    assert attention_factor(dataclasses.replace(longrope, attention_factor=1.5)) == 1.5
    assert attention_factor(dynamic) == 1


def test_a_row_has_its_own_length(rng):
    """A row of 5 tokens beside one of 12, padded to 12, gives the logits of the row by itself, though the other exceeds
    the context."""
    scaling = RopeScalingConfig(kind="dynamic", factor=4.0, original_length=6)
    config = ModelConfig(vocab_size=16, num_layers=1, d_ff=8, moe=MoEConfig(gate=None))
    model = random_model(dataclasses.replace(config, rope_scaling=scaling))
    tokens = jnp.asarray(rng.integers(1, 16, (2, 12)))
    lengths = jnp.array([5, 12])

    def logits(tokens):
        x, _, _ = run_prompt(model, tokens, lengths, empty(model.config, 2, 12))
        return prompt_logits(model, x, lengths)

    both = jax.jit(logits)(tokens)
    run = jax.jit(model.__call__)
    for row, length in ((0, 5), (1, 12)):
        alone = run(tokens[row : row + 1, :length]).logits[0, -1]
        np.testing.assert_allclose(both[row], alone, rtol=1e-4, atol=1e-4)
    plain = random_model(config)
    assert float(jnp.abs(jax.jit(plain.__call__)(tokens[1:]).logits[0, -1] - both[1]).max()) > 1e-3


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScalingConfig(kind="dynamic", factor=8.0, original_length=8),
        RopeScalingConfig(
            kind="longrope", factor=4.0, original_length=8, short_factors=(1.0,) * 4, long_factors=(1.5, 4.0, 9.0, 9.0)
        ),
    ],
    ids=lambda scaling: scaling.kind,
)
def test_a_document_has_its_own_length(scaling, rng):
    """A document of 6 tokens, within the context, is packed before one of 10, which exceeds it."""
    config = ModelConfig(
        vocab_size=16, num_layers=1, d_ff=8, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8,
        moe=MoEConfig(gate=None), rope_scaling=scaling,
    )  # fmt: skip
    model, tokens = random_model(config), jnp.asarray(rng.integers(1, 16, (1, 16)))
    segments = jnp.asarray([[1] * 6 + [2] * 10])
    positions = jnp.asarray([[*range(6), *range(10)]])
    packed = model(tokens, segment_ids=segments, positions=positions).logits
    for part in (slice(0, 6), slice(6, 16)):
        alone = model(tokens[:, part]).logits
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dynamic", "factor": 2.0}, "original_length=0: must be at least 2"),
        ({"kind": "yarn", "factor": 4.0}, "original_length=0"),
        ({"factor": 0.5}, r"factor=0\.5"),
        ({"query_growth": 0.1}, r"query_growth=0\.1: must be 0 without model\.rope_scaling\.kind=yarn"),
        (
            {"kind": "longrope", "original_length": 8, "short_factors": (1.0, 1.0), "long_factors": (1.0,)},
            r"short_factors=\(1\.0, 1\.0\): must be positive, and one for each of the 1 rotated pairs",
        ),
    ],
)
def test_impossible_scaling(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config(model=dataclasses.replace(CONFIG, rope_scaling=RopeScalingConfig(**changes)))


def test_yarn_needs_frequencies_that_fall():
    scaling = RopeScalingConfig(kind="yarn", factor=2.0, original_length=8)
    with pytest.raises(ConfigError, match=r"'yarn': needs model\.rope_theta above 1"):
        dataclasses.replace(CONFIG, rope_theta=1.0, rope_scaling=scaling)
