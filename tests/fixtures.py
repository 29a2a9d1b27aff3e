"""Fixtures shared by several test files."""

import functools
import math

import jaxtyping

import tests.shape_checks  # noqa: F401

# Shape annotations of these packages are checked at every call, which under jit means once per trace.
jaxtyping.install_import_hook(("moe.routing", "moe.dispatch", "moe.layers", "moe.models"), "tests.shape_checks.check")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from moe.layers import parameter  # noqa: E402
from moe.system.atomic_files import write_atomic  # noqa: E402
from moe.system.stop_watch import STOP_WATCH  # noqa: E402
from moe.training import profiling, report  # noqa: E402
from tests.run_helpers import compilation_cache, directory, programs, whole  # noqa: E402, F401


@pytest.fixture(scope="session", autouse=True)
def no_stop_watch():
    """Keep the watch for stop signals off, which would end this process after a signal that a test sends to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STOP_WATCH, "start", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> list[jax.Device]:
    """The eight fake devices; fails if jax was imported before this file requested them."""
    devices = jax.devices("cpu")
    assert len(devices) == 8
    return devices


@pytest.fixture(scope="session", autouse=True)
def no_kept_programs():
    """Disable the user's compilation cache for programs that tests start, by a variable that JAX reads at import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
        yield


@pytest.fixture(scope="session", autouse=True)
def small_matmul():
    """Use a small matrix to measure the machine's matmul rate, which would take every run two seconds on a fake
    device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "measured_matmul_rate", functools.partial(profiling.measured_matmul_rate, size=64))
        yield


_FIGURE, _DRAW = report.figure, parameter.draw


@functools.partial(jax.jit, static_argnames="shape")
def _uniform(key: jax.Array, shape: tuple[int, ...], sigma: float) -> jax.Array:
    """Uniform numbers by a hash of the key and their positions, the last step of MurmurHash3. Their standard deviation
    is 0.8796·sigma, that of a normal cut at two sigma."""
    words = jax.random.key_data(key)
    number = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    bits = (number * jnp.uint32(0x9E3779B9) + words[..., 0]) ^ words[..., 1]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits ^= bits >> 16
    return (bits.astype(jnp.float32) * 2.0**-31 - 1.0) * (3**0.5 * 0.8796 * sigma)


@pytest.fixture(scope="session", autouse=True)
def uniform_parameters():
    """Draw parameters from another distribution with the same standard deviation: to compile the draws of a truncated
    normal takes as long as to compile a small model's training step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameter, "draw", _uniform)
        yield


@pytest.fixture
def drawn_parameters(monkeypatch: pytest.MonkeyPatch):
    """Draw parameters as programs do in this test."""
    monkeypatch.setattr(parameter, "draw", _DRAW)


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Leave the pictures of runs empty: to draw one takes every run a third of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "figure", lambda path, rows, unigram: write_atomic(path, b""))
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch):
    """Draw the pictures of runs in this test."""
    monkeypatch.setattr(report, "figure", _FIGURE)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's own name: independent of order, the same in every run."""
    return np.random.default_rng(list(request.node.name.encode()))
