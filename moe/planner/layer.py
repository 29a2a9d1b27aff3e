"""One MoE layer compiled for a topology: how long its program takes by the compiler's estimate, and the least it could.

In: a model's config, a mesh, a :class:`moe.planner.topology.Topology`. Out: a :class:`Reading` of the layer forward, and
forward and backward. As in :mod:`moe.planner.plan`, exchanges and copies are compiled facts and times are estimates.

Two floors, both of the experts' matmuls alone at peak: of the active FLOPs (K experts a token), and of the FLOPs of the
rows that the mode computes (all slots of the capacity, empty or not). A ratio is the time on the chip over a floor.

Grouped matmuls, which the compiler gives no cycles, are counted by :mod:`moe.planner.kernels` for a balanced router.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe.config import Config
from moe.dispatch.plan import expert_capacity
from moe.layers.ffn import GATED_ACTIVATIONS
from moe.layers.moe_layer import MoELayer
from moe.parallel import partition_specs, target
from moe.parallel.mesh import axis_size, make_mesh
from moe.planner import hlo, kernels, plan
from moe.planner.topology import Topology


@dataclasses.dataclass(frozen=True)
class Reading:
    """One pass of a layer, per device; times in seconds.

    Attributes:
        cycles: the compiler's estimate, exchanges and kernels left out; matmuls: of it, fusions with a matrix product.
        kernels: grouped matmuls, as :mod:`moe.planner.kernels` counts them.
        unpriced: instructions without cycles (the SparseCore's gathers, beside the rest), at memory bandwidth.
        active_floor, slot_floor: the experts' matmuls at peak, of active pairs and of all rows computed.
        exchanges: as in a plan; exposed: what of them no work is scheduled beside.
        copies: arrays of 1 MiB and more copied in HBM; copied_bytes: of them together.
        temporaries: bytes.
    """

    cycles: float
    matmuls: float
    kernels: float
    unpriced: float
    active_floor: float
    slot_floor: float
    exchanges: tuple[plan.Exchange, ...]
    copies: int
    copied_bytes: int
    temporaries: int
    compile_seconds: float

    @property
    def chip(self) -> float:
        """Seconds of work on the chip: what the ratios are of."""
        return self.cycles + self.kernels

    @property
    def exposed(self) -> float:
        """Seconds of exchange that the chip waits for."""
        return sum(exchange.exposed_seconds for exchange in self.exchanges)

    def to_json(self) -> dict[str, Any]:
        """Fields and what follows from them."""
        ratios = {"ratio": self.chip / self.active_floor, "ratio_of_slots": self.chip / self.slot_floor}
        return dataclasses.asdict(self) | {"chip": self.chip, "exposed": self.exposed} | ratios


def read_layer(config: Config, topology: Topology, tokens: int, *, backward: bool) -> Reading:
    """Compiles the MoE layer of a config, router and losses included, with float32 parameters.

    Args:
        config: resolved; its model and mesh are used.
        topology: to compile for, all its devices.
        tokens: in a row of the batch, of which every device that has tokens has one.
        backward: forward and backward, gradients of parameters and tokens, instead of forward.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    model = config.model
    chip, moe, dtype = topology.chip, model.moe, jnp.dtype(model.dtype)
    with jax.set_mesh(mesh):
        graphdef, parameters, rest = nnx.split(
            nnx.eval_shape(lambda: MoELayer(model, rngs=nnx.Rngs(0))), nnx.Param, ...
        )
        where = partition_specs.shardings(mesh, partition_specs.parameter_specs(parameters))
        parameters = jax.tree.map(
            lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=spec), parameters, where
        )
        rows = axis_size(*partition_specs.TOKEN_AXES)
        batch = jax.NamedSharding(mesh, partition_specs.BATCH)
        x = jax.ShapeDtypeStruct((rows, tokens, model.d_model), dtype, sharding=batch)

        def forward(parameters, x):
            module = nnx.merge(graphdef, parameters, rest)
            y, report, _ = module(x, jnp.ones(x.shape[:2], bool), train=True)
            return y, report.load_balancing_loss

        def both(parameters, x, gradient):
            outputs, pull = jax.vjp(forward, parameters, x)
            return outputs, pull((gradient, jnp.ones_like(outputs[1])))

        start = time.perf_counter()
        lowered = jax.jit(both).lower(parameters, x, x) if backward else jax.jit(forward).lower(parameters, x)
        options = target.compiler_options(topology.devices[0].device_kind)
        compiled = lowered.compile(compiler_options=options or None)
        seconds = time.perf_counter() - start
    text = hlo.read(compiled.as_text() or "", dict(mesh.shape))
    memory = compiled.memory_analysis()
    devices = list(mesh.devices.flat)
    matmuls = 3 if model.activation in GATED_ACTIVATIONS else 2
    flops = 2 * matmuls * model.d_model * moe.d_ff * (3 if backward else 1) / mesh.shape["tensor"]
    active = tokens * moe.experts_per_token
    slots = active
    if moe.dispatch != "dropless":
        group = moe.group_size or tokens
        capacity = expert_capacity(moe.capacity_factor, moe.experts_per_token, group, moe.num_experts)
        slots = tokens // group * moe.num_experts * capacity
    peak = chip.peak / chip.devices
    return Reading(
        cycles=text.cycles / chip.clock,
        matmuls=sum(cycles for (_, kind), cycles in text.parts.items() if kind == "matmuls") / chip.clock,
        kernels=sum(matmul.count * kernels.seconds(matmul, active, chip) for matmul in text.grouped),
        unpriced=text.unpriced_bytes / (chip.memory_bandwidth / chip.devices),
        active_floor=flops * active / peak,
        slot_floor=flops * slots / peak,
        exchanges=plan.summarise(text, devices, chip),
        copies=sum(count for _, count, _ in text.copies),
        copied_bytes=sum(size * count for size, count, _ in text.copies),
        temporaries=memory.temp_size_in_bytes if memory else 0,
        compile_seconds=seconds,
    )


HEADER = (
    f"{'case':32} {'pass':8} {'chip ms':>8} {'matmuls':>8} {'kernels':>8} {'floor':>7} {'ratio':>6} {'of slots':>8} "
    f"{'exchange ms: exposed':>20} {'all-to-alls':>16} {'copies':>14} {'compiled s':>10}"
)


def render(name: str, which: str, reading: Reading) -> str:
    """A line below :data:`HEADER`: ratios are of the floor of active FLOPs, and of that of all rows computed."""
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
