"""Plan of a run: the real train step compiled for a topology, and the facts and estimates its program gives.

Memory, exchanges and compile time are facts of the compiled program. FLOPs are counted in the traced program. Times are
estimates: the compiler's own, plus the network model of :mod:`moe.planner.network`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from moe.config import Config, ConfigError, to_dict, validate_mesh
from moe.dispatch.backends import row_blocks
from moe.models import flops
from moe.models.encoder_decoder import ENCODER_SCOPE
from moe.parallel.mesh import make_mesh
from moe.planner import (
    attention,
    calibration,
    counts,
    exchanges,
    fit,
    kernels,
    network,
    program,
    row_movement,
    timeline,
    unembedding,
)
from moe.planner.compiled import CompiledStep, Memory, read_or_compile
from moe.planner.exchanges import Exchange
from moe.planner.memory_errors import DoesNotFitError
from moe.planner.records import Array, GroupedMatmul, Price
from moe.planner.scenario import Scenario
from moe.planner.topology import Topology
from moe.planner.versions import versions


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
        kernel_seconds: kernels without an estimate: grouped matmuls for a balanced router by
            :mod:`moe.planner.kernels`, attention by :mod:`moe.planner.attention`.
        kernel_low, kernel_high: kernel_seconds at the ends of the kernels' intervals, all errors fully correlated.
        floor_seconds: a bound of the step from below: the FLOPs that the program executes at peak, and the exchange
            that the devices wait for at the whole of the links' bandwidth.
        limits: seconds that the step needs at least, by what limits it (:func:`moe.planner.counts.limits`).
        counts: from which later prices make its time (:class:`moe.planner.counts.Counts`).
        log_width: of the step's interval, in the logarithm (:func:`moe.planner.calibration.width`).
        steps: published steps that it rests on; chip_steps: those of this chip.
        remat: policy of ``model.remat``.
        parts: the compiler's estimate by pass and kind (:class:`moe.planner.program.Program`).
        unpriced: instructions of a step without an estimate; unknown_loops: loops taken as one trip.
        scenario: assumptions that were changed; "" for none.
        basis: seconds of a step by what they rest on.
        where: seconds by part of the model and kind (:func:`moe.planner.timeline.by_part`).
        items: the dearest instructions (:func:`moe.planner.timeline.dearest`).
        lanes: the schedule of the largest computations (:func:`moe.planner.timeline.lanes`).
        arrays: the largest that are alive when most memory is in use, an estimate.
        versions: of JAX and the compilers.
        commit: of the source that was compiled.
        prices: hash of the tables and models by which the program was counted; program: hash of its text.
        config: of the run.
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
    kernel_low: float
    kernel_high: float
    floor_seconds: float
    limits: dict[str, float]
    counts: dict[str, Any]
    log_width: float
    steps: int
    chip_steps: int
    parts: dict[str, float]
    unpriced: int
    unknown_loops: int
    scenario: str
    basis: dict[str, float]
    where: tuple[dict[str, Any], ...]
    items: tuple[dict[str, Any], ...]
    lanes: tuple[dict[str, Any], ...]
    arrays: tuple[Array, ...]
    versions: tuple[str, ...]
    commit: str
    prices: str
    program: str
    config: dict[str, Any]

    @property
    def exposed_seconds(self) -> float:
        """Exchange that the devices wait for."""
        return sum(exchange.exposed_seconds for exchange in self.exchanges)

    @property
    def counted_seconds(self) -> float:
        """Work and exposed exchange, as counted."""
        return self.compute_seconds + self.exposed_seconds

    @property
    def step_seconds(self) -> float:
        """Predicted time of a step: what is counted."""
        return self.counted_seconds

    @property
    def step_interval(self) -> tuple[float, float]:
        """80 % interval of the time of a step, seconds."""
        return calibration.interval(self.counted_seconds, self.floor_seconds, self.log_width)

    @property
    def bubble(self) -> float:
        """Share of its turns in which a stage of the pipeline has no microbatch (:mod:`moe.models.pipeline`)."""
        idle, train = self.mesh.get("pipeline", 1) - 1, self.config["train"]
        return idle / (train["accumulation_steps"] * train.get("pipeline_rounds", 1) + idle)

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
        """Unintended all-gathers of more than 1 MiB, a flaw of the sharding. Intended are those of weights, expert
        loads, keys and values, and of tokens with ``exchange=all_gather``.

        Gathers without a name in programs of several slices are in :attr:`unnamed_gathers` instead.
        """
        return tuple(
            exchange
            for exchange in self.exchanges
            if exchange.kind == "all-gather"
            and exchange.purpose not in (exchanges.WEIGHTS, exchanges.LOADS, exchanges.ROUTED)
            and exchange.axes != ("context",)  # keys and values of split rows
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

    def cost(self) -> str:
        """Days and chip-hours of a trillion tokens, as a sentence."""
        return cost_words(self.tokens, self.chips, self.platform, (self.step_seconds, *self.step_interval))

    @property
    def interval_basis(self) -> str:
        """Basis of the interval, as a phrase."""
        shares = {name: seconds / self.compute_seconds for name, seconds in self.basis.items()}
        words = [f"{name} for {100 * share:.0f} % of the work" for name, share in shares.items() if share >= 0.005]
        of_chip = calibration.of_chip(self.topology.partition(":")[0], self.chip_steps)
        steps = f"the spread of {self.steps} published steps, {of_chip}"
        return f"{steps} (docs/results/calibration.md), and {', '.join(words)}"

    @property
    def bound(self) -> str:
        """The largest part of the step, in words."""
        kernel_times = self.kernel_seconds, self.kernel_low, self.kernel_high
        return counts.Priced(*kernel_times, self.compute_seconds, self.exposed_seconds, self.limits["peak"]).bound

    def to_json(self) -> dict[str, Any]:
        """Fields and derived figures."""
        derived = (
            "step_seconds",
            "step_interval",
            "counted_seconds",
            "exposed_seconds",
            "bubble",
            "mfu",
            "bound",
            "tokens_per_second_per_chip",
        )
        return (
            dataclasses.asdict(self)
            | {name: getattr(self, name) for name in derived}
            | {"memory_total": self.memory.total, "memory_notes": self.memory.notes(self.platform)}
            | {"cost": self.cost(), "interval_basis": self.interval_basis}
            | {"token_all_gathers": len(self.token_exchanges), "unnamed_all_gathers": len(self.unnamed_gathers)}
        )


def cost_words(tokens: float, chips: int, platform: str, seconds: tuple[float, float, float]) -> str:
    """Days and chip-hours of a trillion tokens, as a sentence.

    Args:
        tokens: of a step.
        chips: of the slice; platform: "tpu" or "gpu".
        seconds: of a step, and the ends of its interval.
    """
    days, low, high = (1e12 / tokens * each / 86400 for each in seconds)
    hours = f"{days * 24 * chips:,.0f} {'GPU' if platform == 'gpu' else 'chip'}-hours"
    return f"1 trillion tokens: {days:,.1f} days ({low:,.1f} to {high:,.1f}), {hours}"


def make_fitting_plan(
    config: Config, topology: Topology, scenario: Scenario | None = None, programs: Path | None = None
) -> Plan:
    """Plan with the remat policy that recomputes least among those that fit; policies whose estimate is far above the
    memory (:data:`moe.planner.fit.MARGIN`) are not compiled.

    Raises:
        ConfigError: none fits, or the config does not fit the mesh.
    """
    mesh, capacity = make_mesh(config.mesh, topology.devices), topology.capacity
    validate_mesh(config, mesh.shape)
    for policy in fit.LADDER:
        tried = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))
        estimated = fit.estimate(tried, mesh.shape, topology.platform).total
        if policy != fit.LADDER[-1] and estimated > fit.MARGIN * capacity:
            continue
        try:
            return make_plan(tried, topology, scenario, programs)
        except DoesNotFitError:
            if policy == fit.LADDER[-1]:
                raise
    raise AssertionError


def make_plan(
    config: Config, topology: Topology, scenario: Scenario | None = None, programs: Path | None = None
) -> Plan:
    """Compile the train step of a run for hardware that is absent, or read it from a folder of programs.

    Raises:
        ConfigError: the config does not fit the mesh, or the program does not fit the memory; the message says by how
            much and which settings help; or the scenario makes no sense for the config.
    """
    return read_step(config, topology, read_or_compile(config, topology, programs), scenario)


def read_step(config: Config, topology: Topology, step: CompiledStep, scenario: Scenario | None = None) -> Plan:
    """Plan from a compiled train step."""
    scenario = scenario or Scenario()
    if scenario.skew > 1 and (config.model.moe.gate is None or config.model.moe.dispatch != "dropless"):
        raise ConfigError(
            f"--skew={scenario.skew}: must be 1 unless model.moe.dispatch=dropless; with a capacity every expert "
            "computes the same rows, and further tokens are dropped"
        )
    mesh = make_mesh(config.mesh, topology.devices)
    if scenario.skew > mesh.shape["expert"]:
        raise ConfigError(
            f"--skew={scenario.skew}: must be at most mesh.expert={mesh.shape['expert']}, where one device has all rows"
        )
    chip, devices = scenario.applied(topology.chip), list(mesh.devices.flat)
    peak = chip.peak / chip.devices

    def rows(operation: str) -> int:
        return int(_assignments(config, mesh, operation) * scenario.skew)

    def kernel_price(matmul: GroupedMatmul) -> Price:
        # With exchanged rows a buffer is larger than a balanced load; with a capacity all of its rows are computed.
        dropless = config.model.moe.dispatch == "dropless"
        price = kernels.price(matmul, rows(matmul.source) if dropless else matmul.sizes[0], chip)
        if not scenario.matmul_share:
            return price
        seconds = price.flops / (scenario.matmul_share * peak)
        return Price(seconds, seconds, seconds, "--matmul_share", price.flops, price.least)

    matmuls, float8 = scenario.matmul_share * peak, 2 * chip.matmul_share * peak
    kind = topology.name.partition(":")[0]
    rates = program.Rates(
        chip.memory_bandwidth / chip.devices,
        peak,
        matmuls,
        chip.condition,
        float8,
        unembedding.share(kind),
        row_movement.price(kind),
    )
    attention_prices = functools.partial(
        attention.prices,
        flops=step.products.kernels / len(devices),
        peak=peak,
        factor=functools.partial(attention.factor, kind, config.model, config.data.sequence_length),
    )

    def trips(loop: str) -> int | None:
        return row_blocks.balanced_trips(loop, rows(loop))

    text = program.read(step.text, dict(mesh.shape), chip.clock, kernel_price, rates, attention_prices, trips)
    text = dataclasses.replace(text, collectives=exchanges.balanced(text.collectives, config.model.moe, mesh.shape))
    items = text.items
    found = exchanges.summarise(text, devices, chip)
    if scenario.skew > 1:
        found = tuple(
            # Gathered tokens go to every device, whatever the load.
            exchanges.skewed(exchange, scenario.skew) if "all-to-all" in exchange.kind else exchange
            for exchange in found
        )
    priced = [item for item in items if item.kind in ("grouped matmul", "attention", "row movement")]
    total, active = flops.count_parameters(config.model)
    tokens = config.tokens_per_step
    basis: dict[str, float] = {}
    for item in items:
        basis[item.basis] = basis.get(item.basis, 0.0) + item.seconds * item.count
    exposed = sum(exchange.exposed_seconds for exchange in found)
    counted = sum(item.seconds * item.count for item in items) + exposed
    middle = sum(item.seconds * item.count for item in priced)
    low = sum(item.low * item.count for item in priced)
    high = sum(item.high * item.count for item in priced)
    known = calibration.rows()
    at_peak = sum(item.least * item.count for item in items)
    counted_from = counts.Counts(
        matmuls=counts.matmuls(
            (matmul, rows(matmul.source) if config.model.moe.dispatch == "dropless" else matmul.sizes[0])
            for matmul in text.grouped
        ),
        attention=counts.scores(items, kind, attention.layers(config.model, config.data.sequence_length)),
        rows=sum(item.seconds * item.count for item in items if item.kind == "row movement") / rates.rows.seconds,
        rest=counted - exposed - middle,
        rest_least=at_peak - sum(item.least * item.count for item in priced),
        waited=network.USABLE * exposed,
        # A nested fusion may slice an operand whose bytes are counted as a whole, in less time than those would take.
        memory=sum(item.count * min(item.bytes / rates.memory_bandwidth, item.seconds) for item in items),
        links=network.USABLE * max(exchanges.busy(text.collectives, devices, chip).values(), default=0.0),
    )
    of_step = counts.Priced(middle, low, high, counted - exposed, exposed, at_peak)
    return Plan(
        topology=topology.name,
        platform=topology.platform,
        estimate=chip.estimate,
        num_slices=topology.num_slices,
        chips=topology.num_chips,
        devices=len(devices),
        mesh=dict(mesh.shape),
        remat=config.model.remat,
        memory=step.memory,
        exchanges=found,
        compile_seconds=step.seconds,
        tokens=tokens,
        total_parameters=total,
        active_parameters=active,
        model_flops=flops.train_flops(config),
        simple_flops=6.0 * active * tokens,
        program_flops=step.products.total,
        peak_flops=chip.peak * topology.num_chips,
        compute_seconds=sum(item.seconds * item.count for item in items),
        kernel_seconds=middle,
        kernel_low=low,
        kernel_high=high,
        floor_seconds=of_step.floor,
        limits=counts.limits(counted_from, of_step),
        counts=counts.to_json(counted_from),
        log_width=calibration.width(
            kind,
            calibration.kernel_width(counted, middle, low, high),
            known,
            pipeline=mesh.shape.get("pipeline", 1) > 1,
        ),
        steps=len(known),
        chip_steps=calibration.steps_of(kind, known),
        parts={f"{where} {kind}": seconds for (where, kind), seconds in text.parts.items()},
        unpriced=text.unpriced,
        unknown_loops=text.unknown_loops,
        scenario=scenario.words(),
        basis=dict(sorted(basis.items(), key=lambda pair: -pair[1])),
        where=tuple(timeline.by_part(items)),
        items=tuple(timeline.dearest(items, peak, chip.memory_bandwidth / chip.devices, found)),
        lanes=tuple(timeline.lanes(text, devices, chip)),
        arrays=text.arrays[:20],
        versions=tuple(versions()),
        commit=step.commit,
        prices=calibration.prices(),
        program=hashlib.sha256(step.text.encode()).hexdigest()[:16],
        config=to_dict(config),
    )


def _assignments(config: Config, mesh: Any, operation: str = "") -> int:
    """(token, expert) choices of a device that one pass of a layer's kernels computes.

    Args:
        config: of the run.
        mesh: of its devices.
        operation: name in the program, of the encoder's layer or of the decoder's.
    """
    rows = config.train.microbatch_rows
    devices = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"] * mesh.shape.get("context", 1)
    encoder = re.search(rf"\b{ENCODER_SCOPE}\b", operation)
    moe, length = config.model.moe, config.data.input_length if encoder else config.data.sequence_length
    chunks = moe.chunks(moe.group_size or length, mesh.shape["expert"])
    return int(rows * length // devices * moe.experts_per_token * moe.ffn_share) // chunks
