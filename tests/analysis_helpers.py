"""A small program and batch for tests of the analysis."""

import jax
import numpy as np

from moe.config import Config, DataConfig, MeshConfig, TrainConfig
from moe.parallel.mesh import make_mesh
from moe.training.step import build
from tests.helpers import random_parameters, tiny_model

B, T = 2, 8


def tiny_program(**overrides):
    model = tiny_model(**{"dispatch": "einsum"} | overrides)  # which compiles fastest
    config = Config(model=model, data=DataConfig(sequence_length=T), train=TrainConfig(batch_size=B))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return build(config, mesh), random_parameters(model)[1]


def random_batch(rng, vocab_size, real=B * T):
    where = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    segments = (np.arange(B * T).reshape(B, T) < real).astype(np.int32) * (1 + (where >= 5))
    tokens = rng.integers(0, vocab_size, (B, T)).astype(np.int32)
    targets = np.where(segments > 0, rng.integers(0, vocab_size, (B, T)), -1).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments, "positions": where, "targets": targets, "kind": tokens % 3}
