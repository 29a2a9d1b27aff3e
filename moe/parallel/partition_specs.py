"""PartitionSpecs of activations and of alike parameters, and names of activations for rematerialisation."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.parallel.mesh import ROW_AXES, TOKEN_AXES, on_mesh
from moe.routing.interface import ROUTES

# Activations.
BATCH = P(ROW_AXES, "context")  # [B,T,...]
GROUPS = P(TOKEN_AXES)  # [G,...]
MICROBATCHES = P(None, ROW_AXES, "context")  # [A,B/A,T]
PIPELINED = P(None, "pipeline", ("data", "fsdp", "expert"), "context")  # [A/S,S,B/A,T]
HEADS = P(ROW_AXES, "context", "tensor")  # [B,T,N,H]
CACHE = P(None, ROW_AXES, None, "tensor")  # [R,B,W,M,H]
SINKS = P("tensor")  # [N]
CACHE_OF_ONE_HEAD = P(None, ROW_AXES)  # [R,B,W,1,H]
TABLE = P("tensor", None)  # [V,D] during the embedding lookup
LOGITS = P(ROW_AXES, "context", "tensor")  # [B,T,V]
CHUNK_LOGITS = P(TOKEN_AXES, None, "tensor")  # [G,P,V]
PARTIAL_LOGITS_MATRIX = P(TOKEN_AXES, None, "tensor")  # [X,D,V], gradient summed over each of X shards of the tokens
GROUPED_SLOTS = P(None, TOKEN_AXES)  # [E,G,C,D] before dispatch, sharded as tokens
EXPERT_SLOTS = P("expert", ("pipeline", "data", "fsdp", "context"))  # [E,G,C,D] after dispatch, sharded as experts

# Parameters; specs that only one module uses are defined there.
REPLICATED = P()
#: Axes over which D of a weight that all tokens use is stored: all row axes except data.
STORED = ("fsdp", "expert")
HEADS_IN = P(STORED, "tensor", None)  # [D,N,H]
HEADS_OUT = P("tensor", None, STORED)  # [N,H,D]
IN = P(STORED, "tensor")  # [D,F]
OUT = P("tensor", STORED)  # [F,D]
EXPERTS_IN = P("expert", "fsdp", "tensor")  # [E,D,F]
EXPERTS_OUT = P("expert", "tensor", "fsdp")  # [E,F,D]
EXPERT_BIASES = P("expert", "tensor")  # [E,F]


def shard_bytes(tree: Any, *, host: bool = False) -> int:
    """Bytes of one device's shards of a tree of ShapeDtypeStructs with shardings; ``host``: including those in host
    memory."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if host or leaf.sharding.memory_kind != "pinned_host"
    )


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Convert a tree of PartitionSpecs to NamedShardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, on_mesh(spec, mesh.axis_names)),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, P),
    )


#: Names of ``jax.ad_checkpoint.checkpoint_name``, as ``ROUTES``: queries, keys, values and outputs of
#: attention's heads; the experts' outputs where the backward pass reads them, on the devices of their tokens; results
#: of the first matmuls of FFNs and experts, the largest of a layer; inputs of layers.
ATTENTION = "attention"
EXPERT_OUTPUTS = "expert_outputs"
HIDDEN = "hidden"
LAYER_INPUT = "layer_input"
#: Name of what a router multiplies by its matrix, read by :mod:`moe.conformance.divergence`.
ROUTER_INPUT = "router_input"

#: Name of the inputs of a repeat's layers except the first, whose input is kept anyway; without them the backward pass
#: would recompute the layers before them as a whole.
INNER_INPUT = "inner_input"

_keep_only = jax.checkpoint_policies.save_only_these_names


def _in_host_memory(*names: str) -> Any:
    """Policy that keeps where tokens go on the device, and these activations in host memory."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[ROUTES],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


#: Checkpoint policies: what the backward pass recomputes. "none": nothing; "full": the layer; "dots": all but matmuls
#: without a batch axis. The others, in this order, each keep more than the one before: "routes" where tokens go, a few
#: integers for each, so that gradients travel to the experts while attention is recomputed; "attention" also the heads,
#: so that neither they nor their projections are recomputed; "outputs" also what experts return, where it is read
#: (their last matmul and exchange); "hidden" also hidden activations, so that only cheap work is left to recompute.
#: "offload" keeps what "attention" does, and the layers' inputs, in host memory, for two transfers; "offload_inputs"
#: the inputs alone, and recomputes what "routes" does: the least device memory, for a transfer of one array a layer.
REMAT_POLICIES: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "hidden": _keep_only(ROUTES, INNER_INPUT, ATTENTION, EXPERT_OUTPUTS, HIDDEN),
    "outputs": _keep_only(ROUTES, INNER_INPUT, ATTENTION, EXPERT_OUTPUTS),
    "attention": _keep_only(ROUTES, INNER_INPUT, ATTENTION),
    "offload": _in_host_memory(ATTENTION, LAYER_INPUT),
    "offload_inputs": _in_host_memory(LAYER_INPUT),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "routes": _keep_only(ROUTES, INNER_INPUT),
    "full": jax.checkpoint_policies.nothing_saveable,
}

#: Policies that keep hidden activations, and those that keep outputs of experts on other devices.
KEEP_HIDDEN = "none", "hidden"
KEEP_OUTPUTS = *KEEP_HIDDEN, "outputs"
