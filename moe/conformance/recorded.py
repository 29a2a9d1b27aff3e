"""Layers that were recorded in npz files, and meshes to run a layer on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from moe.config import ConfigError, MeshConfig
from moe.conformance.judge import evidence
from moe.conformance.judge.errors import InputError
from moe.conformance.judge.rule import Layer
from moe.parallel.mesh import make_mesh, parse_sizes
from moe.system.npz_files import read_arrays, write_arrays


def read(path: str) -> tuple[Layer, dict[str, np.ndarray]]:
    """Read a layer's weights, inputs and results from an npz file: arrays of
    :func:`moe.conformance.judge.evidence.from_arrays`.

    Raises:
        ConfigError: no such file, an array that is missing, unknown, or of a wrong shape.
    """
    try:
        return evidence.from_arrays(read_arrays(path, f"--npz={path}"), path)
    except InputError as error:
        raise ConfigError(str(error)) from error


def write(path: Path, layer: Layer, results: Mapping[str, np.ndarray]) -> None:
    """Write a layer and its results as :func:`read` reads them."""
    write_arrays(path, evidence.arrays_of(layer, results))


def parse_mesh(sizes: str) -> Mesh:
    """Mesh of axes such as ``data=2,expert=4``, over as many devices as their product.

    Raises:
        ConfigError: an unknown axis, no size, or more devices than there are.
    """
    config = MeshConfig(**{"data": 1, **parse_sizes(sizes.split(","))})
    count = math.prod(dataclasses.astuple(config))
    if count > jax.device_count():
        raise ConfigError(
            f"--mesh={sizes}: needs {count} devices, there are {jax.device_count()}; on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return make_mesh(config, jax.devices()[:count])
