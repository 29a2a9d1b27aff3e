"""Memory of n-grams (Engram): hashes, gate, look-ups over a mesh, state, counts and refusals."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Config, ConfigError, MemoryConfig, MeshConfig, ModelConfig, layer_kinds, validate_mesh
from moe.config.layer_kinds import require_ability
from moe.config.memory_section import Ngrams
from moe.interop.config_json import write_config
from moe.layers.inputs import Rows
from moe.layers.ngram_memory import NgramMemory, earlier, ngram_rows
from moe.models import flops, pipeline, sampling
from moe.models.factory import abstract_parameters
from moe.models.segments import part_of
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings
from moe.playground import supported
from moe.training.start_run import _description
from tests.helpers import random_parameters, tiny_model
from tests.models.test_generate import GREEDY, PROMPTS, _without_cache

SMALL = MemoryConfig(layers=(1,), orders=(2, 3), heads=2, dim=6, rows=5, conv_width=2)
IDS = np.asarray([[1, 1, 1, 1, 1, 2], [1, 2, 2, 2, 0, 0], [1] * 6, [1, 1, 2, 2, 2, 3]])


def rows_of(token_ids: Any, segment_ids: Any) -> Rows:
    """Rows whose positions are not read."""
    return Rows(jnp.asarray(token_ids), jnp.asarray(segment_ids), jnp.zeros_like(jnp.asarray(token_ids)))


def before_each(token_ids: Any, segment_ids: Any, count: int, pad_id: int = 0) -> list[Any]:
    """Ids of each token and of those before it."""
    return [earlier(jnp.asarray(token_ids), jnp.asarray(segment_ids), by, pad_id) for by in range(count)]


def test_rows_by_hand():
    """Tokens 4, 6, 2. The pair (4, 6): 6·5 xor 4·3 = 11110 xor 01100 = 18, which is 3 mod 5 and 4 mod 7. Three at 2:
    2·5 xor 6·3 xor 4·7 = 01010 xor 10010 xor 11100 = 4, and so 4 mod 11 and mod 13. Heads begin at rows 0, 5, 12 and
    23. The first token has the id 1 before it: 4·5 xor 1·3 = 10100 xor 00011 = 23, 3 mod 5 and 2 mod 7."""
    ngrams = Ngrams((2, 3), (5, 3, 7), ((5, 7), (11, 13)))
    found = ngram_rows(before_each([[4, 6, 2]], [[1, 1, 1]], 3, pad_id=1), ngrams)
    np.testing.assert_array_equal(found[0, 1, :2], [3, 5 + 4])
    np.testing.assert_array_equal(found[0, 2, 2:], [12 + 4, 23 + 4])
    np.testing.assert_array_equal(found[0, 0, :2], [3, 5 + 2])
    other = ngram_rows(before_each([[4, 6, 2]], [[1, 2, 2]], 3, pad_id=1), ngrams)
    np.testing.assert_array_equal(other[0, 2, :2], found[0, 2, :2])  # of 6 and 2, in one document
    assert (np.asarray(other[0, 1]) != np.asarray(found[0, 1])).any()  # 6 begins a document


def test_hashes_are_those_of_the_published_code_in_64_bits(rng):
    """The sizes of engram_demo_v1.py for V = 129,280, computed there by NumPy in int64."""
    memory = MemoryConfig(layers=(1, 15), rows=129_280 * 5)
    hashes = memory.hashes(129_280)
    primes = [size for ngrams in hashes.values() for sizes in ngrams.sizes for size in sizes]
    assert len(primes) == len(set(primes)) == 32
    assert primes[:2] == [646_403, 646_411]
    assert all(size % divisor for size in primes for divisor in range(2, 805))
    token_ids = rng.integers(0, 129_280, (3, 40))
    for layer, ngrams in hashes.items():
        draws = np.random.default_rng(10_007 * layer).integers(0, (2**63 - 1) // 129_280 // 2, 3)
        shifted = [np.pad(token_ids, ((0, 0), (by, 0)))[:, :40] for by in range(3)]
        products = [ids * multiplier for ids, multiplier in zip(shifted, draws * 2 + 1, strict=True)]
        mixed = [products[0] ^ products[1], products[0] ^ products[1] ^ products[2]]
        wanted = [mix % size for mix, sizes in zip(mixed, ngrams.sizes, strict=True) for size in sizes]
        found = ngram_rows(before_each(token_ids, np.ones_like(token_ids), 3), ngrams)
        np.testing.assert_array_equal(found, np.stack(wanted, -1) + np.asarray(ngrams.offsets))


def test_gate_and_convolution_by_hand():
    """h = (3, 4) and keys (4, 3) or (-4, -3): norms divide by sqrt(12.5), the product is ±24/12.5 = ±1.92, over sqrt(2)
    ±1.3576, and sigma(±sqrt(1.3576)) is 0.76226 or 0.23774. The values (1, 1) are multiplied by that, so their norm is
    (1, 1), and the filter adds silu(2) of the token and, at the third, silu(2 + 3), of it and the token two before."""
    config = ModelConfig(d_model=2, norm_eps=1e-12)
    config = dataclasses.replace(config, memory=MemoryConfig((0,), (2,), heads=1, dim=2, rows=5, conv_width=2))
    memory = NgramMemory(config, Ngrams((2,), (1, 1), ((5,),)), rngs=nnx.Rngs(0))
    memory.vectors[...] = jnp.zeros_like(memory.vectors).at[0].set(jnp.asarray([1.0, 0])).at[1:5].set(-1.0)
    memory.key[...] = jnp.asarray([[4.0, 3.0], [0.0, 0.0]])
    memory.value[...] = jnp.asarray([[1.0, 1.0], [-2.0, -2.0]])
    memory.conv[...] = jnp.asarray([[3.0, 3.0], [2.0, 2.0]])
    x = jnp.asarray([[[3.0, 4.0]] * 3])
    token_ids = [[0, 1, 1]]  # 0 xor 0, 1 xor 0, 1 xor 1
    y, _ = memory.prefill(x, rows_of(token_ids, [[1, 1, 1]]))
    silu = [2 / (1 + np.exp(-2)), 2 / (1 + np.exp(-2)), 5 / (1 + np.exp(-5))]
    gates = [0.76226, 0.23774, 0.76226]
    np.testing.assert_allclose(y[0, :, 0], np.add(gates, silu), atol=2e-5)
    np.testing.assert_allclose(y[0, :, 1], y[0, :, 0], rtol=1e-6)


def _oracle(weights, x, token_ids, ngrams, memory):
    """Addends of all real tokens, by loops over rows, tokens and heads, with hashes in Python's integers."""

    def norm(vector, scale):
        return vector * scale / jnp.sqrt(jnp.mean(vector**2) + 1e-5)

    def gated(b, t):
        def token(by):
            inside = t - by >= 0 and IDS[b, t - by] == IDS[b, t]
            return int(token_ids[b, t - by]) if inside else memory.pad_id

        parts, first = [], 0
        for order, sizes in zip(ngrams.orders, ngrams.sizes, strict=True):
            mixed = 0
            for by in range(order):
                mixed ^= token(by) * ngrams.multipliers[by]
            for size in sizes:
                parts.append(weights["vectors"][first + mixed % size])
                first += size
        read = jnp.concatenate(parts)
        query = norm(x[b, t], weights["query_norm"]["scale"])
        score = query @ norm(read @ weights["key"], weights["key_norm"]["scale"]) / x.shape[-1] ** 0.5
        root = jnp.sqrt(jnp.maximum(jnp.abs(score), 1e-6)) * jnp.sign(score)
        return read @ weights["value"] / (1 + jnp.exp(-root))

    values = {(b, t): gated(b, t) for b, t in zip(*np.nonzero(IDS), strict=True)}
    found = []
    for (b, t), value in values.items():
        total = jnp.zeros_like(value)
        for tap in range(memory.conv_width):
            u = t - tap * memory.orders[-1]
            if u >= 0 and IDS[b, u] == IDS[b, t]:
                total += norm(values[b, u], weights["value_norm"]["scale"]) * weights["conv"][-1 - tap]
        found.append(value + total / (1 + jnp.exp(-total)))
    return jnp.zeros_like(x).at[np.nonzero(IDS)].set(jnp.stack(found))


@pytest.fixture(scope="module")
def layer():
    """A memory of width 8, its weights, and its ngrams."""
    config = ModelConfig(d_model=8, vocab_size=48, memory=SMALL)
    ngrams = SMALL.hashes(48)[1]
    graphdef, state = nnx.split(NgramMemory(config, ngrams, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) / 2 + (leaf.shape == (8,)), jnp.float32)

    return graphdef, state, jax.tree.map(draw, nnx.to_pure_dict(state)), ngrams


def test_it_equals_the_loops_in_values_and_gradients_alone_and_on_eight_devices(layer, rng):
    """Documents are packed, and the second row is padded. Tables are split by rows over four devices of each half of
    the row."""
    graphdef, state, weights, ngrams = layer
    token_ids = rng.integers(0, 48, IDS.shape)
    x, cotangent = jnp.asarray(rng.normal(size=(2, *IDS.shape, 8)), jnp.float32)

    def loss(weights, x):
        y = nnx.merge(graphdef, weights).prefill(x, rows_of(token_ids, IDS))[0] * (IDS > 0)[..., None]
        return jnp.sum(y * cotangent), y

    def exact(weights, x):
        y = _oracle(weights, x, token_ids, ngrams, SMALL)
        return jnp.sum(y * cotangent), y

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    alone, expected = run(weights, x), jax.jit(jax.grad(exact, (0, 1), has_aux=True))(weights, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), alone, expected)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in jax.tree.leaves(expected[0][0]))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, parameter_shardings(mesh, state))
        assert placed["vectors"].sharding.shard_shape((1024, 3)) == (256, 3)
        spread = run(placed, jax.device_put(x, partition_specs.shardings(mesh, partition_specs.BATCH)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), spread, alone)


def test_steps_after_a_prompt_equal_whole_rows(layer, rng):
    """Prompts of 5 and 1 tokens, padded, then 3 more tokens one by one."""
    graphdef, _, weights, _ = layer
    x, token_ids = jnp.asarray(rng.normal(size=(2, 8, 8)), jnp.float32), rng.integers(0, 48, (2, 8))
    lengths = np.asarray([5, 1])

    @jax.jit
    def texts(weights, x):
        memory, found, wanted = nnx.merge(graphdef, weights), [], []
        whole, _ = memory.prefill(x, rows_of(token_ids, np.ones((2, 8), int)))
        _, state = memory.prefill(x[:, :5], rows_of(token_ids[:, :5], (np.arange(5) < lengths[:, None]).astype(int)))
        for further in range(3):
            at = np.arange(2), lengths + further
            y, state = memory.step(x[at][:, None], rows_of(token_ids[at][:, None], np.ones((2, 1), int)), state)
            found, wanted = [*found, y[:, 0]], [*wanted, whole[at]]
        return found, wanted

    np.testing.assert_allclose(*texts(weights, x), rtol=1e-5, atol=1e-6)


def test_greedy_text_with_its_state_equals_that_without():
    config = tiny_model(memory=SMALL, gate="none")
    _, parameters = random_parameters(config)
    texts = sampling.sample(config, parameters, PROMPTS, 5, GREEDY)
    np.testing.assert_array_equal(texts, _without_cache(config, parameters, PROMPTS, 5))
    plain = dataclasses.replace(config, memory=MemoryConfig())
    del parameters["segment_1"]["block_0"]["memory"]
    stacked = jax.tree.map(lambda *layers: jnp.concatenate(layers), parameters["segment_0"], parameters["segment_1"])
    others = {name: tree for name, tree in parameters.items() if name not in ("segment_0", "segment_1")}
    assert (texts != np.stack(sampling.sample(plain, others | {"segment_0": stacked}, PROMPTS, 5, GREEDY))).any()


def test_it_is_counted_by_hand():
    """D 16, E_in = 2 orders · 6: keys and values 2 · 12·16 = 384, three norms of 16, a filter of 2·16, and a table of
    1024 rows of 3, of which a token reads 4. Experts: 4, of which 2 are visited, 3·16·20 each in one of two layers."""
    config = tiny_model(memory=SMALL, gate="mixtral", first_dense=1)
    plain = dataclasses.replace(config, memory=MemoryConfig())
    (total, active), (other_total, other_active) = (flops.count_parameters(each) for each in (config, plain))
    assert total - other_total == 384 + 48 + 32 + 3072
    assert active - other_active == 384 + 48 + 32 + 12
    assert flops.sparse_parameters(config) == (2 * 3 * 16 * 20, 3072 - 12)
    more = flops.train_flops_per_token(config, 7) - flops.train_flops_per_token(plain, 7)
    assert more == 6 * (384 + 48 + 32)
    program: Any = types.SimpleNamespace(config=Config(model=config), mesh=types.SimpleNamespace(shape={"expert": 1}))
    assert f"{3060 / 4980:.1%} of the 4,980 sparse parameters" in _description(program)
    parameters = nnx.to_pure_dict(abstract_parameters(config))
    paths = [[key.key for key in path] for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
    assert {part_of(path) for path in paths if "memory" in path} == {"memory"}
    assert [kind.memory is not None for kind in layer_kinds(config)] == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (1, 0)}, r"layers=\(1, 0\): must be increasing layer numbers from 0 to 1$"),
        ({"layers": (2,)}, r"layers=\(2,\): must be increasing layer numbers from 0 to 1$"),
        ({"orders": (1, 2)}, r"orders=\(1, 2\): must be increasing numbers from 2 to 16$"),
        ({"orders": ()}, r"orders=\(\): must be increasing numbers from 2 to 16$"),
        ({"heads": 4}, r"dim=6: must be a multiple of heads=4$"),
        ({"rows": 2**30}, r"rows=1073741824: makes a table of \d+ rows, must make one of at most 2147483647$"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=rf"^model\.memory\.{message}"):
        tiny_model(memory=dataclasses.replace(SMALL, **settings), gate="none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_layers": 1}, "must be empty with model.encoder_layers"),
        ({"base_d_model": 8}, "must be empty with model.base_"),
        ({"prediction_layers": 1}, "must not have the last layer with model.prediction_layers"),
    ],
)
def test_models_without_a_place_for_it_are_refused(settings, message):
    with pytest.raises(ConfigError, match=rf"^model\.memory\.layers=\(1,\): {message}"):
        tiny_model(memory=SMALL, gate="none", **settings)


def test_what_cannot_have_it_is_refused():
    config = Config(model=tiny_model(memory=SMALL))
    with pytest.raises(ConfigError, match=r"^model\.memory\.layers=\(1,\): must be \(\) to draft"):
        require_ability(config.model, "drafting", "to draft")
    with pytest.raises(ConfigError, match=r"no open architecture computes this model: .* lacks .*model\.memory"):
        write_config(config)
    with pytest.raises(ConfigError, match=r"^model\.memory\.layers=\(1,\): the page supports only \(\)"):
        supported.check(config.model)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=6))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=2))
    with pytest.raises(ConfigError, match=r"^model\.memory\.layers=\(1,\): must be \(\) with mesh\.pipeline=2"):
        pipeline.check(config, {"pipeline": 2})
    train = dataclasses.replace(config.train, batch_size=6)
    config = dataclasses.replace(config, model=tiny_model(memory=SMALL, d_model=18), train=train)
    with pytest.raises(ConfigError, match=r"^model\.memory\.rows: rows of a layer's table=1024: must be divisible by"):
        validate_mesh(config, {"data": 1, "fsdp": 3, "expert": 1, "tensor": 1})
