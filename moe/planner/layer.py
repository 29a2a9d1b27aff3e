"""One MoE layer compiled for a topology: its estimated time, beside the time of its matmuls at peak.

As in :mod:`moe.planner.plan`, exchanges and copies are facts and times are estimates. Two floors are given, both the
time of the experts' matmuls at peak: for the active FLOPs (K experts per token), and for all rows that the dispatch
mode computes (all slots of the capacity, empty or not). A ratio is the time on the chip over a floor.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe.config import Config, ModelConfig, MoEConfig
from moe.dispatch.backends import row_blocks
from moe.dispatch.buffers import layer_capacity
from moe.dispatch.ffn import GATED_ACTIVATIONS
from moe.layers.moe_layer import MoELayer
from moe.parallel import partition_specs, target
from moe.parallel.mesh import ROW_AXES, axis_size, make_mesh
from moe.parallel.parameters import parameter_specs
from moe.planner import exchanges, kernels, program
from moe.planner.topology import Topology


@dataclasses.dataclass(frozen=True)
class Reading:
    """Figures of one pass of a layer, per device; times in seconds.

    Attributes:
        estimated: the compiler's estimate without exchanges and kernels; matmuls: its part in fusions with a matrix
            product.
        kernels: grouped matmuls, by :mod:`moe.planner.kernels` for a balanced router.
        unpriced: instructions without an estimate (the SparseCore's gathers, copies on GPUs), at memory bandwidth.
        active_floor, slot_floor: the experts' matmuls at peak, over active assignments and over all rows computed.
        exchanges: as in a plan.
        copies: number of arrays of 1 MiB and more copied in HBM; copied_bytes: their sum.
        temporaries: bytes.
    """

    estimated: float
    matmuls: float
    kernels: float
    unpriced: float
    active_floor: float
    slot_floor: float
    exchanges: tuple[exchanges.Exchange, ...]
    copies: int
    copied_bytes: int
    temporaries: int
    compile_seconds: float

    @property
    def chip(self) -> float:
        """Seconds of work on the chip, the numerator of the ratios."""
        return self.estimated + self.kernels

    @property
    def exposed(self) -> float:
        """Seconds of exchange with no work scheduled beside it."""
        return sum(exchange.exposed_seconds for exchange in self.exchanges)

    def to_json(self) -> dict[str, Any]:
        """Fields and derived figures."""
        ratios = {"ratio": self.chip / self.active_floor, "ratio_of_slots": self.chip / self.slot_floor}
        return dataclasses.asdict(self) | {"chip": self.chip, "exposed": self.exposed} | ratios


def read_layer(config: Config, topology: Topology, tokens: int, *, backward: bool) -> Reading:
    """Compile the MoE layer of a config, router and losses included, with float32 parameters.

    Args:
        config: its model and mesh are used.
        topology: to compile for, all its devices.
        tokens: per row of the batch; every device has one row, or its part of a row that ``mesh.context`` splits.
        backward: forward and backward, gradients of parameters and tokens, instead of forward.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    start = time.perf_counter()
    compiled = _compile(config.model, mesh, tokens, topology, backward=backward)
    seconds = time.perf_counter() - start
    chip, moe = topology.chip, config.model.moe
    parts = mesh.shape.get("context", 1)
    active = tokens * moe.experts_per_token // parts
    at_once = active // moe.chunks(moe.group_size or tokens, mesh.shape["expert"])
    text = program.read(
        compiled.as_text() or "",
        dict(mesh.shape),
        chip.clock,
        lambda matmul: kernels.price(matmul, at_once if moe.dispatch == "dropless" else matmul.sizes[0], chip),
        trips=functools.partial(row_blocks.balanced_trips, rows=at_once),
    )
    memory = compiled.memory_analysis()
    matmuls = 3 if config.model.activation in GATED_ACTIVATIONS else 2
    flops = 2 * matmuls * config.model.expert_dim * moe.d_ff * (3 if backward else 1) / mesh.shape["tensor"]
    peak = chip.device_peak
    return Reading(
        estimated=text.seconds,
        matmuls=sum(part for (_, kind), part in text.parts.items() if kind == "matmuls"),
        kernels=sum(item.seconds * item.count for item in text.items if item.kind == "grouped matmul"),
        unpriced=text.unpriced_bytes / chip.device_bandwidth,
        active_floor=flops * active / peak,
        slot_floor=flops * _computed_rows(moe, tokens) / parts / peak,
        exchanges=exchanges.summarise(text, list(mesh.devices.flat), chip),
        copies=sum(count for _, count, _ in text.copies),
        copied_bytes=sum(size * count for size, count, _ in text.copies),
        temporaries=memory.temp_size_in_bytes if memory else 0,
        compile_seconds=seconds,
    )


def _compile(
    model: ModelConfig, mesh: jax.sharding.Mesh, tokens: int, topology: Topology, *, backward: bool
) -> jax.stages.Compiled:
    """The compiled layer."""
    with jax.set_mesh(mesh):
        graphdef, parameters, rest = nnx.split(
            nnx.eval_shape(lambda: MoELayer(model, rngs=nnx.Rngs(0))), nnx.Param, ...
        )
        where = partition_specs.shardings(mesh, parameter_specs(parameters))
        parameters = jax.tree.map(
            lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=spec), nnx.to_pure_dict(parameters), where
        )
        rows = axis_size(*ROW_AXES)
        batch = partition_specs.shardings(mesh, partition_specs.BATCH)
        x = jax.ShapeDtypeStruct((rows, tokens, model.d_model), jnp.dtype(model.dtype), sharding=batch)

        def forward(parameters, x):
            state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), rest)  # a gate's bias
            module = nnx.merge(graphdef, parameters, state)
            y, report, _ = module(x, jnp.ones(x.shape[:2], bool), train=True)
            return y, report.load_balancing_loss

        def both(parameters, x, gradient):
            outputs, pull = jax.vjp(forward, parameters, x)
            return outputs, pull((gradient, jnp.ones_like(outputs[1])))

        traced = jax.jit(both).trace(parameters, x, x) if backward else jax.jit(forward).trace(parameters, x)
        options = {**target.compiler_options(mesh.devices.flat[0].device_kind), **topology.compiler_options}
        return traced.lower().compile(compiler_options=options or None)


def _computed_rows(moe: MoEConfig, tokens: int) -> int:
    """Rows that the experts multiply: active assignments without a capacity, all slots with one."""
    if moe.dispatch == "dropless":
        return tokens * moe.experts_per_token
    group = moe.group_size or tokens
    return tokens // group * moe.num_experts * layer_capacity(moe, group)


HEADER = (
    f"{'case':32} {'pass':8} {'chip ms':>8} {'matmuls':>8} {'kernels':>8} {'floor':>7} {'ratio':>6} {'of slots':>8} "
    f"{'exchange ms: exposed':>20} {'all-to-alls':>16} {'copies':>14} {'compiled s':>10}"
)


def render(name: str, which: str, reading: Reading) -> str:
    """A row of the table under :data:`HEADER`; ratios are over the active floor and over the slot floor."""
    tokens = [e for e in reading.exchanges if e.kind in ("all-to-all", "ragged-all-to-all") and e.bytes >= 2**20]
    exchange = f"{1e3 * sum(e.seconds for e in reading.exchanges):.2f}: {1e3 * reading.exposed:.2f}"
    sent = f"{sum(e.count for e in tokens)} of {sum(e.bytes for e in tokens) / 2**20:.0f} MiB"
    copies = f"{reading.copies} of {reading.copied_bytes / 2**20:.0f} MiB"
    ratios = f"{reading.chip / reading.active_floor:6.2f} {reading.chip / reading.slot_floor:8.2f}"
    return (
        f"{name:32} {which:8} {1e3 * reading.chip:8.2f} {1e3 * reading.matmuls:8.2f} {1e3 * reading.kernels:8.2f} "
        f"{1e3 * reading.active_floor:7.2f} {ratios} {exchange:>20} {sent:>16} {copies:>14} "
        f"{reading.compile_seconds:10.0f}"
    )
