"""Eight fake CPU devices for every test; tests/fixtures.py has the fixtures that several files share."""

import gc
import importlib.util
import os

gc.disable()  # until all tests are imported
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

import pytest  # noqa: E402

from moe.system import process  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of tests that are skipped without JAX's CUDA plugin, and the fixtures in processes that run
    tests: the controller of several workers would only wait for their imports. Refuse ``-m transformers`` without
    what it compares with: every test would fail."""
    if config.option.markexpr == "transformers" and importlib.util.find_spec("torch") is None:
        raise pytest.UsageError(
            "-m transformers needs the packages of tests/transformers.txt: run it by the uv command of CONTRIBUTING.md"
        )
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")
    config.addinivalue_line("markers", "gpu_compile: compiles for absent NVIDIA GPUs; needs jax[cuda13], no driver")


def pytest_xdist_setupnodes() -> None:
    """Preload jemalloc in the workers, if it is installed: XLA's compiler allocates much, and tests take 7 % less
    time."""
    jemalloc = {"LD_PRELOAD": "libjemalloc.so.2"}
    if "LD_PRELOAD" not in os.environ and process._starts(jemalloc):
        os.environ.update(jemalloc)


def pytest_collection_finish() -> None:
    """Exempt modules and collected tests from later garbage collections, which would traverse them in vain, and let
    these be rare: tracing a program makes many objects and few cycles."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 20)
