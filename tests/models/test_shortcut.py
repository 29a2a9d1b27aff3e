"""Shortcut-connected MoE: the experts' output is added after the FFN of the next layer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Config, ConfigError, MeshConfig
from moe.interop.config_json import write_config
from moe.layers.call import Call
from moe.layers.inputs import Dropout, Rows, Site
from moe.layers.shortcut import Late
from moe.models import sampling
from moe.models.decoder import make_rows
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings
from tests.helpers import mixed, random_parameters, slow_case, tiny_model
from tests.models.test_generate import GREEDY, PROMPTS, _without_cache

SETTINGS = {"gate": "mixtral", "shortcut": True, "layers": (0, 2), "num_layers": 4, "shared_d_ff": 12}
SETTINGS |= {"capacity_factor": 2.0, "eval_capacity_factor": 2.0}
SEGMENTS = np.asarray([[1, 1, 1, 1, 2, 2], [1] * 6, [1, 1, 1, 1, 1, 0], [1, 2, 2, 2, 2, 2]] * 2)


def test_what_is_late_by_hand():
    """The layer below handed 3 on: that is the output of the part, which hands 0 on."""
    ids = jnp.ones((1, 1), jnp.int32)
    y, report = Late().run(jnp.ones((1, 1, 1)), Call(Rows(ids, ids, ids), handed={"late": jnp.full((1, 1, 1), 3.0)}))
    assert (y.item(), report.handed["late"].item()) == (3, 0)


def _plain(model, tokens, segment_ids):
    """Logits, with layers in a Python loop and all experts of every token: LongCat-Flash's pairs of layers as its
    published code has them. Attention, norms and FFNs are the blocks' own."""
    rows, x, late = make_rows(tokens, segment_ids, None), model.embed(tokens), None
    blocks = []
    for name in ("segment_0", "segment_1", "segment_2"):
        if hasattr(model, name):
            graphdef, stacked = nnx.split(getattr(model, name))
            for i in range(len(jax.tree.leaves(stacked)[0])):
                blocks += nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)).blocks()
    for block in blocks:
        x = mixed(block, x, rows)
        h = block.ffn_norm(x)
        if not block.kind.sparse:
            x = x + block.dense(h, Dropout())
            x, late = (x if late is None else x + late), None
            continue
        experts, real = block.moe.experts, (segment_ids > 0)[..., None]
        logits = h @ block.moe.router.kernel[...]
        chosen, index = jax.lax.top_k(logits, 2)
        weights = jnp.sum(jax.nn.one_hot(index, 4) * jax.nn.softmax(chosen, axis=-1)[..., None], axis=-2)  # [B,T,E]
        up, gate = (jnp.einsum("btd,edf->btef", h, matrix[...]) for matrix in (experts.up, experts.gate))
        y = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, experts.down[...])
        late = real * jnp.einsum("bted,bte->btd", y, weights)
        x = x + real * block.moe.shared(h)
    return model.logits(model.scaled(model.final_norm(x)))


@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        slow_case({"remat": "full", "dispatch": "dropless"}, MeshConfig(data=1, fsdp=2, expert=4)),
        slow_case({"dispatch": "gather"}, MeshConfig(data=2, fsdp=2, expert=2)),
        ({"dispatch": "einsum", "num_layers": 3, "layers": (1,)}, MeshConfig(data=4, fsdp=1, expert=2)),
    ],
)
def test_it_equals_a_plain_loop_in_values_and_gradients_alone_and_on_eight_devices(changes, mesh, rng):
    """Pairs of layers scanned, with all recomputed; and a pair that is cut between segments."""
    config = tiny_model(**SETTINGS | changes)
    graphdef, parameters = random_parameters(config)
    tokens = jnp.asarray(rng.integers(1, 48, SEGMENTS.shape), jnp.int32)
    cotangent = jnp.asarray(rng.normal(size=(*SEGMENTS.shape, 48)), jnp.float32) * (SEGMENTS > 0)[..., None] / 48

    def loss(parameters, tokens, plain):
        model = nnx.merge(graphdef, parameters)
        logits = _plain(model, tokens, SEGMENTS) if plain else model(tokens, SEGMENTS, train=True).logits
        return jnp.sum(logits * cotangent)

    program = jax.jit(jax.value_and_grad(loss), static_argnames="plain")
    expected, alone = (program(parameters, tokens, plain=plain) for plain in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), alone, expected)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in jax.tree.leaves(expected[1]))
    where = make_mesh(mesh)
    with jax.set_mesh(where):
        state = nnx.state(nnx.eval_shape(lambda: nnx.merge(graphdef, parameters)))
        placed = jax.device_put(parameters, parameter_shardings(where, state))
        rows = jax.device_put(tokens, partition_specs.shardings(where, partition_specs.BATCH))
        spread = program(placed, rows, plain=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), spread, alone)


def test_greedy_text_with_a_cache_equals_that_without():
    config = tiny_model(**SETTINGS | {"num_layers": 2, "layers": (0,), "dispatch": "einsum"})
    _, parameters = random_parameters(config)
    texts = sampling.sample(config, parameters, PROMPTS, 4, GREEDY)
    np.testing.assert_array_equal(texts, _without_cache(config, parameters, PROMPTS, 4))


def test_late_outputs_are_dropped_by_themselves(rng):
    """Without a shared expert the stream is unchanged, and half of the late outputs are 0, the others doubled."""
    config = dataclasses.replace(tiny_model(**SETTINGS | {"shared_d_ff": 0, "dispatch": "einsum"}), dropout=0.5)
    graphdef, variables = random_parameters(config)
    block = nnx.merge(graphdef, variables).segment_0
    graphdef, stacked = nnx.split(block)
    x = jnp.asarray(rng.normal(size=(2, 6, 16)), jnp.float32)
    ids = jnp.ones((2, 6), jnp.int32)

    @jax.jit
    def outputs(variables, x):
        block: Any = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], variables)).blocks()[0]
        key = jax.random.key(3)
        call, run = Call(Rows(ids, ids, ids), train=True), block.parts[-1].run
        first = run(block.moe, x, call)
        second = run(block.moe, x, call.replace(rng=key, drop=Dropout(0.5, key)))
        late = (report.handed["late"] for _, report in (first, second))
        return x + first[0], *late, Dropout(0.5, key).at(Site.SHORTCUT)(jnp.ones_like(x))

    same, late, dropped, factors = outputs(stacked, x)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_allclose(dropped, late * factors, rtol=1e-6)
    assert 0.3 < np.mean(dropped == 0) < 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 3)}, r"model\.moe\.shortcut=True: needs a dense layer after each MoE layer"),
        ({"layers": (0, 1)}, r"model\.moe\.shortcut=True: needs a dense layer after each MoE layer"),
        ({"norms": "after"}, r"model\.norms='after': must be before where model\.moe\.shortcut is set"),
        ({"encoder_layers": 1}, r"model\.encoder_layers=1: must be 0 where model\.moe\.shortcut is set"),
    ],
)
def test_models_without_a_place_for_it_are_refused(changes, message):
    with pytest.raises(ConfigError, match=rf"^{message}"):
        tiny_model(**SETTINGS | changes)


def test_an_export_is_refused():
    with pytest.raises(ConfigError, match=r"no open architecture computes this model: .* lacks .*model\.moe\.shortcut"):
        write_config(Config(model=tiny_model(**SETTINGS | {"shared_d_ff": 0})))
