"""Plan of a run: the real train step compiled for a topology, and the facts and estimates its program gives.

Memory, exchanges and compile time are facts of the compiled program. FLOPs are counted in the traced program. Times are
estimates: the compiler's own, plus the network model of :mod:`moe.planner.network`.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax

from moe.config import Config, ConfigError, validate_mesh
from moe.models import flops
from moe.parallel.mesh import make_mesh
from moe.planner import arithmetic, exchanges, fit, grouped_matmuls, memory_errors, program
from moe.planner.exchanges import Exchange
from moe.planner.gpus import Gpu
from moe.planner.topology import Topology
from moe.training import step


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
    """

    parameters: int
    optimizer: int
    inputs: int
    temporaries: int
    code: int
    peak: int
    capacity: int

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return self.parameters + self.optimizer + self.inputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Plan:
    """Facts and estimates of a run that was not started.

    Attributes:
        platform: "tpu" or "gpu".
        estimate: source of the compiler's estimate of time.
        compile_seconds: of tracing, lowering and compiling on this machine.
        tokens: a step.
        model_flops: of a step by the convention of :mod:`moe.models.flops`.
        simple_flops: 6 x active parameters x tokens.
        program_flops: of all matrix products in a step's program, all devices.
        compute_seconds: the compiler's estimate, unpriced instructions at memory bandwidth, and kernel_seconds.
        kernel_seconds: kernels without an estimate: grouped matmuls for a balanced router, on TPUs by
            :mod:`moe.planner.grouped_matmuls`, on GPUs at the rate of large matmuls; other kernels as all their blocks
            at peak FLOP/s. Causal attention skips half of its blocks and reaches about half of the peak: the two errors
            cancel.
        remat: policy of ``model.remat``.
        parts: the compiler's estimate by pass and kind (:class:`moe.planner.program.Program`).
        unpriced: instructions of a step without an estimate; unknown_loops: loops taken as one trip.
    """

    topology: str
    platform: str
    estimate: str
    num_slices: int
    chips: int
    devices: int
    mesh: dict[str, int]
    remat: str
    memory: Memory
    exchanges: tuple[Exchange, ...]
    compile_seconds: float
    tokens: int
    total_parameters: int
    active_parameters: int
    model_flops: float
    simple_flops: float
    program_flops: float
    peak_flops: float
    compute_seconds: float
    kernel_seconds: float
    parts: dict[str, float]
    unpriced: int
    unknown_loops: int

    @property
    def exposed_seconds(self) -> float:
        """Exchange that the devices wait for."""
        return sum(exchange.exposed_seconds for exchange in self.exchanges)

    @property
    def step_seconds(self) -> float:
        """Predicted time of a step."""
        return self.compute_seconds + self.exposed_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak FLOPs of all chips in the predicted time."""
        return self.model_flops / (self.step_seconds * self.peak_flops)

    @property
    def tokens_per_second_per_chip(self) -> float:
        """Predicted rate."""
        return self.tokens / self.step_seconds / self.chips

    @property
    def token_exchanges(self) -> tuple[Exchange, ...]:
        """All-gathers of more than 1 MiB of neither weights nor expert loads: a flaw of the sharding.

        Gathers without a name in programs of several slices are in :attr:`unnamed_gathers` instead.
        """
        return tuple(
            exchange
            for exchange in self.exchanges
            if exchange.kind == "all-gather"
            and exchange.purpose not in (exchanges.WEIGHTS, exchanges.LOADS)
            and exchange.bytes > 2**20
            and exchange not in self.unnamed_gathers
        )

    @property
    def unnamed_gathers(self) -> tuple[Exchange, ...]:
        """All-gathers whose purpose is unknown because a program of several slices carries no names."""
        return tuple(
            exchange
            for exchange in self.exchanges
            if exchange.kind == "all-gather" and exchange.purpose == exchanges.UNNAMED and self.num_slices > 1
        )

    @property
    def bound(self) -> str:
        """The largest part of the step, in words."""
        # A dropless buffer's rows are all counted, and most of them are never multiplied.
        ideal = min(self.program_flops / self.peak_flops, self.compute_seconds)
        parts = {
            "matrix products at peak": ideal,
            "the rest of the chip's work (memory, padding, vector units)": max(self.compute_seconds - ideal, 0.0),
            "exposed exchange": self.exposed_seconds,
        }
        worst = max(parts, key=lambda part: parts[part])
        return f"{worst}, {100 * parts[worst] / self.step_seconds:.0f} % of the step"

    def to_json(self) -> dict[str, Any]:
        """Fields and derived figures."""
        derived = ("step_seconds", "exposed_seconds", "mfu", "bound", "tokens_per_second_per_chip")
        return (
            dataclasses.asdict(self)
            | {name: getattr(self, name) for name in derived}
            | {"memory_total": self.memory.total}
            | {"token_all_gathers": len(self.token_exchanges), "unnamed_all_gathers": len(self.unnamed_gathers)}
        )


#: Remat policies that :func:`make_fitting_plan` tries, from the least recomputation to the most.
LADDER = ("hidden", "outputs", "attention", "full")


def make_fitting_plan(config: Config, topology: Topology) -> Plan:
    """Plan the remat policy that recomputes least of those that fit; policies whose least memory does not fit are not
    compiled.

    Raises:
        ConfigError: none fits, or the config does not fit the mesh.
    """
    mesh, capacity = make_mesh(config.mesh, topology.devices), topology.chip.memory // topology.chip.devices
    validate_mesh(config, mesh.shape)
    for policy in LADDER:
        tried = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))
        if policy != LADDER[-1] and fit.lower_bound(tried, mesh.shape).total > capacity:
            continue
        try:
            return make_plan(tried, topology)
        except ConfigError as error:
            if policy == LADDER[-1] or not str(error).startswith("does not fit"):
                raise
    raise AssertionError


def make_plan(config: Config, topology: Topology) -> Plan:
    """Compile the train step of a run for hardware that is absent.

    Raises:
        ConfigError: the config does not fit the mesh, or the program does not fit the memory; the message says by how
            much and which settings help.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    validate_mesh(config, mesh.shape)
    chip, devices = topology.chip, list(mesh.devices.flat)
    capacity = chip.memory // chip.devices
    compiled, traced, stored, compile_seconds = _compile(config, mesh, topology)
    memory = _memory(compiled.memory_analysis(), stored, capacity)
    memory_errors.refuse_program_that_does_not_fit(config, memory.total, capacity)
    rows = _assignments(config, mesh)
    text = program.read(
        compiled.as_text(),
        dict(mesh.shape),
        chip.clock,
        lambda matmul: 0.0 if isinstance(chip, Gpu) else grouped_matmuls.seconds(matmul, rows, chip),
    )
    peak = chip.peak * topology.num_chips
    products = arithmetic.matmul_flops(traced.jaxpr.jaxpr)
    kernel_seconds = (
        products.kernels / peak
        + text.attention_flops / (chip.peak / chip.devices)
        + grouped_matmuls.total_seconds(
            text, products.grouped / len(devices), rows, chip, exchanged=mesh.shape["expert"] > 1
        )
    )
    total, active = flops.count_parameters(config.model)
    tokens = config.train.batch_size * config.data.sequence_length
    return Plan(
        topology=topology.name,
        platform=topology.platform,
        estimate=chip.estimate,
        num_slices=topology.num_slices,
        chips=topology.num_chips,
        devices=len(devices),
        mesh=dict(mesh.shape),
        remat=config.model.remat,
        memory=memory,
        exchanges=exchanges.summarise(text, devices, chip),
        compile_seconds=compile_seconds,
        tokens=tokens,
        total_parameters=total,
        active_parameters=active,
        model_flops=tokens
        * flops.train_flops_per_token(config.model, config.data.sequence_length, config.data.input_length),
        simple_flops=6.0 * active * tokens,
        program_flops=products.total,
        peak_flops=peak,
        compute_seconds=text.seconds + text.unpriced_bytes / (chip.memory_bandwidth / chip.devices) + kernel_seconds,
        kernel_seconds=kernel_seconds,
        parts={f"{where} {kind}": seconds for (where, kind), seconds in text.parts.items()},
        unpriced=text.unpriced,
        unknown_loops=text.unknown_loops,
    )


def _compile(config: Config, mesh: Any, topology: Topology) -> tuple[Any, Any, dict[str, int], float]:
    """(compiled program, traced program, bytes of state by kind, seconds it took)."""
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        built = step.build(config, mesh)
        stored = {name: fit.shard_bytes(getattr(built.state, name)) for name in ("parameters", "optimizer")}
        capacity = topology.chip.memory // topology.chip.devices
        memory_errors.refuse_state_that_does_not_fit(config, sum(stored.values()), capacity)
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
    )


def _assignments(config: Config, mesh: Any) -> int:
    """(token, expert) choices of a device in one pass of a layer."""
    rows = config.train.batch_size // config.train.accumulation_steps
    devices = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    return rows * config.data.sequence_length // devices * config.model.moe.experts_per_token
