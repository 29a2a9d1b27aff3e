"""Programs that ``scripts/bench_moe.py`` times: an MoE layer, its experts alone, and matmuls to compare with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe.config import ModelConfig, MoEConfig
from moe.config.parse import build
from moe.config.registry import find_gate
from moe.dispatch.backends import backend, grouped_ffn
from moe.layers.ffn import Experts
from moe.layers.moe_layer import MoELayer
from moe.parallel import partition_specs, target
from moe.parallel.mesh import AXES, ROW_AXES, TOKEN_AXES, axis_size
from moe.parallel.parameters import parameter_specs
from moe.routing.gates import TopK
from moe.routing.interface import GateInputs
from moe.routing.routing import Routing, route


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and its input; see the flags of ``scripts/bench_moe.py``."""

    shape: str
    gate: str
    mode: str
    experts: int
    k: int
    d_model: int
    d_ff: int
    activation: str
    tokens: int
    group_size: int
    capacity_factor: float
    dtype: str
    skew: float

    @property
    def name(self) -> str:
        """Label of a row."""
        return f"{self.shape} E={self.experts} k={self.k} {self.gate} {self.mode}"


def reference(case: Case) -> dict[str, Callable[[], Any]]:
    """Plain batched matmuls with as many FLOPs as the active ones: forward, and forward and backward."""
    e = case.experts
    d = case.d_model
    f = case.d_ff
    rows = -(-case.tokens * case.k // case.experts)
    gated = case.activation == "swiglu"
    key = jax.random.key(0)
    x = jax.random.normal(key, (e, rows, d), case.dtype)
    hidden = [jax.random.normal(key, (e, rows, f), case.dtype) for _ in range(1 + gated)]  # separate buffers
    into = [jax.random.normal(key, (e, d, f), case.dtype) for _ in range(1 + gated)]
    out_of = jax.random.normal(key, (e, f, d), case.dtype)

    @jax.jit
    def forward(x, hidden, into, out_of):
        return [jnp.einsum("erd,edf->erf", x, w) for w in into], jnp.einsum("erf,efd->erd", hidden[0], out_of)

    @jax.jit
    def both(x, hidden, into, out_of):
        return (
            forward(x, hidden, into, out_of),
            [jnp.einsum("erf,edf->erd", h, w) for h, w in zip(hidden, into, strict=True)],
            [jnp.einsum("erd,erf->edf", x, h) for h in hidden],
            jnp.einsum("erd,efd->erf", x, out_of),
            jnp.einsum("erf,erd->efd", hidden[0], x),
        )

    arguments = (x, hidden, into, out_of)
    return {"forward": lambda: forward(*arguments), "both": lambda: both(*arguments)}


def model_config(case: Case) -> Any:
    """Config of a model with the case's layer."""
    k = {"k": case.k} if find_gate(case.gate).sets_k else {}
    own = case.tokens // axis_size(*TOKEN_AXES)  # tokens of one device, which holds whole groups
    fields = {
        "gate": {"name": case.gate, **k},
        "num_experts": case.experts,
        "d_ff": case.d_ff,
        "dispatch": case.mode,
        "group_size": case.group_size or (min(512, own) if case.mode == "einsum" else own),
        "capacity": {} if case.capacity_factor == -1 else {"train": case.capacity_factor},
    }
    moe = build(MoEConfig, fields, "model.moe.")
    return ModelConfig(
        d_model=case.d_model, activation=cast(Any, case.activation), dtype=cast(Any, case.dtype), moe=moe
    )


def layer(case: Case) -> tuple[dict[str, Callable[[], Any]], float]:
    """Programs of the layer, with router and losses, and the share of assignments that it drops."""
    config = model_config(case)
    graphdef, parameters, rest = nnx.split(MoELayer(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    rows = axis_size(*ROW_AXES)
    x = jax.random.normal(jax.random.key(1), (rows, case.tokens // rows, case.d_model), case.dtype)
    mask = jnp.ones(x.shape[:2], bool)
    replayed: Routing | None = None
    if case.skew != 1.0:
        # Gumbel top-k: the choices of a token are drawn without replacement, in proportion to the shares.
        draws = jax.random.gumbel(jax.random.key(2), (*x.shape[:2], case.experts))
        logits = draws.at[..., 0].add(np.log(case.skew)).reshape(-1, config.moe.group_size, case.experts)
        masks = mask.reshape(logits.shape[:2])
        replayed = route(TopK(k=case.k, renormalise=case.k > 1), logits, GateInputs(masks))
    if not jax.sharding.get_abstract_mesh().empty:
        mesh = jax.sharding.get_mesh()
        x, mask = jax.device_put((x, mask), partition_specs.shardings(mesh, partition_specs.BATCH))
        where = partition_specs.shardings(mesh, parameter_specs(parameters))
        parameters = jax.device_put(nnx.to_pure_dict(parameters), where)

    def forward(parameters, x):
        module = nnx.merge(graphdef, parameters, rest)
        y, report, _ = module(x, mask, routing=replayed, train=True)
        return y, report

    def loss(parameters, x):
        y, report = forward(parameters, x)
        return jnp.sum(y.astype(jnp.float32) * x) + report.load_balancing_loss

    run, gradient = _jitted(forward, loss)
    dropped = float(run(parameters, x)[1].fraction_tokens_dropped)
    return {"forward": lambda: run(parameters, x), "both": lambda: gradient(parameters, x)}, dropped


def experts_alone(case: Case) -> dict[str, Callable[[], Any]]:
    """Programs of the experts on rows sorted by expert, equally many for each."""
    dropless = dataclasses.replace(case, mode="dropless")
    config = model_config(dropless)
    graphdef, parameters = nnx.split(Experts(config, rngs=nnx.Rngs(0)))
    num_rows = -(-case.tokens * case.k // case.experts) * case.experts
    sizes = jnp.full((case.experts,), num_rows // case.experts, jnp.int32)
    rows = jax.random.normal(jax.random.key(1), (num_rows, case.d_model), case.dtype)

    def forward(parameters, rows, sizes):
        experts = nnx.merge(graphdef, parameters)
        return grouped_ffn(rows, sizes, backend().pack(experts.weights.gathered(rows.dtype)))

    def loss(parameters, rows, sizes):
        return jnp.sum(forward(parameters, rows, sizes).astype(jnp.float32) * rows)

    run, gradient = _jitted(forward, loss)
    arguments = (parameters, rows, sizes)
    return {"forward": lambda: run(*arguments), "both": lambda: gradient(*arguments)}


def _jitted(forward: Callable[..., Any], loss: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward pass, and the gradients of the loss by parameters and inputs, compiled with a run's options."""
    options = target.compiler_options(jax.devices()[0].device_kind) or None
    gradient = jax.grad(loss, argnums=(0, 1))
    return jax.jit(forward, compiler_options=options), jax.jit(gradient, compiler_options=options)


def active_flops(case: Case) -> dict[str, int]:
    """FLOPs of the experts' matmuls on chosen assignments."""
    forward = 2 * (3 if case.activation == "swiglu" else 2) * case.tokens * case.k * case.d_model * case.d_ff
    return {"forward": forward, "both": 3 * forward}


def large_matmul(side: int, dtype: str) -> Callable[[], Any]:
    """One square matmul."""
    matrix = jnp.ones((side, side), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda: multiply(matrix, matrix)


def accelerator_seconds(case: Case, rate: float) -> dict[str, float]:
    """Seconds at the rate of large matmuls, or at the bandwidth of a copy where that takes longer; both are totals over
    the devices of the mesh, each of which runs the whole copy."""
    work = active_flops(case)["forward"]
    weights = (3 if case.activation == "swiglu" else 2) * case.experts * case.d_model * case.d_ff
    weights *= jnp.dtype(case.dtype).itemsize
    big = jnp.ones((1 << 28,), jnp.int8)
    copy = jax.jit(lambda a: a + 1)
    jax.block_until_ready(copy(big))
    start = time.perf_counter()
    jax.block_until_ready([copy(big) for _ in range(8)])
    bandwidth = 8 * 2 * big.size / (time.perf_counter() - start) * axis_size(*AXES)
    return {"forward": max(work / rate, weights / bandwidth), "both": max(3 * work / rate, 3 * weights / bandwidth)}
