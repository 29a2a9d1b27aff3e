"""Batch ramp-up: rows of each step, steps of smaller batches, runs that are continued, and refusals."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from moe.config import Config, ConfigError, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from moe.data import pipeline
from moe.models.pipeline import check
from moe.parallel.mesh import make_mesh
from moe.training import batches, loop, recovery
from moe.training.batches import place
from moe.training.step import build
from moe.training.train import train
from tests.helpers import random_state, tiny_model
from tests.run_helpers import ONE, SETTINGS, Interrupted, compile_once, interrupted, rows, tiny

T = 8
GROWING = {
    "train.accumulation_steps": 2,
    "train.rampup_rows": (4,),
    "train.rampup_steps": (3,),
    "train.log_every": 2,
}


def test_rows_of_steps_by_hand():
    """Three steps of 2 rows, two of 4, then 8: 2, 2, 2, 4, 4, 8, 8."""
    config = TrainConfig(batch_size=8, accumulation_steps=4, rampup_rows=(2, 4), rampup_steps=(3, 2))
    assert [config.rows_at(step) for step in range(1, 8)] == [2, 2, 2, 4, 4, 8, 8]
    assert [config.rows_until(step) for step in (0, 3, 4, 5, 7)] == [0, 6, 10, 14, 30]
    assert Config(data=DataConfig(sequence_length=T), train=config).tokens_until(4) == 80
    plain = TrainConfig(batch_size=8, accumulation_steps=4)
    assert (plain.rows_until(5), plain.rows_read, config.rows_read) == (40, 8, 2)
    skipped = {"skipped": 1.0, "loss": 1.0, "gradient_norm": np.inf}
    assert recovery.Health(0.0, config).look(5, [skipped], {})[0]["first_row"] == 10


def test_microbatches_of_a_joined_batch_are_its_parts():
    parts = [{"tokens": np.arange(6).reshape(2, 3) + 10 * i} for i in range(3)]
    tokens = batches.joined(parts)["tokens"]
    split = tokens.reshape(-1, 3, 3).swapaxes(0, 1)  # as the train step does
    np.testing.assert_array_equal(split, [part["tokens"] for part in parts])
    assert batches.joined(parts[:1]) is parts[0]


def test_a_step_of_the_ramp_is_that_of_a_run_with_its_batch_size():
    """Four rows in two microbatches of a run with eight in four; the losses are means over the microbatches."""

    def after(train):
        optimizer = OptimizerConfig(warmup_steps=0)
        groups = {"expert_groups": 1, "kept_expert_groups": 1, "scores_per_group": 1}
        model = tiny_model(gate="deepseek_v3", experts_per_token=2, num_layers=1, z_loss_weight=0.1, **groups)
        config = Config(model=model, data=DataConfig(sequence_length=T), optimizer=optimizer, train=train)
        mesh = make_mesh(MeshConfig(data=1), ONE)
        tokens = np.random.default_rng(0).integers(1, 48, (4, T + 1)).astype(np.int32)
        ones, columns = np.ones((4, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (4, 1))
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "positions": columns}
        with jax.set_mesh(mesh):
            program = build(config, mesh)
            return jax.device_get(program.train_step(random_state(program), place(batch, mesh)))

    growing = after(TrainConfig(batch_size=8, accumulation_steps=4, rampup_rows=(4,), rampup_steps=(1,)))
    plain = after(TrainConfig(batch_size=4, accumulation_steps=2))
    jax.tree.map(np.testing.assert_array_equal, growing, plain)


@pytest.fixture(scope="module")
def growing_programs():
    """A make_program that compiles once."""
    return compile_once()


@pytest.fixture(scope="module")
def growing(directory, growing_programs, tmp_path_factory):
    """An undisturbed run, and the rows of each of its steps."""
    read = []

    def joined(parts):
        batch = batches.joined(parts)
        read.append(batch["tokens"])
        return batch

    workdir = tmp_path_factory.mktemp("growing") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "joined", joined)
        train(tiny(directory, **SETTINGS | GROWING), str(workdir), ONE, make_program=growing_programs)
    return workdir, read


def test_a_growing_run_reads_each_row_once(growing, directory):
    workdir, read = growing
    assert [len(tokens) for tokens in read] == [4, 4, 4, 8, 8, 8]
    config = tiny(directory, **SETTINGS | GROWING)
    iterator = pipeline.train_iterator(pipeline.prepare_run(config), config.data, batch_size=4, seed=config.seed)
    parts = [next(iterator)["tokens"] for _ in range(9)]
    for tokens, own in zip(read, (parts[:1], parts[1:2], parts[2:3], parts[3:5], parts[5:7], parts[7:]), strict=True):
        np.testing.assert_array_equal(tokens, np.stack(own, axis=1).reshape(len(tokens), -1))
    timing = [json.loads(line) for line in (workdir / "timing.jsonl").read_text().splitlines()]
    seen = [row["tokens_per_second"] * row["step_seconds"] / 16 for row in timing]
    # Rows of a step: steps 1 and 2 (without the first, which is not timed), 3 and 4, 5 and 6.
    np.testing.assert_allclose(seen, [4, 6, 8])


@pytest.mark.parametrize("step", [3, 5])
def test_a_growing_run_that_is_continued_is_the_same(growing, growing_programs, directory, tmp_path, step):
    config = tiny(directory, **SETTINGS | GROWING)
    with interrupted(step), pytest.raises(Interrupted):
        train(config, str(tmp_path / "run"), ONE, make_program=growing_programs)
    train(config, str(tmp_path / "run"), ONE, make_program=growing_programs)
    assert rows(tmp_path / "run", "train") == rows(growing[0], "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rampup_rows": (3,)},
            r"train\.rampup_rows=\(3,\): must be increasing multiples of .* = 2, the rows of a micro",
        ),
        ({"rampup_rows": (4, 2), "rampup_steps": (1, 1)}, r"rampup_rows=\(4, 2\): must be increasing"),
        ({"rampup_rows": (8,)}, r"rampup_rows=\(8,\): .* below train\.batch_size=8"),
        ({"rampup_rows": (0,)}, r"rampup_rows=\(0,\): must be increasing"),
        ({"rampup_steps": ()}, r"rampup_steps=\(\): must be a positive number of steps for each of the 1 stages"),
        ({"rampup_steps": (0,)}, r"rampup_steps=\(0,\): must be a positive number"),
        ({"rampup_steps": (10,)}, r"rampup_steps=\(10,\): must add up to less than train\.num_steps=10"),
        ({"rampup_rows": ()}, r"rampup_steps=\(2,\): must be a positive number of steps for each of the 0 stages"),
    ],
)
def test_wrong_stages_are_refused(settings, message):
    stages = {"batch_size": 8, "accumulation_steps": 4, "num_steps": 10, "rampup_rows": (4,), "rampup_steps": (2,)}
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**stages | settings)


def test_streams_and_stages_of_a_pipeline_are_refused():
    stages = TrainConfig(batch_size=8, accumulation_steps=4, rampup_rows=(4,), rampup_steps=(2,))
    config = Config(model=tiny_model(num_layers=4), train=stages)
    with pytest.raises(ConfigError, match=r"data\.streams=8: must divide the rows of a microbatch, 2, or be 0"):
        dataclasses.replace(config, data=DataConfig(streams=8))
    with pytest.raises(ConfigError, match=r"train\.rampup_rows=\(4,\): must be \(\) with mesh\.pipeline=2"):
        check(config, {"pipeline": 2})
