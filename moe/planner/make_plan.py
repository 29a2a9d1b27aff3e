"""Plan of a run: the real train step compiled for a topology, read, and priced."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
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
    excess,
    exchanges,
    fit,
    kernels,
    network,
    program,
    row_movement,
    timeline,
    unembedding,
)
from moe.planner.chips import Chip
from moe.planner.compiled import CompiledStep, read_or_compile
from moe.planner.exchanges import Exchange
from moe.planner.gpus import Gpu
from moe.planner.memory_errors import DoesNotFitError
from moe.planner.plan import Plan
from moe.planner.program import CompiledProgram, Rates
from moe.planner.records import GroupedMatmul, Item, Price
from moe.planner.scenario import Scenario
from moe.planner.topology import Topology
from moe.planner.versions import versions


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


def read_step(
    config: Config,
    topology: Topology,
    step: CompiledStep,
    scenario: Scenario | None = None,
    order: Sequence[int] | None = None,
) -> Plan:
    """Plan from a compiled train step.

    Args:
        config: of the run.
        topology: that the step was compiled for.
        step: this project's, or another codebase's of the same model, batch and mesh.
        scenario: assumptions to change.
        order: ids of the devices in the step's mesh; None: as in this project's.
    """
    scenario = scenario or Scenario()
    mesh = make_mesh(config.mesh, topology.devices)
    _check_skew(config, mesh, scenario.skew)
    chip, devices = scenario.applied(topology.chip), list(mesh.devices.flat)
    if order is not None:
        by_id = {device.id: device for device in topology.devices}
        devices = [by_id[each] for each in order]
    rates = Rates(
        chip.device_bandwidth,
        chip.device_peak,
        scenario.matmul_share * chip.device_peak,
        chip.condition,
        2 * chip.matmul_share * chip.device_peak,
        unembedding.share(chip.name),
        row_movement.price(chip.name),
    )
    filled = _filled_rows(config, mesh, scenario.skew)
    text = _priced_program(config, mesh, chip, step, scenario, rates, filled)
    found = _exchanges(text, devices, chip, scenario.skew)
    priced, counted_from = _counts(config, chip, text, rates, filled, found, devices)
    basis: dict[str, float] = {}
    for item in text.items:
        basis[item.basis] = basis.get(item.basis, 0.0) + item.seconds * item.count
    known = calibration.rows()
    total, active = flops.count_parameters(config.model)
    tokens = config.tokens_per_step
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
        compute_seconds=priced.work,
        kernel_seconds=priced.kernels,
        kernel_low=priced.kernels_low,
        kernel_high=priced.kernels_high,
        floor_seconds=priced.floor,
        limits=counts.limits(counted_from, priced),
        counts=counted_from.model_dump(),
        log_width=calibration.width(
            chip.name,
            calibration.kernel_width(priced.counted, priced.kernels, priced.kernels_low, priced.kernels_high),
            known,
            pipeline=mesh.shape.get("pipeline", 1) > 1,
        ),
        steps=len(known),
        chip_steps=calibration.steps_of(chip.name, known),
        parts={f"{where} {kind}": seconds for (where, kind), seconds in text.parts.items()},
        unpriced=text.unpriced,
        unknown_loops=text.unknown_loops,
        scenario=scenario.words(),
        basis=dict(sorted(basis.items(), key=lambda pair: -pair[1])),
        where=tuple(timeline.by_part(text.items)),
        items=tuple(timeline.dearest(text.items, chip.device_peak, chip.device_bandwidth, found)),
        lanes=tuple(timeline.lanes(text, devices, chip)),
        arrays=text.arrays[:20],
        versions=tuple(versions()),
        commit=step.commit,
        prices=calibration.prices(),
        program=hashlib.sha256(step.text.encode()).hexdigest()[:16],
        config=to_dict(config),
    )


def _check_skew(config: Config, mesh: Any, skew: float) -> None:
    if skew > 1 and (config.model.moe.gate is None or config.model.moe.dispatch != "dropless"):
        raise ConfigError(
            f"--skew={skew}: must be 1 unless model.moe.dispatch=dropless; with a capacity every expert "
            "computes the same rows, and further tokens are dropped"
        )
    if skew > mesh.shape["expert"]:
        raise ConfigError(
            f"--skew={skew}: must be at most mesh.expert={mesh.shape['expert']}, where one device has all rows"
        )


def _filled_rows(config: Config, mesh: Any, skew: float) -> Callable[[GroupedMatmul | str], int]:
    """Rows that the router fills in a kernel, or in the loop of that name."""

    def filled(of: GroupedMatmul | str) -> int:
        # With exchanged rows a buffer is larger than a balanced load; with a capacity all of its rows are computed.
        if isinstance(of, GroupedMatmul) and config.model.moe.dispatch != "dropless":
            return of.sizes[0]
        return int(_assignments(config, mesh, of if isinstance(of, str) else of.source) * skew)

    return filled


def _priced_program(
    config: Config,
    mesh: Any,
    chip: Chip | Gpu,
    step: CompiledStep,
    scenario: Scenario,
    rates: Rates,
    filled: Callable[[GroupedMatmul | str], int],
) -> CompiledProgram:
    """The step's program with a price for each instruction, its exchanges those of a balanced router."""

    def kernel_price(matmul: GroupedMatmul) -> Price:
        price = kernels.price(matmul, filled(matmul), chip)
        if not scenario.matmul_share:
            return price
        seconds = price.flops / (scenario.matmul_share * chip.device_peak)
        return Price(seconds, seconds, seconds, "--matmul_share", price.flops, price.least)

    attention_prices = functools.partial(
        attention.prices,
        flops=step.products.kernels / mesh.devices.size,
        peak=chip.device_peak,
        factor=functools.partial(attention.factor, chip.name, config.model, config.data.sequence_length),
    )

    def trips(loop: str) -> int | None:
        return row_blocks.balanced_trips(loop, filled(loop))

    text = program.read(step.text, dict(mesh.shape), chip.clock, kernel_price, rates, attention_prices, trips)
    return dataclasses.replace(text, collectives=exchanges.balanced(text.collectives, config.model.moe, mesh.shape))


def _exchanges(text: CompiledProgram, devices: Sequence[Any], chip: Chip | Gpu, skew: float) -> tuple[Exchange, ...]:
    found = exchanges.summarise(text, devices, chip)
    if skew == 1:
        return found
    return tuple(
        # Gathered tokens go to every device, whatever the load.
        exchanges.skewed(exchange, skew) if "all-to-all" in exchange.kind else exchange
        for exchange in found
    )


def _counts(
    config: Config,
    chip: Chip | Gpu,
    text: CompiledProgram,
    rates: Rates,
    filled: Callable[[GroupedMatmul | str], int],
    found: Sequence[Exchange],
    devices: Sequence[Any],
) -> tuple[counts.Priced, counts.Counts]:
    """Seconds of a step, and the counts from which later prices make them again."""
    items = text.items
    kinds = "grouped matmul", "attention", "row movement"
    kernels_of = [item for item in items if item.kind in kinds]
    others = [item for item in items if item.kind not in kinds]
    exposed = sum(exchange.exposed_seconds for exchange in found)
    work = _total(items, "seconds")
    middle, low, high = (_total(kernels_of, name) for name in ("seconds", "low", "high"))
    at_peak = _total(items, "least")
    counted_from = counts.Counts(
        matmuls=counts.matmuls((matmul, filled(matmul)) for matmul in text.grouped),
        attention=counts.scores(items, chip.name, attention.layers(config.model, config.data.sequence_length)),
        rows=_total([item for item in items if item.kind == "row movement"], "seconds") / rates.rows.seconds,
        rest=work - middle,
        rest_least=at_peak - _total(kernels_of, "least"),
        waited=network.USABLE * exposed,
        # A nested fusion may slice an operand whose bytes are counted as a whole, in less time than those would take.
        memory=sum(item.count * min(item.bytes / rates.memory_bandwidth, item.seconds) for item in items),
        links=network.USABLE * max(exchanges.busy(text.collectives, devices, chip).values(), default=0.0),
        work=excess.of_items(others, chip.device_peak, rates.memory_bandwidth),
        waits=excess.of_exchanges(found),
    )
    return counts.Priced(middle, low, high, work, exposed, at_peak), counted_from


def _total(items: Sequence[Item], name: str) -> float:
    """Sum of a field of items over all runs."""
    return sum(getattr(item, name) * item.count for item in items)


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
