"""Lower bound of a device's memory, from a config and the sizes of a mesh; nothing is compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from moe.config import Config, LayerKind, ModelConfig, OptimizerConfig, sparse_layers, stacks
from moe.dispatch.exchange import ROUND_SIZE
from moe.dispatch.ffn import GATED_ACTIVATIONS
from moe.models.factory import abstract_parameters
from moe.models.stack import segments
from moe.parallel.parameters import optimizer_specs, parameter_specs
from moe.training.optimizer import make_optimizer

#: Remat policies to try until a program fits, from the least recomputation to the most.
LADDER = ("hidden", "outputs", "attention", "offload", "full")


@dataclasses.dataclass(frozen=True)
class Bound:
    """Bytes that a device holds at least at the end of a backward pass.

    Attributes:
        parameters: as stored.
        optimizer: Optax state.
        gradients: of all parameters, because their norm is needed before any is used; in the compute dtype.
        activations: arrays that the remat policy certainly keeps of the forward pass.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return self.parameters + self.optimizer + self.gradients + self.activations


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def lower_bound(config: Config, sizes: Mapping[str, int]) -> Bound:
    """Compute the bound; tiling, gathered weights and the compiler's own temporaries come on top.

    Args:
        config: valid for the mesh (:func:`moe.config.validate_mesh`).
        sizes: devices per axis.
    """
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    parameters, optimizer = _shapes(same_parameters(config.model), config.optimizer)
    with jax.sharding.use_abstract_mesh(mesh):
        specs = parameter_specs(parameters)
        shapes = nnx.to_pure_dict(parameters)
        stored = shard_bytes(_placed(mesh, shapes, specs))
        return Bound(
            stored,
            shard_bytes(_placed(mesh, optimizer, optimizer_specs(shapes, specs, optimizer))),
            stored * jnp.dtype(config.model.dtype).itemsize // 4,
            _kept_activations(config, sizes),
        )


def same_parameters(model: ModelConfig) -> ModelConfig:
    """Map models that differ only in how they are computed to one, as a cache key."""
    return dataclasses.replace(model, remat="none", moe=dataclasses.replace(model.moe, dispatch="gather"))


@functools.lru_cache
def _shapes(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[Any, Any]:
    """The parameters and the optimizer's state with ShapeDtypeStructs as values."""
    parameters = abstract_parameters(model)
    init = make_optimizer(optimizer, optimizer.warmup_steps + 1).init
    return parameters, jax.eval_shape(init, nnx.to_pure_dict(parameters))


def _placed(mesh: AbstractMesh, tree: Any, specs: Any) -> Any:
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        tree,
        specs,
    )


def _kept_activations(config: Config, sizes: Mapping[str, int]) -> int:
    """Bytes of kept activations: those of every repeat, and one layer's experts in any case, while their gradients are
    computed."""
    model, moe = config.model, config.model.moe
    train, stages = config.train, sizes.get("pipeline", 1)
    rows = train.batch_size // train.accumulation_steps // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    if stages > 1:  # every stage keeps its layers' activations of all microbatches
        rows *= train.accumulation_steps // stages
    matmuls_into = 2 if model.activation in GATED_ACTIVATIONS else 1
    # Numbers per token on one device: projections of attention and its heads, hidden activations, experts' outputs.
    dense = matmuls_into * model.d_ff / sizes["tensor"]
    experts = _expert_rows(config, sizes) * matmuls_into * moe.d_ff / sizes["tensor"]
    outputs = _expert_rows(config, {**sizes, "expert": 1}) * model.expert_dim
    keeps_projections, keeps_heads, of_dense, of_experts = {
        "none": (1, 0, dense, experts),
        "hidden": (1, 1, dense, experts + outputs),
        "outputs": (1, 1, 0.0, outputs),
        "attention": (1, 1, 0.0, 0.0),
        "offload": (0, 0, 0.0, 0.0),
        "dots": (1, 0, dense, 0.0),
        "full": (0, 0, 0.0, 0.0),
    }[model.remat]
    numbers = 0.0  # kept per row on one device
    for name, kinds in stacks(model).items():
        length = config.data.input_length if name == "encoder" else config.data.sequence_length
        for unit, repeats in segments(kinds):
            kept = 0.0 if model.remat == "offload" else float(model.d_model)
            for kind in unit:
                projections, heads = _projections(model, kind, sizes["tensor"])
                of_mixer = keeps_projections * projections + keeps_heads * heads
                kept += of_mixer * (1 + (kind.role == "cross")) + (of_experts if kind.sparse else of_dense)
            numbers += repeats * kept * length
    if model.remat not in ("none", "hidden") and any(sparse_layers(model)):
        numbers += experts * config.data.sequence_length
    return int(rows * numbers * jnp.dtype(model.dtype).itemsize)


def _projections(model: ModelConfig, kind: LayerKind, tensor: int) -> tuple[float, float]:
    """Numbers per token on one device: what the matmuls before the scores put out, and the heads."""
    if kind.mixer == "gated_delta_net":
        d = model.delta_net
        values = d.value_heads * d.value_dim
        return 2 * (d.key_heads * d.key_dim + values) / tensor, values / tensor
    heads = model.num_heads * (model.value_dim or model.head_dim) / tensor
    if not model.kv_lora_rank:
        queries = model.num_heads * (1 + model.gated_attention)
        return (queries + 2 * model.num_kv_heads) * model.head_dim / tensor, heads
    # Queries, and what keys and values are expanded to; the latents are whole on every device.
    dims = model.head_dim + (model.head_dim - model.rope_dim + model.value_dim)
    return model.num_heads * dims / tensor + model.q_lora_rank + model.kv_lora_rank + model.rope_dim, heads


def _expert_rows(config: Config, sizes: Mapping[str, int]) -> float:
    """Rows of expert buffers per token of a device, filled or not."""
    moe = config.model.moe
    if moe.gate is None or moe.gate.router == "slots":
        return 0.0
    if moe.dispatch == "dropless":
        return moe.experts_per_token * (ROUND_SIZE if sizes["expert"] > 1 else 1.0)
    return min(moe.capacity.train * moe.experts_per_token, moe.num_experts)
