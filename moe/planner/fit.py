"""Estimate of a device's memory, from a config and the sizes of a mesh; nothing is compiled.

The estimate is for the moment at which the backward pass computes the gradients of a layer. It adds up parameters,
optimizer and gradients; the matrices in the compute dtype, with one layer's gathered; what the remat policy keeps of
every layer's forward pass; and the arrays of that one layer, counted in arrays of the size of its hidden activations
and of its inputs (:data:`_ARRAYS`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import Config, LayerKind, LoraConfig, ModelConfig, OptimizerConfig, stacks
from moe.dispatch.backends import gpu
from moe.dispatch.exchange import ROUND_SIZE
from moe.dispatch.ffn import GATED_ACTIVATIONS, ExpertWeights
from moe.layers.residuals.table import residual_kind
from moe.models import flops
from moe.models.adapters import LORA_B
from moe.models.factory import abstract_parameters, abstract_trained
from moe.models.segments import segments
from moe.models.stages import Schedule, pipelined_segment
from moe.parallel.parameters import flat_variables, optimizer_specs, parameter_specs
from moe.parallel.partition_specs import KEEP_HIDDEN, shard_bytes
from moe.training.optimizer import in_steps, make_optimizer

#: Remat policies to try until a program fits, from the least recomputation to the most.
LADDER = ("hidden", "outputs", "attention", "offload", "full")

#: A program is ruled out if its estimate exceeds the memory by this factor; estimates of compiled programs were at most
#: 1.09 times what the programs needed.
MARGIN = 1.2


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Number of arrays of each kind in memory while a layer's gradients are computed.

    Attributes:
        hidden: [rows,F] of experts or a dense FFN: up, gate, their product, and the gradients of the three.
        in_blocks: the same for experts computed in row blocks, whose hidden activations never exist as a whole.
        rows: [rows,D] of experts on the device of their tokens, or of a dense FFN.
        exchanged: [rows,D] of experts on other devices.
        tokens: [tokens,D], and queries, keys, values and heads of attention.
        gathered: a layer's matrices in the compute dtype, gathered.
        cast: the matrices of all layers in the compute dtype, as they are stored.
        lanes: the last dimension of an array is padded to a multiple of it.
    """

    hidden: float
    in_blocks: float
    rows: float
    exchanged: float
    tokens: float
    gathered: float
    cast: float
    lanes: int


#: By platform, fitted to compiled programs (docs/log/2026-11.md). The same arrays are alive at the peak on TPUs and on
#: GPUs; the compiler for TPUs allocates more, as if the arrays of a layer's forward pass had memory of their own.
_ARRAYS = {"gpu": _Arrays(6, 2, 3, 3, 2, 1, 1, 1), "tpu": _Arrays(9, 9, 7, 20, 2, 3, 2, 128)}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of a device.

    Attributes:
        parameters: as stored.
        optimizer: Optax state.
        gradients: of all parameters, because their norm is needed before any is used; with accumulation also their sum.
            Also, gathered, the layers that belong to no stage of a pipeline.
        weights: matrices in the compute dtype: those of all layers as they are stored, those of one layer gathered.
        kept: arrays that the remat policy keeps of the forward pass.
        layer: arrays of one layer while its gradients are computed.
    """

    parameters: int
    optimizer: int
    gradients: int
    weights: int
    kept: int
    layer: int

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the rows."""
        return self.parameters + self.optimizer + self.gradients + self.weights

    @property
    def activations(self) -> int:
        """Bytes in proportion to the rows."""
        return self.kept + self.layer

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return self.fixed + self.activations


def estimate(config: Config, sizes: Mapping[str, int], platform: str) -> Estimate:
    """Estimate the memory of a train step.

    Args:
        config: valid for the mesh (:func:`moe.config.validate_mesh`).
        sizes: devices per axis.
        platform: "tpu" or "gpu".
    """
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    parameters, trained, optimizer = _shapes(same_parameters(config.model), config.lora, config.optimizer)
    with jax.sharding.use_abstract_mesh(mesh):
        specs = parameter_specs(parameters)
        shapes = nnx.to_pure_dict(parameters)
        stored = shard_bytes(_placed(mesh, shapes, specs))
        of_no_stage = _of_no_stage(config, mesh, shapes, specs)
        of_trained = nnx.to_pure_dict(trained), parameter_specs(trained)
        gradients = shard_bytes(_placed(mesh, *of_trained))
        if config.lora.rank:  # and a merged copy of the adapted matrices, with its gradient
            gradients += 2 * _adapted_bytes(mesh, shapes, specs, trained)
        placed = _placed(mesh, optimizer, optimizer_specs(*of_trained, optimizer))
        state = 0 if config.optimizer.memory == "host" else shard_bytes(placed)
    train, stages, size = config.train, sizes.get("pipeline", 1), jnp.dtype(config.model.dtype).itemsize
    rows = train.microbatch_rows // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    # Every pipeline stage keeps its layers' activations of all microbatches.
    kept_rows = rows * train.accumulation_steps // stages if stages > 1 else rows
    layers = _layers(config, sizes, _ARRAYS[platform], rows)
    cast = _ARRAYS[platform].cast * stored * size // 4 if size < 4 else 0
    return Estimate(
        stored,
        state,
        gradients * (2 if train.accumulation_steps > 1 and stages == 1 else 1) + 2 * of_no_stage,
        int(cast + size * layers.matrices),
        int(kept_rows * size * layers.kept),
        int(rows * size * layers.alive),
    )


def _of_no_stage(config: Config, mesh: AbstractMesh, shapes: Any, specs: Any) -> int:
    """Bytes, gathered, of stacked layers that belong to no stage of a pipeline; its stages store parts of them."""
    stages = mesh.shape.get("pipeline", 1)
    if stages == 1:
        return 0
    segment, pipelined, size = f"segment_{pipelined_segment(config.model)}", Schedule.of(config, stages).pipelined, 0.0
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, P)):
        if "pipeline" in spec[1:]:
            leaf = functools.reduce(lambda tree, key: tree[key.key], path, shapes)
            share = 1 - pipelined / leaf.shape[0] if path[0].key == segment else 1.0
            size += stages * share * shard_bytes(_placed(mesh, leaf, spec))
    return int(size)


def same_parameters(model: ModelConfig) -> ModelConfig:
    """Map models that differ only in how they are computed to the same value, as a cache key."""
    gate = model.moe.gate
    mode = "einsum" if gate is not None and gate.slots_per_expert else "gather"
    return dataclasses.replace(model, remat="none", moe=model.moe.with_dispatch(mode))


@functools.lru_cache
def _shapes(model: ModelConfig, lora: LoraConfig, optimizer: OptimizerConfig) -> tuple[Any, Any, Any]:
    """The parameters, those that are trained, and the optimizer's state with ShapeDtypeStructs as values."""
    trained = abstract_trained(model, lora)
    init = in_steps(optimizer, make_optimizer(optimizer, optimizer.warmup_steps + 1)).init
    return abstract_parameters(model), trained, jax.eval_shape(init, nnx.to_pure_dict(trained))


def _adapted_bytes(mesh: AbstractMesh, shapes: Any, specs: Any, adapters: nnx.State) -> int:
    """Bytes of one device's shards of the matrices that have adapters."""
    paths = [path[:-1] for path, _ in flat_variables(adapters) if path[-1] == LORA_B]
    found = [[functools.reduce(operator.getitem, path, tree) for path in paths] for tree in (shapes, specs)]
    return shard_bytes(_placed(mesh, *found))


def _placed(mesh: AbstractMesh, tree: Any, specs: Any) -> Any:
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        tree,
        specs,
    )


class _Numbers(NamedTuple):
    """Counts of array elements on one device.

    Attributes:
        matrices: weights, gathered over fsdp.
        kept: activations kept from the forward pass.
        alive: elements alive while gradients are computed.
    """

    matrices: float
    kept: float
    alive: float


def _layers(config: Config, sizes: Mapping[str, int], arrays: _Arrays, rows: int) -> _Numbers:
    """Elements of all layers, activations per row where a device has ``rows``; alive arrays are those of the largest
    repeat, gathered matrices those of one trip of the loop."""
    remat, gathered, kept, alive, kept_matrices = config.model.remat, 0.0, 0.0, 0.0, 0.0
    for name, kinds in stacks(config.model).items():
        length = config.data.input_length if name == "encoder" else config.data.sequence_length
        length //= sizes.get("context", 1)  # of a row, on one device
        stream = residual_kind(config.model).stream.size(config.model, kinds)
        for unit, repeats in segments(kinds):
            layers = [_layer(config, sizes, arrays, kind, rows * length) for kind in unit]
            kept_inputs = {"offload": 0, "offload_inputs": 0, "none": 1, "dots": 1, "full": 1}.get(remat, len(unit))
            inputs = float(kept_inputs * config.model.d_model * (stream + config.model.moe.shortcut))
            kept += repeats * length * (inputs + sum(layer.kept for layer in layers))
            alive = max(alive, length * sum(layer.alive for layer in layers))
            if sizes["fsdp"] > 1:
                matrices = sum(layer.matrices for layer in layers)
                gathered = max(gathered, arrays.gathered * matrices * min(config.model.scan_unroll, repeats))
                kept_matrices += repeats * matrices * (remat == "none")
    return _Numbers(gathered + kept_matrices, kept, alive)


def _layer(config: Config, sizes: Mapping[str, int], arrays: _Arrays, kind: LayerKind, tokens: int) -> _Numbers:
    """Elements of one layer without its input, activations per token where a device has ``tokens``."""
    model, moe, tensor = config.model, config.model.moe, sizes["tensor"]
    matmuls_into = 2 if model.activation in GATED_ACTIVATIONS else 1
    projections, heads = kind.mixer.activations(tensor, arrays.lanes)
    mixers = 1 + (kind.role == "cross")
    attention = mixers * (projections + heads)
    matrices = model.d_model * attention
    if kind.sparse:
        rows = _expert_rows(config, sizes)
        hidden = (rows * moe.d_ff + moe.shared_d_ff) / tensor
        rows_in = rows * model.expert_dim
        outputs = _expert_rows(config, {**sizes, "expert": 1}) * model.expert_dim
        if moe.dispatch == "dropless" and sizes["expert"] == 1:
            outputs = 0.0  # the backward pass does not read them
        experts = moe.num_experts / sizes["expert"] * model.expert_dim * moe.d_ff
        matrices += (matmuls_into + 1) * (experts + model.d_model * moe.shared_d_ff) / tensor
    else:
        hidden, rows_in, outputs = model.d_ff / tensor, float(model.d_model), 0.0
        matrices += (matmuls_into + 1) * model.d_model * hidden
    kept = {
        # Every array of the layer: those of experts, and norms, sums and products in float32.
        "none": attention + 3 * matmuls_into * hidden + 3 * rows_in + 16 * model.d_model,
        "hidden": attention + matmuls_into * hidden + outputs,
        "outputs": attention + outputs,
        "attention": attention,
        "offload": 0.0,
        "offload_inputs": 0.0,
        "dots": mixers * (projections + model.d_model) + (0.0 if kind.sparse else matmuls_into * hidden),
        "routes": 0.0,
        "full": 0.0,
    }[model.remat]
    exchanged = kind.sparse and sizes["expert"] > 1
    in_blocks = kind.sparse and _in_row_blocks(config, sizes, arrays, tokens)
    hidden *= arrays.in_blocks if in_blocks else arrays.hidden
    alive = hidden * (matmuls_into + 1) / 3 + arrays.tokens * (attention + model.d_model)
    if kind.memory is not None:  # vectors for the tokens of all devices that share its table
        alive += arrays.tokens * model.memory.joined_dim * sizes["fsdp"] * sizes["expert"]
    if exchanged and (hosts := moe.hosts(sizes["expert"])) > 1:
        rows_in += (hosts + min(hosts, moe.experts_per_token)) * model.expert_dim  # received, and sent
    if exchanged and moe.exchange == "all_gather":
        rows_in += 2 * sizes["expert"] * model.expert_dim  # received, and their sums
    return _Numbers(matrices, kept, alive + (arrays.exchanged if exchanged else arrays.rows) * rows_in)


def _in_row_blocks(config: Config, sizes: Mapping[str, int], arrays: _Arrays, tokens: int) -> bool:
    """Whether the experts' hidden activations are computed one block of rows at a time."""
    model, moe = config.model, config.model.moe
    if arrays is not _ARRAYS["gpu"] or moe.dispatch != "dropless" or model.low_precision != "none":
        return False
    struct: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    experts, hidden = moe.num_experts // sizes["expert"], moe.d_ff // sizes["tensor"]
    up, down = struct((experts, model.expert_dim, hidden)), struct((experts, hidden, model.expert_dim))
    gate = up if model.activation in GATED_ACTIVATIONS else None
    keeps_hidden = model.remat in KEEP_HIDDEN
    weights = ExpertWeights(up, gate, down, activation=model.activation, keeps_hidden=keeps_hidden)
    return gpu.large_blocks(int(tokens * _expert_rows(config, sizes)), weights) is not None


def _expert_rows(config: Config, sizes: Mapping[str, int]) -> float:
    """Rows of expert buffers per token of a device, filled or not."""
    moe = config.model.moe
    if moe.gate is None or moe.gate.slots_per_expert:
        return 0.0
    if moe.dispatch == "dropless":
        return moe.experts_per_token * (ROUND_SIZE if sizes["expert"] > 1 else 1.0)
    return flops.buffer_rows_per_token(config.model, config.data.sequence_length)
