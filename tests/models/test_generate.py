"""Generation with a key/value cache equals generation without one, whatever else is in the batch and on any mesh."""

from __future__ import annotations

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig, validate_mesh
from moe.config.moe_section import Losses
from moe.config.registry import LAYERS
from moe.interop import load_huggingface
from moe.models import kv_cache, sampling
from moe.models.decoder import Transformer
from moe.models.factory import abstract_model
from moe.models.sampling import Sampling
from moe.parallel import partition_specs
from moe.parallel.mesh import make_mesh
from moe.parallel.parameters import parameter_shardings, parameter_specs
from tests.helpers import moe_config, random_parameters, slow_case
from tests.interop.test_interop import CASES, _expected

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("temperature", [-1.0, math.inf, math.nan])
def test_an_impossible_temperature_is_refused(temperature):
    with pytest.raises(ConfigError, match="must be at least 0 and finite"):
        Sampling(temperature=temperature)


def _model(**changes):
    moe = moe_config(**{"num_experts": 4, "d_ff": 12, "dispatch": "einsum", **changes.pop("moe", {})})
    sizes = {"vocab_size": 48, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "d_ff": 20}
    config = ModelConfig(**{**sizes, "num_layers": 2, **changes}, moe=moe)
    _, variables = random_parameters(config)
    return config, jax.tree.map(lambda leaf: 2 * leaf, variables)


def _without_cache(config, variables, prompts, num_tokens):
    """Recompute whole rows for every token, padded to one length so that the program compiles once."""
    config = sampling.without_drops(config)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    forward = jax.jit(lambda tokens, ids: nnx.merge(graphdef, variables)(tokens, ids).logits)
    lengths = np.asarray([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max() + num_tokens), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    for _ in range(num_tokens):
        logits = np.asarray(forward(tokens, (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)))
        tokens[np.arange(len(prompts)), lengths] = logits[np.arange(len(prompts)), lengths - 1].argmax(-1)
        lengths += 1
    return [row[length - num_tokens : length] for row, length in zip(tokens, lengths, strict=True)]


PROMPTS = [[5, 9, 2, 30, 11, 7, 8], [3], [40, 41, 2, 1]]


@pytest.mark.parametrize(
    "changes",
    [
        slow_case({"sliding_window": 3, "pattern": "attention sliding", "moe": {"layers": (0,)}}),
        slow_case(
            {"moe": {"dispatch": "gather", "shared_d_ff": 8, "gate": "switch"}, "num_kv_heads": 1, "qk_norm": "head"}
        ),
        slow_case({"sliding_window": 4}),
        slow_case({"tie_embeddings": True, "moe": {"gate": "none"}}),
    ],
    ids=["a window in one layer", "gather", "ring", "dense"],
)
def test_greedy_text_with_a_cache_equals_that_without(changes):
    """All slow: test_hybrid.py and the references of other forms of attention below are always run."""
    config, variables = _model(**changes)
    texts = sampling.sample(config, variables, PROMPTS, 10, GREEDY)
    np.testing.assert_array_equal(texts, _without_cache(config, variables, PROMPTS, 10))


#: One family for each form of attention; the others run with the slow tests.
_OFTEN = ("deepseek_v3", "gpt_oss")


@pytest.mark.parametrize(
    "path",
    [case if case.id in _OFTEN else slow_case(*case.values, id=case.id) for case in CASES],
)
def test_greedy_text_is_that_of_the_reference_library(path):
    expected = _expected(path)["greedy"]
    width = 8 if expected.shape[1] == 20 else 6  # prompt length
    model, config = load_huggingface(path)
    variables = nnx.to_pure_dict(nnx.state(model))
    texts = sampling.sample(config.model, variables, list(expected[:, :width]), expected.shape[1] - width, GREEDY)
    np.testing.assert_array_equal(texts, expected[:, width:])


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours():
    config, variables = _model(num_layers=1)
    options = Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=3)
    together = sampling.sample(config, variables, PROMPTS, 8, options)
    alone = sampling.sample(config, variables, PROMPTS[:1], 8, options)
    np.testing.assert_array_equal(together[0], alone[0])
    assert together[0].tolist() != together[1].tolist()


@pytest.mark.parametrize("gate", [slow_case("random"), "balanced"])
@pytest.mark.slow
def test_rows_of_gates_that_draw_or_count_tokens_are_independent_too(gate):
    config, variables = _model(num_layers=1, moe={"gate": gate, "num_experts": 4})
    together = sampling.sample(config, variables, PROMPTS, 6, GREEDY)
    for prompt, text in zip(PROMPTS, together, strict=True):
        (alone,) = sampling.sample(config, variables, [prompt], 6, GREEDY)
        np.testing.assert_array_equal(text, alone)


@pytest.mark.parametrize("gate", ["balanced", slow_case("random")])
def test_a_source_is_encoded_independently_of_others_by_these_gates(gate):
    config, variables = _model(
        num_layers=1, encoder_layers=1, moe={"gate": gate, "layers": (0,), "dispatch": "dropless"}
    )
    model = nnx.merge(nnx.graphdef(abstract_model(config)), variables)
    both, lengths = jnp.array([[3, 9, 4, 7, 1, 2, 5], [5, 6, 0, 0, 0, 0, 0]]), jnp.array([7, 2])
    together, alone = kv_cache.encode(model, both, lengths), kv_cache.encode(model, both[1:, :2], lengths[1:])
    for ours, theirs in zip(jax.tree.leaves(together.layers), jax.tree.leaves(alone.layers), strict=True):
        np.testing.assert_allclose(ours[:, 1, :2], theirs[:, 0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, expert=4), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)])
def test_a_mesh_generates_the_same_text(mesh):
    config, variables = _model(sliding_window=5)
    want = sampling.sample(config, variables, PROMPTS, 6, GREEDY)
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        specs = parameter_specs(nnx.state(abstract_model(config)))
        placed = jax.device_put(variables, partition_specs.shardings(devices, specs))
        text = sampling.sample(config, placed, PROMPTS, 6, GREEDY)
    np.testing.assert_array_equal(text, want)


def test_a_model_too_large_for_each_device_is_split_over_all():
    """Half of a device holds all parameters or all but one; split, a device has an eighth of all but norms, routers and
    what 8 does not divide."""
    config = ModelConfig(moe=MoEConfig(num_experts=4, gate=LAYERS["mixtral"].gate), d_model=64, num_layers=2)
    abstract = abstract_model(config)
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(abstract)))]

    def mesh(limit):
        devices = [types.SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit})] * 8
        return sampling.default_mesh(config, devices)

    assert mesh(8 * sum(sizes)) == mesh(None) == MeshConfig()
    split = mesh(8 * sum(sizes) - 1)
    assert split == MeshConfig(data=1, fsdp=-1, expert=4)
    dense = dataclasses.replace(config, moe=MoEConfig(gate=None))
    assert sampling.default_mesh(dense, [types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1})]).expert == 1
    where = parameter_shardings(make_mesh(split), nnx.state(abstract))
    held = jax.tree.map(
        lambda leaf, there: math.prod(there.shard_shape(leaf.shape)), nnx.to_pure_dict(nnx.state(abstract)), where
    )
    assert sum(jax.tree.leaves(held)) < 0.13 * sum(sizes)


def test_a_run_with_microbatches_or_groups_of_several_rows_can_generate_on_a_mesh():
    config = Config(
        model=ModelConfig(moe=MoEConfig(num_experts=8, group_size=1024)),
        train=TrainConfig(batch_size=32, accumulation_steps=4),
        data=DataConfig(streams=4),
    )
    validate_mesh(sampling.for_generation(config, 8), {"data": 4, "fsdp": 1, "expert": 2, "tensor": 1})
    moe = MoEConfig(num_experts=8, dispatch="dropless", group_size=768, exchange_chunks=3, exchange_hosts=4)
    chunks = dataclasses.replace(config, model=ModelConfig(moe=moe), train=TrainConfig(batch_size=12))
    validate_mesh(sampling.for_generation(chunks, 2), {"data": 1, "fsdp": 1, "expert": 2, "tensor": 1})
    with pytest.raises(ConfigError, match="num_experts"):
        validate_mesh(sampling.for_generation(config, 3), {"data": 1, "fsdp": 1, "expert": 3, "tensor": 1})


def test_a_gate_that_looks_ahead_is_refused_for_that_whatever_its_groups():
    """Groups of two rows would not fit the one row of a device either, which is not what the user can change."""
    moe = MoEConfig(gate=LAYERS["expert_choice"].gate, losses=Losses(), group_size=512, accept_future_leak=True)
    config = Config(model=ModelConfig(moe=moe))
    with pytest.raises(ConfigError, match=r"^model\.moe\.gate='expert_choice': routes by the other tokens"):
        sampling.for_generation(config, 1)


@pytest.mark.slow
def test_expert_choice_keeps_its_capacity():
    """The capacity is part of the function that a reference model computes."""
    config = ModelConfig(moe=moe_config(gate="expert_choice", expert_capacity=3, accept_future_leak=True))
    assert sampling.without_drops(config) == config


def test_a_row_ends_with_its_stop_token():
    config, variables = _model(num_layers=1, moe={"gate": "none"})
    free = sampling.sample(config, variables, PROMPTS, 8, GREEDY)
    stop = int(free[0][2])
    stopped = sampling.sample(config, variables, PROMPTS, 8, Sampling(temperature=0, stop_tokens=(stop,)))
    for whole, cut in zip(free, stopped, strict=True):
        end = whole.tolist().index(stop) + 1 if stop in whole else len(whole)
        assert cut.tolist() == whole[:end].tolist()
    every = Sampling(temperature=0, stop_tokens=tuple(range(48)))
    assert [len(column) for column in sampling.stream(config, variables, PROMPTS, 8, every)] == [3]


def test_long_prompts_are_padded_to_whole_blocks():
    assert [sampling.pad_prompts([[1] * length])[0].shape[1] for length in (511, 512, 1021)] == [511, 512, 1024]


def test_prompts_of_few_widths_share_a_program(monkeypatch):
    """Up to 512 tokens a prompt is padded to a power of two, beyond to a multiple of 128."""
    sizes = []

    def programs(config, rows, length, options):
        def begin(variables, seed, token_ids, lengths):
            sizes.append((token_ids.shape, lengths.tolist(), length))
            return None, None, None, None

        return begin, None

    monkeypatch.setattr(sampling, "_programs", programs)
    for width in (1, 5, 8, 300, 513):
        sampling.sample(ModelConfig(vocab_size=48), {}, [[1] * width], 0)
    padded = {1: 1, 5: 8, 8: 8, 300: 512, 513: 640}
    assert sizes == [((1, size), [width], size) for width, size in padded.items()]


def test_choosing_by_hand():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]).repeat(4000, 0))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(**options):
        chosen = sampling.choose(logits, keys, Sampling(**{"temperature": 1.0, **options}))
        return np.bincount(chosen, minlength=4) / 4000

    np.testing.assert_allclose(shares(), [0.4, 0.3, 0.2, 0.1], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [4 / 7, 3 / 7, 0, 0], atol=0.03)
    # 0.4 + 0.3 = 0.7 reaches 0.65 but not 0.75.
    np.testing.assert_allclose(shares(top_p=0.65), [4 / 7, 3 / 7, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_k=3), [4 / 9, 3 / 9, 2 / 9, 0], atol=0.03)
    # Of these three, 4/9 + 3/9 = 0.78 reaches 0.75.
    np.testing.assert_allclose(shares(top_k=3, top_p=0.75), [4 / 7, 3 / 7, 0, 0], atol=0.03)
    # Squared and normalised: 16 : 9 : 4 : 1.
    np.testing.assert_allclose(shares(temperature=0.5), np.asarray([16, 9, 4, 1]) / 30, atol=0.03)
    assert shares(temperature=0)[0] == 1
    for temperature in (1e-30, 1.2e-38, 1e-38, 1e-45):
        assert shares(temperature=temperature)[0] == 1, temperature


def test_of_equal_logits_the_lower_ids_are_chosen():
    """By likelihood, then by id: 1, 3, 0, 2, which together have 0.3, 0.6, 0.8 and 1."""
    logits, keys = jnp.log(jnp.asarray([[0.2, 0.3, 0.2, 0.3]] * 100)), jax.random.split(jax.random.key(0), 100)

    def chosen(**options):
        return set(np.asarray(sampling.choose(logits, keys, Sampling(temperature=1.0, **options))).tolist())

    assert chosen(top_k=1) == chosen(top_p=0.2) == {1}
    assert chosen(top_k=2) == chosen(top_p=0.5) == {1, 3}
    assert chosen(top_k=3) == chosen(top_p=0.7) == {0, 1, 3}


def test_every_row_and_position_has_a_draw_of_its_own():
    """So hot that all tokens are equally likely: the token of row b at position p is the draw of (seed, b, p)."""
    config, variables = _model(num_layers=1, moe={"gate": "none"})
    prompts = [[1, 2, 3], [4], [1, 2, 3]]
    found = sampling.sample(config, variables, prompts, 5, Sampling(temperature=1e9, seed=3))

    def draw(row, position, seed=3):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
        return int(jax.random.categorical(key, jnp.zeros(48)))

    expected = [[draw(row, first + i) for i in range(5)] for row, first in enumerate((3, 1, 3))]
    assert [row.tolist() for row in found] == expected
    assert expected[0] != expected[2]
    # Another seed draws other tokens by the same programs.
    compiled = sampling._programs.cache_info().misses
    other = sampling.sample(config, variables, prompts, 5, Sampling(temperature=1e9, seed=2**31 - 1))
    assert other[1].tolist() == [draw(1, 1 + i, seed=2**31 - 1) for i in range(5)]
    assert sampling._programs.cache_info().misses == compiled


def test_the_ring_holds_the_window_by_hand():
    """W = 3: five positions leave 3, 4, 2 in slots 0, 1, 2; two leave 0, 1 and an empty slot. Then 5 goes into slot
    2."""
    config, variables = _model(sliding_window=3, num_layers=1, moe={"gate": "none"})
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))), variables)
    tokens = jnp.asarray([[1, 2, 3, 4, 5], [1, 2, 0, 0, 0]])
    _, filled, _ = kv_cache.run_prompt(model, tokens, jnp.asarray([5, 2]), kv_cache.empty(config, 2, 9))
    assert filled[0][0]["mixer"].position[0].tolist() == [[3, 4, 2], [0, 1, -1]]
    _, filled, _ = kv_cache.extend(model, tokens[:, :1], jnp.asarray([[5], [2]]), jnp.ones(2, bool), filled)
    assert filled[0][0]["mixer"].position[0].tolist() == [[3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize(
    ("prompts", "options", "pattern"),
    [
        ([], {}, "give at least one"),
        ([[1], []], {}, "each of at least one token"),
        ([[48]], {}, "tokens must be from 0 to 47"),
        ([[1]], {"top_p": 0.0}, r"top_p=0\.0: must be above 0"),
        ([[1]], {"temperature": -1.0}, r"temperature=-1\.0"),
        ([[1]], {"top_k": -1}, "top_k=-1"),
    ],
)
def test_impossible_prompts_and_options_are_refused(prompts, options, pattern):
    config, variables = _model()
    with pytest.raises(ConfigError, match=pattern):
        sampling.sample(config, variables, prompts, 2, Sampling(**options))
