"""Candidates of the search: combinations of mesh, remat policy, dispatch mode and rows that may run."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from moe.config import Config, ConfigError, MeshConfig, ModelConfig, sparse_layers, validate_mesh
from moe.dispatch.ffn import GATED_ACTIVATIONS
from moe.dispatch.modes import CONFIG_MODES
from moe.models import flops
from moe.parallel.mesh import make_mesh
from moe.parallel.partition_specs import REMAT_POLICIES
from moe.planner import fit
from moe.planner.chips import Chip
from moe.planner.gpus import Gpu
from moe.planner.topology import Topology

#: Remat policies to try. Those with arrays in the host's memory are left out because their transfers are priced by an
#: assumed link to it, ``routes`` because it needs as much memory and arithmetic as ``full``.
_NOT_SEARCHED = "offload", "offload_inputs", "routes"
SEARCHED_POLICIES = tuple(policy for policy in REMAT_POLICIES if policy not in _NOT_SEARCHED)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, remat policy, dispatch mode and batch to try.

    Attributes:
        config: valid, also for its mesh.
        seconds: a rough guess of its step, used only to choose what to compile first.
        fixed, activations: estimated bytes of a device, independent of the rows and in proportion to them.
    """

    config: Config
    seconds: float
    fixed: int = 0
    activations: int = 0


#: Rows per device and microbatch that the search tries besides those of the config.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def meshes(devices: int, num_slices: int = 1) -> Iterator[MeshConfig]:
    """All meshes of that many devices; only ``data`` crosses slices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for data, fsdp, expert in itertools.product(divisors, repeat=3):
        if devices % (data * fsdp * expert) == 0 and data % num_slices == 0:
            yield MeshConfig(data, fsdp, expert, devices // (data * fsdp * expert))


def candidates(
    config: Config, devices: int, chip: Chip | Gpu, num_slices: int = 1, rows: Sequence[int] = ()
) -> tuple[list[Candidate], collections.Counter[str]]:
    """Enumerate the combinations that may run; also count those that cannot, by reason.

    Args:
        config: of the run; its mesh, remat policy and dispatch mode are replaced.
        devices: number in all slices.
        chip: of the devices.
        num_slices: slices joined by the data-center network.
        rows: per device and microbatch, to try with every combination besides the config's batch.
    """
    found, pruned = [], collections.Counter[str]()
    sparse, capacity = config.model.moe.gate is not None, chip.device_memory
    for mesh in meshes(devices, num_slices):
        sizes = dataclasses.asdict(mesh)
        shards = mesh.data * mesh.fsdp * mesh.expert * config.train.accumulation_steps
        batches = {each * shards for each in rows}
        if not rows or config.train.batch_size % shards == 0:
            batches.add(config.train.batch_size)
        trains = [dataclasses.replace(config.train, batch_size=batch) for batch in sorted(batches)]
        for remat, mode in itertools.product(
            SEARCHED_POLICIES, CONFIG_MODES if sparse else (config.model.moe.dispatch,)
        ):
            if not sparse and mesh.expert > 1:
                pruned["a dense model has no use for mesh.expert"] += len(trains)
                continue
            model, memory, a_row = None, None, 0.0  # of the first batch that passes the checks
            for train in trains:
                try:
                    model = model or _searched(config.model, remat, mode, mesh, chip)
                    tried = dataclasses.replace(config, mesh=mesh, model=model, train=train)
                    validate_mesh(tried, sizes)
                except ConfigError as error:
                    pruned[re.sub(r" = \d+$", "", str(error))] += 1
                    continue
                if memory is None:
                    memory = fit.estimate(tried, sizes, "gpu" if isinstance(chip, Gpu) else "tpu")
                    a_row = memory.activations / train.batch_size
                activations = round(a_row * train.batch_size)
                if memory.parameters + memory.optimizer > capacity:
                    pruned["parameters and optimizer alone do not fit"] += 1
                elif memory.fixed + activations > fit.MARGIN * capacity:
                    pruned["does not fit by the estimate of its memory"] += 1
                else:
                    found.append(Candidate(tried, guess_seconds(tried, chip), memory.fixed, activations))
    return sorted(found, key=lambda candidate: candidate.seconds / candidate.config.train.batch_size), pruned


def _searched(model: ModelConfig, remat: str, mode: str, mesh: MeshConfig, chip: Chip | Gpu) -> ModelConfig:
    """The model with another policy and dispatch, and the exchange by hosts that suits the mesh."""
    moe = model.moe.with_dispatch(mode)
    if mode == "dropless" and mesh.expert > 1 and moe.exchange == "all_to_all":
        moe = dataclasses.replace(moe, exchange_hosts=_hosts_of_experts(mesh, chip))
    return dataclasses.replace(model, remat=remat, moe=moe)


def _hosts_of_experts(mesh: MeshConfig, chip: Chip | Gpu) -> int:
    """Number of NVLink domains that the expert axis spans if it has equally many devices in each; else 1."""
    of_domain = chip.domain // (mesh.tensor * mesh.context) if isinstance(chip, Gpu) else 0
    return mesh.expert // of_domain if of_domain and mesh.expert % of_domain == 0 else 1


def guess_seconds(config: Config, chip: Chip | Gpu) -> float:
    """Guess a step: its arithmetic at :data:`_MATMUL_SHARE` of the peak plus its exchange, without overlap.

    Arithmetic: the model's FLOPs, up to a third more with recomputation, empty expert slots, one-hot matmuls, and every
    expert's matmul over every row where ``lax.ragged_dot`` has no kernel. Exchange: over fsdp, weights gathered forward
    and backward and their gradients scattered in every microbatch; expert rows sent out and back, three times; over
    tensor, partial sums, those of experts on their rows; over data, gradients summed.
    """
    model, moe, mesh = config.model, config.model.moe, config.mesh
    length = config.data.sequence_length
    devices = math.prod(dataclasses.asdict(mesh).values())
    inputs = config.data.input_length if model.encoder_layers else length
    tokens = config.train.batch_size * (length + inputs) / 2  # of a layer, on average over both stacks
    tokens_here = tokens / (devices / mesh.tensor)  # of one device
    layers, moe_layers = model.encoder_layers + model.num_layers, sum(sparse_layers(model))
    size = 4 if model.dtype == "float32" else 2

    into = 2 if model.activation in GATED_ACTIVATIONS else 1
    expert_parameters = moe_layers * (into + 1) * model.expert_dim * moe.d_ff
    needed = flops.expert_rows_per_token(model, length)
    slots = moe.gate is not None and moe.gate.slots_per_expert > 0
    buffers = moe_layers and not slots and moe.dispatch != "dropless"
    rows = flops.buffer_rows_per_token(model, length) if buffers else needed
    per_token, total = _of_model(fit.same_parameters(model), length, inputs)
    per_token *= config.train.batch_size * length / tokens
    per_token += 6 * expert_parameters * (rows - needed)
    if (
        moe_layers and moe.dispatch == "einsum" and not slots
    ):  # whose mixing the model's FLOPs count; in and out: [S,E·C] x [S,D]
        per_token += 12 * moe_layers * rows * (moe.group_size or length) * model.expert_dim
    if moe_layers and moe.dispatch == "dropless" and not chip.grouped_matmul:
        per_token += 6 * expert_parameters * rows * (moe.num_experts - 1)
    per_token *= 1 + _RECOMPUTED[model.remat] / 3
    arithmetic = per_token * tokens / (devices * _MATMUL_SHARE * chip.device_peak)
    arithmetic *= 1 + (mesh.pipeline - 1) / (config.train.accumulation_steps * config.train.pipeline_rounds)

    def share(parts: int) -> float:
        return (parts - 1) / parts

    experts = expert_parameters * moe.num_experts
    passes = 3 if model.remat == "none" else 4  # of a layer: forward, recomputed, backward twice
    gathers = (2 if model.remat == "none" else 3) * config.train.accumulation_steps
    weights = experts / (mesh.expert * mesh.tensor) * share(mesh.fsdp)
    weights += (total - experts) / mesh.tensor * share(mesh.fsdp * mesh.expert)
    routed = 6 * moe_layers * tokens_here * rows * model.expert_dim * size * share(mesh.expert)
    routed *= 1 if isinstance(chip, Gpu) else mesh.expert / 4  # the middle of a ring, see moe.planner.network
    summed = 2 * layers + moe_layers * (rows - 1)  # rows a token: of attention, of a dense FFN or of experts
    partial_sums = 2 * passes * summed * tokens_here * model.d_model * size * share(mesh.tensor)
    gradients = 2 * 4 * total / (mesh.fsdp * mesh.expert * mesh.tensor) * share(mesh.data)
    exchange, stride = 0.0, 1
    for sent, axis in (
        (partial_sums, "tensor"),
        (routed, "expert"),
        (gathers * weights * size, "fsdp"),
        (gradients, "data"),
    ):
        exchange += sent / chip.axis_bandwidth(stride, getattr(mesh, axis))
        stride *= getattr(mesh, axis)
    return arithmetic + exchange


#: Share of the peak that the arithmetic of compiled Mixtral-8x7B programs reached, with all work on the chip.
_MATMUL_SHARE = 0.8

#: Share of the forward pass that a remat policy recomputes, roughly.
_RECOMPUTED = {
    "none": 0.0, "hidden": 0.05, "outputs": 0.6, "attention": 0.9, "offload": 0.9, "offload_inputs": 1.0,
    "dots": 0.9, "routes": 1.0, "full": 1.0,
}  # fmt: skip


@functools.lru_cache
def _of_model(model: ModelConfig, length: int, inputs: int) -> tuple[float, int]:
    """(model FLOPs per token of the decoder, parameters)."""
    return flops.train_flops_per_token(model, length, inputs), flops.count_parameters(model)[0]


def changes(config: Config, topology: Topology, limit: int) -> list[tuple[str, Config]]:
    """Valid single changes of a run that may help, with their labels: rows per device, recomputation, dispatch, the
    exchange of tokens, mesh."""
    model, mesh, devices = config.model, config.mesh, len(topology.devices)
    sizes = {axis: make_mesh(mesh, topology.devices).shape.get(axis, 1) for axis in dataclasses.asdict(mesh)}
    config = dataclasses.replace(config, mesh=MeshConfig(**sizes))
    mesh, tried = config.mesh, list[tuple[str, Config]]()

    def add(label: str, **fields: Any) -> None:
        with contextlib.suppress(ConfigError):
            changed = dataclasses.replace(config, **fields)
            validate_mesh(changed, dataclasses.asdict(changed.mesh))
            if changed != config:
                tried.append((label, changed))

    rows = config.train.batch_size
    add("twice the rows a device", train=dataclasses.replace(config.train, batch_size=2 * rows))
    for remat in fit.LADDER:
        if remat != model.remat:
            add(f"model.remat={remat}", model=dataclasses.replace(model, remat=remat))
    if model.moe.gate is not None:
        for mode in ("dropless", "gather"):
            with contextlib.suppress(ConfigError):  # dropless has no fixed capacity
                moe = model.moe.with_dispatch(mode)
                add(f"model.moe.dispatch={mode}", model=dataclasses.replace(model, moe=moe))
        if model.moe.dispatch == "dropless" and mesh.expert > 1:
            add("model.remat=routes", model=dataclasses.replace(model, remat="routes"))
            hosts = _hosts_of_experts(mesh, topology.chip)
            for settings in (
                {"exchange_chunks": 2 * model.moe.exchange_chunks},
                {"exchange": "all_to_all", "exchange_hosts": hosts},
                {"exchange": "all_gather", "exchange_hosts": 1},
            ):
                other = {name: value for name, value in settings.items() if getattr(model.moe, name) != value}
                label = ", ".join(f"model.moe.{name}={value}" for name, value in other.items())
                with contextlib.suppress(ConfigError):  # twice the largest number of chunks
                    moe = dataclasses.replace(model.moe, **other)
                    add(label, model=dataclasses.replace(model, moe=moe))
        for expert in (1, 8, model.moe.num_experts):
            others = expert * (devices // (mesh.fsdp * mesh.expert))
            if devices % others == 0:
                fsdp = devices // others
                changed, moe = dataclasses.replace(mesh, fsdp=fsdp, expert=expert), model.moe
                label = f"mesh.fsdp={fsdp}, mesh.expert={expert}"
                if moe.exchange_hosts > 1:
                    moe = dataclasses.replace(moe, exchange_hosts=_hosts_of_experts(changed, topology.chip))
                    label += f", model.moe.exchange_hosts={moe.exchange_hosts}"
                add(label, mesh=changed, model=dataclasses.replace(model, moe=moe))

    def seconds_a_row(change: tuple[str, Config]) -> float:
        return guess_seconds(change[1], topology.chip) / change[1].train.batch_size

    return sorted(tried, key=seconds_a_row)[:limit]
