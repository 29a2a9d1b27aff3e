"""Mixtral's context of 32,768 positions; its config here trains on rows of 4,096."""

import jax
import numpy as np
import pytest

from moe.config.parse import from_config_dict
from moe.configs import mixtral_8x7b
from moe.parallel.mesh import make_mesh
from moe.training.step import build


@pytest.mark.slow
def test_a_train_step_of_mixtral_reads_32768_positions():
    """The config of the 8x7B, at tiny width: the loss is chance's and every parameter moves."""
    config = mixtral_8x7b.get_config()
    config.model.update(vocab_size=16, d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8)
    config.data.sequence_length = 32_768
    config.train.batch_size = 1
    config.optimizer.warmup_steps = 0
    config.mesh.update(data=1, fsdp=1, expert=1)
    config = from_config_dict(config)
    assert (config.model.rope_theta, config.model.attention, config.model.remat) == (1e6, "blocked", "full")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state = program.init()
        before = jax.tree.map(np.asarray, state.parameters)
        rows = np.random.default_rng(0).integers(1, 16, (1, 32_769))
        batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in program.batch.items()}
        batch["tokens"], batch["targets"] = rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)
        batch["positions"] = np.arange(32_768, dtype=np.int32)[None]
        state, metrics = program.train_step(state, batch)
    assert metrics.skipped == 0
    assert 2.5 < metrics.cross_entropy < 3.2  # ln 16 = 2.77 is chance
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), before, state.parameters)
    assert all(jax.tree.leaves(moved))
