"""The train step of a run compiled for a topology, and the figures read from it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import threading
import time
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
import pydantic

from moe.config import Config, ConfigError, to_dict, validate_mesh
from moe.config.parse import from_config_dict
from moe.config.user_code import user_code
from moe.layers.attention.attend import checked_for_target
from moe.parallel.mesh import make_mesh
from moe.parallel.partition_specs import shard_bytes
from moe.planner import arithmetic, memory_errors
from moe.planner.topology import Topology, get_topology
from moe.planner.versions import versions
from moe.system.atomic_files import write_atomic
from moe.system.checkout import short_commit
from moe.system.foreign_files import parse
from moe.training import step as train_step_module

#: Share of a GPU that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise, and that the launchers let it.
_JAX_SHARE, _USUAL_SHARE = 0.75, 0.95

#: Fields of :class:`Memory` that add up to its total.
MEMORY_KINDS = ("parameters", "optimizer", "inputs", "temporaries", "code")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        parameters: as stored.
        optimizer: Optax state.
        inputs: batch, counters, and the padding that tiles add to the arguments.
        temporaries: activations, gradients, gathered weights: the compiler's allocation for all but arguments.
        code: the program.
        peak: the most that is alive at one time in the compiler's heap simulation; below the total, which is allocated.
        capacity: of the device.
        host: in the host's memory, for arrays that are offloaded; not in the total.
    """

    parameters: int
    optimizer: int
    inputs: int
    temporaries: int
    code: int
    peak: int
    capacity: int
    host: int = 0

    @property
    def total(self) -> int:
        """Sum of :data:`MEMORY_KINDS`."""
        return sum(getattr(self, kind) for kind in MEMORY_KINDS)

    def notes(self, platform: str) -> list[str]:
        """Sentences about a total above the device's memory, and about the share of a GPU that JAX takes."""
        share = self.total / self.capacity
        if platform == "tpu" and share > 1:
            return [
                "the compiler, which refuses what does not fit, accepts it, although its parts add up to more than the "
                "device has: they are not all allocated at one time"
            ]
        if platform == "gpu" and share > _JAX_SHARE:
            tight = "" if share <= _USUAL_SHARE else "; little is left for CUDA and NCCL, so that it may not start"
            fraction = min(math.ceil(100 * share + 1) / 100, 0.99)
            return [
                f"needs XLA_PYTHON_CLIENT_MEM_FRACTION={fraction}: JAX takes three quarters of a GPU by itself{tight}"
            ]
        return []


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled train step: the figures read from it.

    Attributes:
        text: of the program.
        memory: of a device.
        products: FLOPs of the traced program, all devices.
        seconds: time that tracing, lowering and compiling took.
        commit: of the source that was compiled.
    """

    text: str
    memory: Memory
    products: arithmetic.Flops
    seconds: float
    commit: str

    def save(self, path: Path) -> None:
        """Write to a compressed file, so that it can be read again without compiling."""
        write_atomic(path, gzip.compress(json.dumps(dataclasses.asdict(self)).encode()))

    @staticmethod
    def load(path: Path) -> CompiledStep:
        """Read a file that :meth:`save` wrote. Raises ConfigError if the file holds something else."""
        try:
            content = gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{path}: not a compiled step ({error}); delete it to compile it again") from error
        return parse(content, _STEP, f"{path}: not a compiled step; delete it to compile it again")


_STEP = pydantic.TypeAdapter(CompiledStep)


def read_or_compile(
    config: Config, topology: Topology, folder: Path | None = None, *, apart: bool = False
) -> CompiledStep:
    """The compiled train step, kept in a folder.

    A kept program is reused for the same config, user's code, topology, XLA options and versions, even if this package
    has changed since; ``commit`` names the source that was compiled.

    Args:
        config: of the run.
        topology: to compile for.
        folder: of programs; None: none is read or kept.
        apart: compile in a process of its own. A program that compiles for several topologies needs it: the Mosaic
            kernels of a process are compiled for one GPU architecture (JAX 0.12).

    Raises:
        ConfigError: see :func:`compile_step` and :meth:`CompiledStep.load`.
    """
    make = _compile_apart if apart else compile_step
    if folder is None:
        return make(config, topology)
    options = train_step_module.compiler_options(config, make_mesh(config.mesh, topology.devices))
    options |= dict(topology.compiler_options)
    made_of = [to_dict(config), topology.name, topology.num_slices, options, versions()]
    made_of += [code] if (code := user_code(config)) else []  # programs kept before this was part of the name are found
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"{name}.json.gz"
    if path.exists():
        return CompiledStep.load(path)
    step = make(config, topology)
    folder.mkdir(parents=True, exist_ok=True)
    step.save(path)
    return step


def compile_step(config: Config, topology: Topology) -> CompiledStep:
    """Compile the train step; see :func:`moe.planner.make_plan.make_plan`."""
    if config.distill.teacher:
        raise ConfigError(
            f"distill.teacher={config.distill.teacher!r}: must be empty in a plan, which would leave out the weights "
            "and the forward pass of the second model; plan either model by itself, with data.objective=causal"
        )
    mesh = make_mesh(config.mesh, topology.devices)
    validate_mesh(config, mesh.shape)
    compiled, traced, stored, seconds = _compile(config, mesh, topology)
    memory = _memory(compiled.memory_analysis(), stored, topology.capacity)
    if topology.platform == "gpu":  # the compiler for TPUs refuses by itself what does not fit
        memory_errors.refuse_program_that_does_not_fit(config, memory.total, topology.capacity)
    return CompiledStep(
        compiled.as_text(), memory, arithmetic.matmul_flops(traced.jaxpr.jaxpr), seconds, short_commit()
    )


def _compile_apart(config: Config, topology: Topology) -> CompiledStep:
    """:func:`compile_step` in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, initializer=_end_with_parent) as pool:
        try:
            return pool.submit(_compile_named, to_dict(config), topology.name, topology.num_slices).result()
        except SystemExit:  # a stop signal, which must not wait for the compiler
            for child in multiprocessing.active_children():
                child.kill()
            raise
        except BrokenProcessPool as error:
            raise ConfigError(
                f"{topology.name}: the process that compiled for it was killed; the compiler may need more memory than "
                "this machine has"
            ) from error


def _end_with_parent() -> None:
    """End this process, which may be compiling for minutes, when the one that started it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _compile_named(fields: dict[str, Any], name: str, num_slices: int) -> CompiledStep:
    return compile_step(from_config_dict(fields), get_topology(name, num_slices))


def _compile(config: Config, mesh: Any, topology: Topology) -> tuple[Any, Any, dict[str, int], float]:
    """(compiled program, traced program, bytes of state by kind, seconds it took)."""
    with jax.set_mesh(mesh), checked_for_target():
        start = time.perf_counter()
        built = train_step_module.build(config, mesh)
        stored = {name: shard_bytes(getattr(built.state, name)) for name in ("parameters", "optimizer")}
        stored["parameters"] += shard_bytes(getattr(built.state, "base", {}))  # of adapters
        memory_errors.refuse_state_that_does_not_fit(config, sum(stored.values()), topology.capacity)
        train_step: Any = built.train_step  # jitted
        traced = train_step.trace(built.state, built.batch)
        try:
            compiled = traced.lower().compile(compiler_options=dict(topology.compiler_options) or None)
        except jax.errors.JaxRuntimeError as error:
            raise memory_errors.explained(config, error) from error
        return compiled, traced, stored, time.perf_counter() - start


def _memory(statistics: Any, stored: dict[str, int], capacity: int) -> Memory:
    return Memory(
        parameters=stored["parameters"],
        optimizer=stored["optimizer"],
        inputs=statistics.argument_size_in_bytes - sum(stored.values()),
        temporaries=statistics.temp_size_in_bytes + statistics.output_size_in_bytes - statistics.alias_size_in_bytes,
        code=statistics.generated_code_size_in_bytes,
        peak=getattr(statistics, "peak_memory_in_bytes", 0),
        capacity=capacity,
        host=getattr(statistics, "host_temp_size_in_bytes", 0) + getattr(statistics, "host_argument_size_in_bytes", 0),
    )
