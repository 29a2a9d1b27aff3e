"""Ring attention over rows that are split over devices, against softmax as it is written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import MeshConfig
from moe.layers.attention import attend as attention
from moe.layers.attention.ring import Ring
from moe.layers.attention.scoring import Scoring
from moe.parallel.mesh import make_mesh
from tests.helpers import collectives

B, T, N, M, H, V = 2, 32, 4, 2, 6, 4


def _plain(query, key, value, sinks, segment_ids, window):
    """softmax(query·key / sqrt(H)) value over earlier positions of the document, with a further key of value 0."""
    key, value = (jnp.repeat(x, N // M, axis=2) for x in (key, value))
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (distance >= 0) & (distance < (window or T)) & (segment_ids[:, :, None] == segment_ids[:, None])
    scores = jnp.where(seen[:, None], jnp.einsum("btnh,bunh->bntu", query, key) / H**0.5, -jnp.inf)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (B, N, T, 1))], axis=-1)
    return jnp.einsum("bntu,bunv->btnv", jax.nn.softmax(scores, axis=-1)[..., :T], value)


@pytest.fixture
def arrays(rng):
    """Queries, keys, values, logits of sinks, a cotangent, and documents that begin anywhere."""
    shapes = (B, T, N, H), (B, T, M, H), (B, T, M, V), (N,), (B, T, N, V)
    segment_ids = 1 + np.cumsum(rng.random((B, T)) < 0.1, axis=1).astype(np.int32)
    segment_ids[1, -5:] = 0
    return *(jnp.asarray(rng.normal(size=shape) / 2, jnp.float32) for shape in shapes), segment_ids


@pytest.mark.parametrize(
    ("mesh", "window", "sinks"),
    [
        (MeshConfig(data=1, tensor=2, context=4), 0, True),
        (MeshConfig(data=2, context=4), 10, False),  # keys of two parts before a device's own, of four
    ],
)
def test_it_equals_the_softmax_in_values_and_gradients(mesh, window, sinks, arrays, monkeypatch):
    """Two devices have heads or rows, four have parts of a row, each of which is two blocks of queries; what the whole
    program moves between the four are single parts."""
    monkeypatch.setattr(attention, "_LARGEST_BLOCK", 4)
    query, key, value, logits, cotangent, segment_ids = arrays
    given = (query, key, value, *((logits,) if sinks else ()))
    scoring = Scoring(window)

    def loss(given, segment_ids, of):
        query, key, value, sink = (*given, None)[:4]
        heads = of(query, key, value, sink, segment_ids)
        return jnp.sum(heads * cotangent), heads

    def ring(query, key, value, sink, segment_ids):
        own = Scoring(scoring.window, sinks=sink)
        return attention.attend(query, key, value, segment_ids, kind="ring", scoring=own)

    plain = functools.partial(_plain, window=window)
    expected = jax.jit(jax.grad(functools.partial(loss, of=plain), has_aux=True))(given, segment_ids)
    where = make_mesh(mesh)
    with jax.set_mesh(where):
        row, heads = P(("data",), "context"), P(("data",), "context", "tensor")
        specs = (heads, heads, heads, P("tensor"))[: len(given)]
        placed = jax.device_put(given, tuple(NamedSharding(where, spec) for spec in specs))
        documents = jax.device_put(segment_ids, NamedSharding(where, row))
        program = jax.jit(jax.grad(functools.partial(loss, of=ring), has_aux=True)).lower(placed, documents).compile()
        found = program(placed, documents)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), found, expected)
    kinds = {each.kind for each in collectives(program.as_text(), 8)}
    assert "collective-permute" in kinds
    assert "all-gather" not in kinds


def test_a_window_needs_few_parts():
    """A window of 9 on parts of 8: the first query of a part sees the 8 before it, one part; of 10, two."""
    rings = [Ring("context", 4, window, 1.0, 1) for window in (0, 1, 9, 10, 100)]
    assert [ring.steps(8) for ring in rings] == [4, 1, 2, 3, 4]
