"""Forms that never hold T x T scores or [B,T,V] logits equal the plain ones, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import attention, causal, losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 1, 7, 40])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_forms_of_attention_are_equal(dtype, window, kv_heads, monkeypatch):
    """All of T x T by JAX's own attention, in blocks of queries in a loop, and the CPU's with a gradient of its own."""
    monkeypatch.setattr(attention, "_block", lambda length, largest: 16)  # 6 blocks of 96 positions
    monkeypatch.setattr(causal, "_LEAST", 20)  # 5 blocks, the last of 16
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (2, 96, 4, 16), dtype)
    key, value = (jax.random.normal(keys[i], (2, 96, kv_heads, 16), dtype) for i in (1, 2))
    segment_ids = jnp.sort(jax.random.randint(keys[3], (2, 96), 0, 3), axis=1)

    def results(kind):
        def loss(query, key, value):
            output = attention.attend(query, key, value, segment_ids, window=window, kind=kind).astype(jnp.float32)
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

    of_cpu, blocked = results("full"), results("blocked")
    monkeypatch.setattr(attention, "in_chunks", lambda: False)
    full = results("full")
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 3e-2}
    for other in (of_cpu, blocked):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), **tolerance),
            full,
            other,
        )


def test_chunked_loss_equals_plain(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", 8)  # 3 chunks of 24 positions
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, matrix = jax.random.normal(keys[0], (2, 24, 16)), jax.random.normal(keys[1], (16, 50))
    targets = jax.random.randint(keys[2], (2, 24), -10, 50)  # about a sixth have no target

    plain = jax.value_and_grad(lambda h, m: losses.cross_entropy(h @ m, targets)[0], (0, 1))(hidden, matrix)
    chunked = jax.value_and_grad(lambda h, m: losses.linear_cross_entropy(h, m, targets)[0], (0, 1))(hidden, matrix)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, chunked)
    assert losses.linear_cross_entropy(hidden, matrix, targets)[1] == np.sum(np.asarray(targets) >= 0)
