"""Forms that never hold T x T scores or [B,T,V] logits equal the plain ones, in value and gradient."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import attention, losses


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_blocked_attention_equals_full(window, kv_heads, monkeypatch):
    monkeypatch.setattr(attention, "_block", lambda length, largest: 16)  # 6 blocks of 96 positions
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, 96, 4, 16))
    key, value = (jax.random.normal(keys[i], (2, 96, kv_heads, 16)) for i in (1, 2))
    segment_ids = jnp.sort(jax.random.randint(keys[3], (2, 96), 0, 3), axis=1)

    def loss(query, key, value, kind):
        return jnp.sum(jnp.sin(attention.attend(query, key, value, segment_ids, window=window, kind=kind)))

    full, blocked = (jax.value_and_grad(loss, (0, 1, 2))(query, key, value, kind) for kind in attention.ATTENTIONS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), full, blocked)


def test_cudnn_is_asked_for_blocks_with_all_of_their_mask(monkeypatch):
    """There is no GPU here: XLA's form stands in for the kernel, given the very arguments that cuDNN is."""
    real, blocks = jax.nn.dot_product_attention, []

    def cudnn(query, key, value, *, mask, implementation):
        assert implementation == "cudnn"
        blocks.append(mask.shape)
        return real(query, key, value, mask=mask)

    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(attention.jax, "devices", lambda: [device])
    monkeypatch.setattr(attention, "_block", lambda length, largest: 16)
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (2, 64, 4, 16), jnp.bfloat16) for k in keys)
    segment_ids = jnp.repeat(jnp.arange(4), 16)[None].repeat(2, axis=0)
    full = attention.attend(query, key, value, segment_ids, window=9, kind="full")
    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", cudnn)
    blocked = attention.attend(query, key, value, segment_ids, window=9, kind="blocked")
    assert blocks == [(2, 1, 16, 64)]
    np.testing.assert_allclose(full.astype(jnp.float32), blocked.astype(jnp.float32), rtol=0.02, atol=0.02)

    runs = attention._runs_cudnn
    assert runs(query, 16)
    assert not runs(query, 15)  # an odd length
    assert not runs(query.astype(jnp.float32), 16)
    assert not runs(query[..., :4], 16)
    for unable in ("7.5", "gfx90a"):
        device.compute_capability = unable
        assert not runs(query, 16)


def test_chunked_loss_equals_plain(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", 8)  # 3 chunks of 24 positions
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, matrix = jax.random.normal(keys[0], (2, 24, 16)), jax.random.normal(keys[1], (16, 50))
    targets = jax.random.randint(keys[2], (2, 24), -10, 50)  # about a sixth have no target

    plain = jax.value_and_grad(lambda h, m: losses.cross_entropy(h @ m, targets)[0], (0, 1))(hidden, matrix)
    chunked = jax.value_and_grad(lambda h, m: losses.linear_cross_entropy(h, m, targets)[0], (0, 1))(hidden, matrix)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, chunked)
    assert losses.linear_cross_entropy(hidden, matrix, targets)[1] == np.sum(np.asarray(targets) >= 0)
