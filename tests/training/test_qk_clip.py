"""QK-clip: largest attention scores, the factors of queries and keys, and train steps on meshes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.config import (
    Config,
    ConfigError,
    DataConfig,
    DeltaNetConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from moe.config.mixers import GroupedQuery, MultiHeadLatent, SwitchHead
from moe.layers.attention import largest
from moe.layers.attention.scoring import Scoring
from moe.layers.inputs import Rows
from moe.layers.mixers.attention import Attention
from moe.layers.mixers.latent import LatentAttention
from moe.parallel.mesh import make_mesh
from moe.training.batches import place
from moe.training.qk_clip import score_factor
from moe.training.step import build
from moe.training.train import train
from tests.helpers import random_state, slow_case, tiny_model
from tests.run_helpers import ONE as ONE_DEVICE
from tests.run_helpers import SETTINGS, Interrupted, compile_once, interrupted, rows, state_of, tiny

T = 8
LATENT = MultiHeadLatent(heads=2, head_dim=5, rope_dim=2, value_dim=3, rank=4)


def test_factors_of_heads_that_share_keys():
    """Scores 150, 400 | 50, 100 at a threshold of 100: γ is 2/3, 1/4 | 1, 1. The first key head serves a head of 1/4,
    so it and both of its queries get the root, 1/2."""
    mixer = GroupedQuery(heads=4, kv_heads=2, head_dim=3)
    gamma = score_factor(jnp.asarray([[150.0, 400, 50, 100]]), 100.0)
    np.testing.assert_allclose(gamma, [[2 / 3, 1 / 4, 1, 1]], rtol=1e-6)
    factors = Attention.score_factors(mixer, gamma)
    np.testing.assert_array_equal(factors["query"], np.reshape([0.5, 0.5, 1, 1], (1, 1, 4, 1)))  # [L,D,N,H]
    np.testing.assert_array_equal(factors["query_bias"], np.reshape([0.5, 0.5, 1, 1], (1, 4, 1)))  # [L,N,H]
    np.testing.assert_array_equal(factors["key"], np.reshape([0.5, 1], (1, 1, 2, 1)))
    np.testing.assert_array_equal(factors["key_bias"], np.reshape([0.5, 1], (1, 2, 1)))


def test_factors_of_latent_attention():
    """γ of 1/4 and 1: three unrotated dimensions by 1/2, the rotated two of queries by 1/4, values not at all."""
    factors = LatentAttention.score_factors(LATENT, score_factor(jnp.asarray([400.0, 99.0]), 100.0))
    expected = [[0.5, 0.5, 0.5, 0.25, 0.25], [1] * 5]
    np.testing.assert_array_equal(factors["query"], [expected])  # [D,N,H]
    np.testing.assert_array_equal(factors["query_up"], [expected])
    np.testing.assert_array_equal(factors["kv_up"], [[[0.5, 0.5, 0.5, 1, 1, 1], [1] * 6]])
    assert factors.keys() == {"query", "query_up", "kv_up"}


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("prefix", [False, True])
def test_largest_scores_are_those_of_plain_loops(monkeypatch, window, prefix):
    """Two rows of two documents and padding, in blocks of 4 queries."""
    monkeypatch.setattr(largest, "_LARGEST_BLOCK", 4)
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, T, 4, 3)), random.normal(size=(2, T, 2, 3))
    segments = np.asarray([[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 0, 0]])
    seen_by_all = np.asarray([[0, 0, 1, 0, 1, 1, 0, 0]] * 2) if prefix else np.zeros((2, T))
    scores: dict[int, list[float]] = {n: [] for n in range(4)}
    for b, t, u, n in np.ndindex(2, T, T, 4):
        causal = u <= t and (not window or t - u < window)
        if segments[b, t] == segments[b, u] > 0 and (causal or seen_by_all[b, u]):
            scores[n].append(0.5 * query[b, t, n] @ key[b, u, n // 2])
    scoring = Scoring(window, prefix=jnp.asarray(seen_by_all) if prefix else None, scale=0.5)
    arrays = jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32), *[jnp.asarray(segments)] * 2
    found = largest.largest_scores(*arrays, scoring)
    np.testing.assert_allclose(found, [max(scores[n]) for n in range(4)], rtol=1e-5)


@pytest.mark.parametrize("kind", ["heads", "latent", "latent queries"])
def test_clipped_heads_score_the_threshold_and_others_what_they_did(kind):
    latent = {"kv_lora_rank": 5, "value_dim": 4, "rope_dim": 2, "q_lora_rank": 3 if kind == "latent queries" else 0}
    config = tiny_model(num_kv_heads=4, **({"attention_bias": "qkv"} if kind == "heads" else latent))
    mixer = (GroupedQuery if kind == "heads" else MultiHeadLatent).of(config)
    layer = (Attention if kind == "heads" else LatentAttention)(config, mixer, rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    nnx.update(layer, jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), nnx.state(layer)))
    x, ones = jnp.asarray(random.normal(size=(2, T, 16)), jnp.float32), jnp.ones((2, T), jnp.int32)
    rows = Rows(ones, ones, jnp.broadcast_to(jnp.arange(T), (2, T)))
    before = layer.largest_scores(x, rows)
    threshold = float(jnp.median(before))  # two heads are above it
    factors = layer.score_factors(mixer, score_factor(before, threshold))
    for name in factors.keys() & nnx.to_pure_dict(nnx.state(layer)).keys():
        parameter = getattr(layer, name)
        parameter[...] = parameter[...] * factors[name]
    np.testing.assert_allclose(layer.largest_scores(x, rows), jnp.minimum(before, threshold), rtol=2e-5)


def _config(microbatches: int = 1, qk_clip: float = 0.5, **model: Any) -> Config:
    """Attention in the layers 1 and 3 of four: rows of the scores are not the numbers of their layers."""
    delta = {"pattern": "(delta attention) x 2", "num_layers": 4, "delta_net": DeltaNetConfig(2, 2, 4, 4, 2)}
    return Config(
        model=tiny_model(**{"gate": "none", **delta, **model}),
        data=DataConfig(sequence_length=T),
        optimizer=OptimizerConfig(warmup_steps=0, qk_clip=qk_clip, ema_decay=0.5),
        train=TrainConfig(batch_size=4, accumulation_steps=microbatches),
    )


def _step(config: Config, sizes: MeshConfig) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Parameters and weights' average after one train step by name, and the terms of its metrics."""
    devices = int(np.prod(dataclasses.astuple(sizes)))
    mesh = make_mesh(sizes, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = build(dataclasses.replace(config, mesh=sizes), mesh)
        tokens = np.random.default_rng(0).integers(1, 48, (4, T + 1)).astype(np.int32)
        ones, columns = np.ones((4, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (4, 1))
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "positions": columns}
        after, metrics = program.train_step(random_state(program), place(batch, mesh))
        leaves = jax.tree_util.tree_leaves_with_path((after.parameters, after.optimizer[-1]))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, jax.device_get(metrics.terms)


ONE = MeshConfig(data=1)


@pytest.fixture(scope="module")
def clipped():
    """A step on one device, in one batch."""
    return _step(_config(), ONE)


def test_a_step_clips_what_the_update_leads_to(clipped):
    """Against a step with a threshold that no score reaches: queries and keys of the heads above 0.5 are smaller by one
    factor each, and so is their average; all else is equal."""
    plain, terms = _step(_config(qk_clip=1e6), ONE)
    found, own_terms = clipped
    np.testing.assert_allclose(own_terms["largest_score"], terms["largest_score"], rtol=1e-6)
    assert terms["clipped_heads"] == 0 < own_terms["clipped_heads"] <= 8
    for name, values in found.items():
        if "['attention']['query']" in name or "['attention']['key']" in name:
            ratios = values / plain[name]  # [R,D,heads,H]
            heads = np.median(ratios, axis=(1, 3), keepdims=True)
            np.testing.assert_allclose(ratios, np.broadcast_to(heads, ratios.shape), rtol=1e-3, err_msg=name)
            worst = own_terms["largest_score"]  # of each layer's heads, and so of one of its keys
            np.testing.assert_allclose(heads.min(axis=(1, 2, 3)), np.sqrt(0.5 / worst), rtol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(values, plain[name], err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "model"),
    [
        (MeshConfig(data=2, tensor=2), {}),
        slow_case(MeshConfig(data=1, fsdp=2, expert=2), {}),
    ],
)
def test_a_mesh_clips_as_one_device(clipped, sizes, model):
    _check(_step(_config(**model), sizes), clipped)


@pytest.mark.parametrize(
    ("microbatches", "sizes", "model"),
    [
        (2, ONE, {}),
        slow_case(2, MeshConfig(data=1, pipeline=2), {"pattern": "", "num_layers": 3}),
        slow_case(1, MeshConfig(data=4, context=2), {"pattern": "", "attention": "blocked"}),
    ],
)
def test_microbatches_stages_and_parts_of_rows_clip_by_the_largest_score(clipped, microbatches, sizes, model):
    expected = _step(_config(**model), ONE) if model else clipped
    _check(_step(_config(microbatches, **model), sizes), expected)


def _check(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            if name != "cross_entropy":
                np.testing.assert_allclose(values, other[name], atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_a_run_that_is_continued_writes_the_bytes_of_an_undisturbed_one(directory, tmp_path):
    """Interrupted before step 4, it goes on from step 2; heads are clipped before and after."""
    changes = {"optimizer.qk_clip": 0.02, "optimizer.ema_decay": 0.5, "train.num_steps": 5, "train.save_every": 2}
    config, make_program = tiny(directory, **SETTINGS | changes), compile_once()
    train(config, str(tmp_path / "whole"), ONE_DEVICE, make_program=make_program)
    with interrupted(4), pytest.raises(Interrupted):
        train(config, str(tmp_path / "run"), ONE_DEVICE, make_program=make_program)
    train(config, str(tmp_path / "run"), ONE_DEVICE, make_program=make_program)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert all(row["clipped_heads"] > 0 for row in rows(tmp_path / "run", "train"))
    program = make_program(config, make_mesh(ONE, ONE_DEVICE))
    states = [state_of(program, tmp_path / name, 5) for name in ("run", "whole")]
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qk_norm": "head"}, r"model\.qk_norm='head': must be 'none' with optimizer\.qk_clip"),
        ({"clip_qkv": 8.0}, r"model\.clip_qkv=8\.0: must be 0\.0 with optimizer\.qk_clip"),
        ({"pattern": "", "relative_buckets": 8}, r"model\.relative_buckets=8: must be 0 with optimizer\.qk_clip"),
        ({"pattern": "", "mixer": SwitchHead()}, r"model\.mixer='switch_head': must be None with optimizer\.qk_clip"),
        ({"pattern": "", "prediction_layers": 1, "gate": "mixtral"}, r"model\.prediction_layers=1: must be 0 with"),
        ({"pattern": "delta"}, r"optimizer\.qk_clip=0\.5: needs a layer with attention"),
    ],
)
def test_what_cannot_be_clipped_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        _config(**settings)


def test_fixed_attention_is_refused():
    optimizer = OptimizerConfig(qk_clip=1.0, frozen=("attention",))
    with pytest.raises(ConfigError, match=r"optimizer\.frozen=.*must not name attention with optimizer\.qk_clip"):
        Config(optimizer=optimizer)
    with pytest.raises(ConfigError, match=r"lora\.rank=2: must be 0 with optimizer\.qk_clip"):
        dataclasses.replace(
            Config(), optimizer=OptimizerConfig(qk_clip=1.0), lora=LoraConfig(rank=2),
            start=dataclasses.replace(Config().start, checkpoint="x"),
        )  # fmt: skip
