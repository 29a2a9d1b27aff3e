"""Rows split over the mesh axis `context`: equal values and gradients, only keys and values gathered, refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from moe.config import Config, ConfigError, MeshConfig, validate_mesh
from moe.config.parse import from_config_dict
from moe.configs import base
from moe.models import sampling
from moe.parallel.mesh import make_mesh
from moe.training.batches import place
from moe.training.step import build
from tests.helpers import random_state, slow_case, step_gradients

T = 32
SPLIT = (MeshConfig(4, 1, 1, 1, 2), MeshConfig(1, 1, 2, 1, 4), MeshConfig(1, 2, 1, 2, 2))  # data, fsdp, expert, ...
SETTINGS = {
    "model.vocab_size": 32, "model.d_model": 8, "model.num_layers": 1, "model.num_heads": 4, "model.num_kv_heads": 2,
    "model.head_dim": 4, "model.d_ff": 8, "model.moe.d_ff": 8, "model.moe.num_experts": 4, "model.moe.group_size": 8,
    "data.sequence_length": T, "train.sample_tokens": 0,
}  # fmt: skip


def _config(mesh: MeshConfig, **overrides) -> Config:
    tree = base.get_config()
    settings = {**SETTINGS, "train.batch_size": mesh.data * mesh.fsdp * mesh.expert, **overrides}
    for path, value in settings.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return dataclasses.replace(from_config_dict(tree), mesh=mesh)


def _batch(rows: int) -> dict[str, np.ndarray]:
    """Packed documents that begin at any position, including the boundaries between devices."""
    rng = np.random.default_rng(0)
    starts = rng.random((rows, T)) < 0.15
    starts[:, [0, T // 2]] = True, False
    starts[0, T // 4] = True
    segment_ids = np.cumsum(starts, axis=1)
    columns = np.arange(T)
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    tokens = rng.integers(1, 32, (rows, T + 1))
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segment_ids, "positions": positions}
    return {key: value.astype(np.int32) for key, value in arrays.items()}


def _gradients(config: Config, mesh: MeshConfig) -> list[np.ndarray]:
    """Loss, layer reports and gradients of a training batch, and the sums of an evaluation batch."""
    config = dataclasses.replace(config, mesh=mesh)
    devices = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor * mesh.context
    where = make_mesh(mesh, jax.devices()[:devices])
    validate_mesh(config, where.shape)
    with jax.set_mesh(where):
        program = build(config, where)
        state, batch = random_state(program), place(_batch(config.train.batch_size), where)
        found = step_gradients(program)(state, batch)
        evaluated = program.eval_step(state.variables, batch, np.ones(32, np.int32))
    return [np.asarray(leaf) for leaf in jax.tree.leaves((found, evaluated))]


@pytest.mark.parametrize(
    ("mesh", "overrides"),
    [
        (SPLIT[0], {"model.sliding_window": 7, "model.moe.dispatch": "einsum"}),
        slow_case(SPLIT[0], {"model.sliding_window": 7}),
        slow_case(
            SPLIT[1], {"model.moe.dispatch": "dropless", "model.attention": "blocked", "model.attention_sinks": True}
        ),
        slow_case(SPLIT[2], {"model.moe.dispatch": "einsum", "model.tie_embeddings": True}),
        slow_case(SPLIT[1], {"model.attention": "ring", "model.moe.dispatch": "einsum"}),
    ],
)
def test_a_split_row_has_the_values_and_gradients_of_a_whole_one(mesh, overrides):
    config = _config(mesh, **overrides)
    whole, split = _gradients(config, MeshConfig(1)), _gradients(config, mesh)
    assert len(whole) == len(split) > 20
    for expected, found in zip(whole, split, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.batch_size": 4}, "train.batch_size / train.accumulation_steps=4: must be 2, one row each"),
        ({"model.moe.group_size": 0}, r"model.moe.group_size=0: must divide .* = 8"),
        ({"data.sequence_length": 34, "model.moe.group_size": 2}, "data.sequence_length=34: must be divisible by"),
        ({"train.sample_tokens": 8}, "train.sample_tokens=8: must be 0 with mesh.context=4"),
        ({"model.dropout": 0.1}, "model.dropout=0.1: must be 0.0 with mesh.context=4"),
        ({"data.objective": "prefix_lm"}, "data.objective='prefix_lm': must be causal with mesh.context=4"),
    ],
)
def test_settings_that_need_whole_rows_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate_mesh(_config(SPLIT[1], **overrides), make_mesh(SPLIT[1]).shape)


def test_generation_is_refused():
    config = _config(SPLIT[1])
    with jax.set_mesh(make_mesh(SPLIT[1])), pytest.raises(ConfigError, match=r"mesh.context=4: must be 1 to generate"):
        sampling.sample(config.model, {}, [np.ones(3, np.int32)], 2, sampling.Sampling())


def test_meshes_without_a_context_axis_keep_four_axes():
    assert "context" not in make_mesh(MeshConfig()).axis_names
    assert make_mesh(MeshConfig(data=2, context=-1)).shape["context"] == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)  # takes at least two minutes of processor time
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='needs pip install "jax[tpu]"')
def test_rows_of_32k_tokens_over_four_tpus_gather_only_keys_and_values():
    """Compiled for 8 absent v5e chips: experts over 2, positions over 4. Only keys and values are gathered."""
    mesh = MeshConfig(1, 1, 2, 1, 4)
    sizes = {
        "model.d_model": 256,
        "model.head_dim": 128,
        "model.num_heads": 4,
        "model.d_ff": 256,
        "model.moe.d_ff": 256,
    }
    more = {"data.sequence_length": 32768, "model.moe.group_size": 4096, "model.attention": "blocked"}
    config = _config(mesh, **sizes, **more, **{"model.dtype": "bfloat16"})
    where = make_mesh(mesh, topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
    with jax.set_mesh(where):
        program = build(config, where)
        text = program.train_step.lower(program.state, program.batch).compile().as_text()
    gathered = re.findall(r"= \(?(\w+)\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    of_tokens = {dims for _, dims in gathered if "32768" in dims.split(",")}
    assert of_tokens <= {"1,32768,2,128", "1,32768", "32768,2,128", "1,2,32768,128"}
    assert any(dims.endswith("128") for dims in of_tokens)
