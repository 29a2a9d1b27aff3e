"""What a device must hold: a lower bound before anything is compiled, and the compiler's refusal in plain words.

In: a config and the sizes of a mesh, or the compiler's error. Out: bytes a device, or a :class:`ConfigError` that says
by how much a program does not fit and which settings help. No devices are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from moe.config import Config, ConfigError, ModelConfig, OptimizerConfig, sparse_layers
from moe.dispatch import ragged_exchange
from moe.layers.ffn import GATED_ACTIVATIONS
from moe.models import flops
from moe.models.stack import segments
from moe.parallel import partition_specs
from moe.planner.chips import GiB
from moe.routing.registry import GATES
from moe.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least that a device holds at the end of a backward pass, in bytes.

    Attributes:
        parameters: as stored.
        optimizer: Optax state.
        gradients: all of them at once, since their norm is needed before any is used; in the compute dtype.
        activations: what the remat policy keeps of the forward pass, only arrays that are certain to be kept.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """Together."""
        return self.parameters + self.optimizer + self.gradients + self.activations


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def lower_bound(config: Config, sizes: Mapping[str, int]) -> Bound:
    """What a device holds at least. Tiling, gathered weights and the compiler's own temporaries come on top.

    Args:
        config: valid for the mesh (:func:`moe.config.checks.validate_mesh`).
        sizes: devices per axis.
    """
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    parameters, optimizer = _shapes(same_parameters(config.model), config.optimizer)
    with jax.sharding.use_abstract_mesh(mesh):
        stored = shard_bytes(_placed(mesh, parameters))
        return Bound(
            stored,
            shard_bytes(_placed(mesh, optimizer)),
            stored * jnp.dtype(config.model.dtype).itemsize // 4,
            _kept_activations(config, sizes),
        )


def same_parameters(model: ModelConfig) -> ModelConfig:
    """One model for all that differ only in how they are computed."""
    return dataclasses.replace(model, remat="none", moe=dataclasses.replace(model.moe, dispatch="gather"))


@functools.lru_cache
def _shapes(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[Any, Any]:
    """ShapeDtypeStructs of the parameters and of the optimizer's state."""
    parameters = flops.abstract_parameters(model)
    return parameters, jax.eval_shape(make_optimizer(optimizer, optimizer.warmup_steps + 1).init, parameters)


def _placed(mesh: AbstractMesh, tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        tree,
        partition_specs.parameter_specs(tree),
    )


def _kept_activations(config: Config, sizes: Mapping[str, int]) -> int:
    """Each repeat's input always; with "dots" the outputs of plain matmuls, with "none" those of the experts too; and
    one layer's experts in any case, while their gradients are computed."""
    model, moe = config.model, config.model.moe
    rows = config.train.batch_size // config.train.accumulation_steps
    tokens = rows * config.data.sequence_length // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    matmuls_into = 2 if model.activation in GATED_ACTIVATIONS else 1
    projections = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim / sizes["tensor"]
    dense = matmuls_into * model.d_ff / sizes["tensor"]
    experts = _expert_rows(config, sizes) * matmuls_into * moe.d_ff / sizes["tensor"]
    width = 0.0  # numbers per token, on one device
    for unit, repeats in segments(model):
        kept = float(model.d_model)
        if model.remat != "full":
            kept += sum(projections + (0 if kind.sparse else dense) for kind in unit)
        if model.remat == "none":
            kept += sum(experts for kind in unit if kind.sparse)
        width += repeats * kept
    if model.remat != "none" and any(sparse_layers(model)):
        width += experts
    return int(tokens * width * jnp.dtype(model.dtype).itemsize)


def _expert_rows(config: Config, sizes: Mapping[str, int]) -> float:
    """Rows of expert buffers for each token of a device, as the shapes say, filled or not."""
    moe = config.model.moe
    if moe.gate == "none" or GATES[moe.gate].router == "slots":
        return 0.0
    if moe.dispatch == "dropless":
        return moe.experts_per_token * (ragged_exchange.ROUND_SIZE if sizes["expert"] > 1 else 1.0)
    return min(moe.capacity_factor * moe.experts_per_token, moe.num_experts)


def refuse_state_that_does_not_fit(config: Config, state: int, capacity: int) -> None:
    """Before minutes of compiling: what is stored alone must fit.

    Args:
        config: of the run.
        state: bytes of parameters and optimizer on a device.
        capacity: bytes of the device.

    Raises:
        ConfigError: by how much it does not.
    """
    if state > capacity:
        raise ConfigError(
            f"does not fit: parameters and optimizer alone take {state / GiB:.1f} GiB a device, "
            f"{(state - capacity) / GiB:.1f} GiB more than its {capacity / GiB:.0f} GiB; use more chips, or split "
            f"them further (mesh.fsdp={config.mesh.fsdp}, mesh.expert={config.mesh.expert}, "
            f"mesh.tensor={config.mesh.tensor})"
        )


#: What libtpu says when a device's memory is too small, by age; groups are what is needed and what there is. Sizes are
#: numbers with B, K, M, G or T, powers of 1024.
_SIZE = r"([\d.]+[BKMGT]?)"


_MESSAGES = (
    (rf"total memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", "temporaries alone"),
    (rf"memory space hbm\.?\s+Used {_SIZE} of {_SIZE} hbm", "the program"),
    (
        rf"TensorCore Hbm usage: {_SIZE}, SparseCore Hbm usage:? {_SIZE}, exceeding available bytes: {_SIZE}",
        "TensorCore and SparseCore together",
    ),
    (rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", "the program"),
)


def explained(config: Config, error: Exception) -> Exception:
    """The compiler's error about a device's memory as a :class:`ConfigError` with a lever; any other error as it is."""
    text = str(error)
    # Its other memories run out too (vmem, smem); no setting of a run helps there.
    if "RESOURCE_EXHAUSTED" not in text or re.search(r"memory space (?!hbm)\w+", text):
        return error
    figures = "the compiled program exceeds a device's memory"
    for pattern, what in _MESSAGES:
        found = re.search(pattern, text)
        if found:
            *needed, available = (_gib(size) for size in found.groups())
            over = sum(needed) - available
            amount = f"{over:.2f} GiB" if over >= 0.01 else f"{over * 1024:.1f} MiB"
            figures = f"{what}: {sum(needed):.2f} GiB a device of {available:.2f}, {amount} too much"
            break
    return ConfigError(f"does not fit: {figures}; what helps, most first: {'; '.join(_levers(config))}")


def _gib(size: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([BKMGT]?)", size).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(number.rstrip(".")) * 1024.0 ** ("BKMGT".index(unit or "B")) / GiB


def _levers(config: Config) -> list[str]:
    model, train = config.model, config.train
    levers = []
    if model.remat != "full":
        levers.append(f"model.remat=full (now {model.remat})")
    if model.attention != "blocked" and config.data.sequence_length > 1024:
        levers.append(f"model.attention=blocked (now {model.attention}), which never holds T x T")
    if model.moe.gate != "none" and model.moe.dispatch == "einsum":
        levers.append("model.moe.dispatch=gather, which makes no one-hot tensors")
    levers.append(f"train.accumulation_steps above {train.accumulation_steps}, or a smaller train.batch_size")
    if model.dtype == "float32":
        levers.append("model.dtype=bfloat16 (now float32)")
    levers.append("more chips, or a larger mesh.fsdp")
    return levers
