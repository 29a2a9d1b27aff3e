"""The plan of one run: the real train step compiled for a topology, and what its program says and lets expect.

In: a config and a :class:`moe.planner.topology.Topology`. Out: a :class:`Plan`. Memory, exchanges and compile time are
compiled facts; FLOPs are counted in the traced program; times are estimates: the compiler's cycles plus the network
model of :mod:`moe.planner.network`.
"""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax

from moe.config import Config, validate_mesh
from moe.dispatch.ragged_exchange import LOAD_SCOPE
from moe.models import flops
from moe.parallel.mesh import make_mesh
from moe.planner import arithmetic, fit, hlo, kernels, network
from moe.planner.chips import GiB
from moe.planner.topology import Topology
from moe.training import step

_UNNAMED, _LOADS = "unnamed", "loads of experts"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        parameters: as stored.
        optimizer: Optax state.
        inputs: batch, counters, and what tiling adds to the arguments.
        temporaries: activations, gradients, gathered weights; the compiler's peak of everything that is no argument.
        code: the program.
        peak: the most that is alive at one time, as the compiler's heap simulation has it; below the total, which is
            what is set aside.
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
        """All of it."""
        return self.parameters + self.optimizer + self.inputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind, over the same axes, of the same purpose.

    Attributes:
        purpose: "weights" or "gradients of weights"; of tokens to their experts; else JAX's name of the operation.
        count: times a step.
        bytes: of one device's arrays, in a step.
        seconds: by the network model, in a step.
        exposed_seconds: of those, what no work is scheduled beside.
    """

    kind: str
    axes: tuple[str, ...]
    purpose: str
    count: int
    bytes: int
    seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before it is run.

    Attributes:
        compile_seconds: of tracing, lowering and compiling here.
        tokens: a step.
        model_flops: of a step by the convention of :mod:`moe.models.flops`; simple_flops: 6 x active parameters x tokens.
        program_flops: matrix products a step really does, all devices.
        compute_seconds: the compiler's cycles at the chip's clock, SparseCore transfers at memory bandwidth, and
            kernel_seconds: kernels, which the compiler does not price: grouped matmuls as :mod:`moe.planner.kernels`
            counts them for a balanced router, others as all blocks of their grid at peak
            FLOP/s. Causal attention skips half of its blocks and reaches about half of the peak: the two errors cancel.
        parts: of compute_seconds, what the compiler's cycles say, by pass and kind (:class:`moe.planner.hlo.ProgramText`).
        unpriced: instructions of a step that the compiler gives no cycles; unknown_loops: loops taken as one trip.
    """

    topology: str
    num_slices: int
    chips: int
    devices: int
    mesh: dict[str, int]
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
        """Exchange that the chip waits for."""
        return sum(exchange.exposed_seconds for exchange in self.exchanges)

    @property
    def step_seconds(self) -> float:
        """Predicted."""
        return self.compute_seconds + self.exposed_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the chips could do in a step."""
        return self.model_flops / (self.step_seconds * self.peak_flops)

    @property
    def token_exchanges(self) -> tuple[Exchange, ...]:
        """All-gathers of more than a megabyte of what is neither a weight nor the all-gather of expert loads: a flaw
        of the sharding. Of several slices, those without a name are in :attr:`unnamed_gathers`."""
        return tuple(
            exchange
            for exchange in self.exchanges
            if exchange.kind == "all-gather"
            and exchange.purpose not in ("weights", _LOADS)
            and exchange.bytes > 2**20
            and exchange not in self.unnamed_gathers
        )

    @property
    def unnamed_gathers(self) -> tuple[Exchange, ...]:
        """All-gathers of a program of several slices, which carries no names, so that nobody can tell what they are."""
        return tuple(
            exchange
            for exchange in self.exchanges
            if exchange.kind == "all-gather" and exchange.purpose == _UNNAMED and self.num_slices > 1
        )

    @property
    def bound(self) -> str:
        """What a faster step needs most."""
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
        """Fields and what follows from them, for machines."""
        derived = ("step_seconds", "exposed_seconds", "mfu", "bound")
        return (
            dataclasses.asdict(self)
            | {name: getattr(self, name) for name in derived}
            | {"memory_total": self.memory.total, "tokens_per_second_per_chip": self.tokens_per_second_per_chip}
            | {"token_all_gathers": len(self.token_exchanges), "unnamed_all_gathers": len(self.unnamed_gathers)}
        )

    @property
    def tokens_per_second_per_chip(self) -> float:
        """Predicted."""
        return self.tokens / self.step_seconds / self.chips


def make_plan(config: Config, topology: Topology) -> Plan:
    """Compiles the train step of a run for hardware that is not here.

    Raises:
        ConfigError: the config does not fit the mesh, or the program does not fit the memory; the message says by how
            much and what helps.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    validate_mesh(config, mesh.shape)
    capacity = topology.chip.memory // topology.chip.devices
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        program = step.build(config, mesh)
        stored = {name: fit.shard_bytes(getattr(program.state, name)) for name in ("parameters", "optimizer")}
        fit.refuse_state_that_does_not_fit(config, sum(stored.values()), capacity)
        traced = program.train_step.trace(program.state, program.batch)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            raise fit.explained(config, error) from error
        compile_seconds = time.perf_counter() - start
    statistics = compiled.memory_analysis()
    memory = Memory(
        parameters=stored["parameters"],
        optimizer=stored["optimizer"],
        inputs=statistics.argument_size_in_bytes - sum(stored.values()),
        temporaries=statistics.temp_size_in_bytes + statistics.output_size_in_bytes - statistics.alias_size_in_bytes,
        code=statistics.generated_code_size_in_bytes,
        peak=getattr(statistics, "peak_memory_in_bytes", 0),
        capacity=capacity,
    )
    text = hlo.read(compiled.as_text(), dict(mesh.shape))
    chip = topology.chip
    devices = list(mesh.devices.flat)
    tokens = config.train.batch_size * config.data.sequence_length
    total, active = flops.count_parameters(config.model)
    peak = chip.peak * topology.num_chips
    kernel_seconds = arithmetic.matmul_flops(traced.jaxpr.jaxpr, kernels_only=True) / peak
    spread = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    pairs = tokens // config.train.accumulation_steps // spread * config.model.moe.experts_per_token
    kernel_seconds += sum(matmul.count * kernels.seconds(matmul, pairs, chip) for matmul in text.grouped)
    return Plan(
        topology=topology.name,
        num_slices=topology.num_slices,
        chips=topology.num_chips,
        devices=len(devices),
        mesh=dict(mesh.shape),
        memory=memory,
        exchanges=summarise(text, devices, chip),
        compile_seconds=compile_seconds,
        tokens=tokens,
        total_parameters=total,
        active_parameters=active,
        model_flops=tokens * flops.train_flops_per_token(config.model, config.data.sequence_length),
        simple_flops=6.0 * active * tokens,
        program_flops=arithmetic.matmul_flops(traced.jaxpr.jaxpr),
        peak_flops=peak,
        compute_seconds=text.cycles / chip.clock
        + text.unpriced_bytes / (chip.memory_bandwidth / chip.devices)
        + kernel_seconds,
        kernel_seconds=kernel_seconds,
        parts={f"{where} {kind}": cycles / chip.clock for (where, kind), cycles in text.parts.items()},
        unpriced=text.unpriced,
        unknown_loops=text.unknown_loops,
    )


def summarise(text: hlo.ProgramText, devices: list[Any], chip: Any) -> tuple[Exchange, ...]:
    """Collectives of a kind, axes and purpose together, the slowest first."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for collective in text.collectives:
        duration = network.seconds(collective, devices, chip)
        exposed = duration
        if collective.overlap_cycles >= 0:
            exposed = max(0.0, duration - collective.overlap_cycles / chip.clock)
        sums = groups.setdefault((collective.kind, collective.axes, _purpose(collective)), [0, 0, 0.0, 0.0])
        for i, value in enumerate((1, collective.bytes, duration, exposed)):
            sums[i] += value * collective.count
    found = [
        Exchange(kind, axes, purpose, int(count), int(size), duration, exposed)
        for (kind, axes, purpose), (count, size, duration, exposed) in groups.items()
    ]
    return tuple(sorted(found, key=lambda exchange: -exchange.seconds))


def _purpose(collective: hlo.Collective) -> str:
    source = collective.source
    if "weights." in source or source.startswith("state."):
        return "weights"
    # A weight's gradient is named after what makes it: a matmul, or the embedding's sum over tokens.
    if collective.kind != "all-gather" and "transpose(" in source and re.search("dot_general|scatter-add", source):
        return "gradients of weights"
    if "all-to-all" in collective.kind and collective.axes == ("expert",):
        return "tokens to experts, back"
    if f"{LOAD_SCOPE}/" in source:
        return _LOADS
    if "(loss)" in source:
        return "loss"
    return source.rsplit("/", 1)[-1] or _UNNAMED


def render(plan: Plan) -> str:
    """The page that a person reads."""
    memory, chip_text = plan.memory, f"{plan.chips} chips"
    if plan.devices != plan.chips:
        chip_text += f" = {plan.devices} cores"
    slices = f"{plan.num_slices} slices of " if plan.num_slices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    device = "chip" if plan.devices == plan.chips else "core"
    lines = [
        f"{slices}{plan.topology}: {chip_text}; mesh {mesh}; compiled in {plan.compile_seconds:.1f} s",
        f"model: {plan.total_parameters:,} parameters, {plan.active_parameters:,} active; "
        f"{plan.tokens:,} tokens a step",
        "",
        f"Memory a {device} (compiled fact): fits, {memory.total / GiB:.2f} GiB of {memory.capacity / GiB:.0f}",
    ]
    for name in ("parameters", "optimizer", "inputs", "temporaries", "code"):
        lines.append(f"  {name:12} {getattr(memory, name) / GiB:8.2f} GiB")
    lines.append(
        f"  alive at the peak {memory.peak / GiB:.2f} GiB; the rest of the temporaries is gaps between buffers"
    )
    lines += ["", f"Exchanges of a step, bytes a {device} (compiled fact; seconds: network model)"]
    lines.append(f"  {'kind':20} {'axes':16} {'purpose':24} {'count':>6} {'MiB':>10} {'ms':>9} {'exposed':>9}")
    small = [exchange for exchange in plan.exchanges if exchange.bytes < 2**20]
    for exchange in plan.exchanges:
        if exchange.bytes < 2**20:
            continue
        axes = "+".join(exchange.axes)
        lines.append(
            f"  {exchange.kind:20} {axes:16} {exchange.purpose:24} {exchange.count:6} {exchange.bytes / 2**20:10,.0f} "
            f"{1e3 * exchange.seconds:9.2f} {1e3 * exchange.exposed_seconds:9.2f}"
        )
    if small:
        lines.append(f"  {sum(e.count for e in small)} more of less than 1 MiB in all, each")
    flaws = plan.token_exchanges
    if flaws:
        names = ", ".join(exchange.purpose for exchange in flaws)
        lines.append(f"  FLAW: something that is no weight is gathered on every {device}: {names}")
    elif plan.unnamed_gathers:
        lines.append(
            "  the program names none of its exchanges; whether tokens are gathered, one slice's program tells"
        )
    else:
        lines.append("  no all-gather of tokens")
    ratio = plan.program_flops / plan.model_flops
    lines += [
        "",
        "FLOPs of a step, all chips",
        f"  6 x active parameters x tokens        {plan.simple_flops:.4g}",
        f"  model, with attention (MFU's)         {plan.model_flops:.4g}",
        f"  matrix products traced                {plan.program_flops:.4g} = {ratio:.2f} x the model's: "
        "recomputation, empty expert slots, masked attention",
        "",
        "Time of a step (estimate)",
        f"  on the chip   {1e3 * plan.compute_seconds:9.1f} ms  the compiler's cycles; {plan.unpriced} instructions "
        f"that it does not price, at memory bandwidth; kernels, {1e3 * plan.kernel_seconds:.1f} ms, at peak",
        *(f"    {name:22} {1e3 * part:9.1f} ms" for name, part in sorted(plan.parts.items()) if part > 1e-5),
        f"  exposed       {1e3 * plan.exposed_seconds:9.1f} ms  exchange with nothing scheduled beside it",
        f"  step          {1e3 * plan.step_seconds:9.1f} ms  {plan.tokens_per_second_per_chip:,.0f} tokens/s/chip, "
        f"MFU {100 * plan.mfu:.1f} %",
        f"  bound by      {plan.bound}",
    ]
    if plan.unknown_loops:
        lines.append(f"  {plan.unknown_loops} loops whose trip count could not be read count once: an underestimate")
    return "\n".join(lines)
