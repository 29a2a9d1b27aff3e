"""Eight fake CPU devices for every test, and the fixtures shared by several files."""

import os

# Set before jax is imported, which reads both variables once.
os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Tests compile much and run little: LLVM's optimisations would take half of their time. XLA's own passes,
    # including the partitioner, are unaffected.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    # By default a device aborts the process after waiting 40 s for the others; eight devices on two busy cores may
    # need longer.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=60",
    "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
)
os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *_FLAGS])
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("LD_PRELOAD", None)  # programs started by tests choose their own allocator

import functools  # noqa: E402
import gc  # noqa: E402

import jaxtyping  # noqa: E402

import tests.shape_checks  # noqa: E402, F401

# Shape annotations of these packages are checked at every call, which under jit means once per trace.
jaxtyping.install_import_hook(("moe.routing", "moe.dispatch", "moe.layers", "moe.models"), "tests.shape_checks.check")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from moe.system import process  # noqa: E402
from moe.system.stop_watch import STOP_WATCH  # noqa: E402
from moe.training import profiling  # noqa: E402
from tests.run_helpers import compilation_cache, directory, programs, whole  # noqa: E402, F401


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of tests that are skipped without JAX's CUDA plugin."""
    config.addinivalue_line("markers", "gpu_compile: compiles for absent NVIDIA GPUs; needs jax[cuda13], no driver")


def pytest_xdist_setupnodes() -> None:
    """Preload jemalloc in the workers, if it is installed: XLA's compiler allocates much, and tests take 7 % less
    time."""
    jemalloc = {"LD_PRELOAD": "libjemalloc.so.2"}
    if "LD_PRELOAD" not in os.environ and process._starts(jemalloc):
        os.environ.update(jemalloc)


def pytest_collection_finish() -> None:
    """Exempt modules and collected tests from later garbage collections, which would traverse them in vain."""
    gc.freeze()


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


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's own name: independent of order, the same in every run."""
    return np.random.default_rng(list(request.node.name.encode()))
