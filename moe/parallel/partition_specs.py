"""PartitionSpecs of activations, and those that several parameters have in common."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.parallel.axes import AXES as AXES
from moe.parallel.axes import ROW_AXES as ROW_AXES
from moe.parallel.axes import TOKEN_AXES as TOKEN_AXES
from moe.parallel.axes import on_mesh

# Activations.
ROWS = P(ROW_AXES)  # [B]
BATCH = P(ROW_AXES, "context")  # [B,T,...]
GROUPS = P(TOKEN_AXES)  # [G,...]
MICROBATCHES = P(None, ROW_AXES, "context")  # [A,B/A,T]
HEADS = P(ROW_AXES, "context", "tensor")  # [B,T,N,H]
CACHE = P(None, ROW_AXES, None, "tensor")  # [R,B,W,M,H]
SINKS = P("tensor")  # [N]
CACHE_OF_ONE_HEAD = P(None, ROW_AXES)  # [R,B,W,1,H]
TABLE = P("tensor", None)  # [V,D] during the embedding lookup
LOGITS = P(ROW_AXES, "context", "tensor")  # [B,T,V]
CHUNK_LOGITS = P(TOKEN_AXES, None, "tensor")  # [G,P,V]
PARTIAL_LOGITS_MATRIX = P(TOKEN_AXES, None, "tensor")  # [X,D,V], gradient summed over each of X shards of the tokens
GROUPED_SLOTS = P(None, TOKEN_AXES)  # [E,G,C,D] before dispatch, sharded as tokens
EXPERT_SLOTS = P("expert", ("data", "fsdp", "context"))  # [E,G,C,D] after dispatch, sharded as experts

# Parameters; those of one module alone stand where it makes them.
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


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Convert a tree of PartitionSpecs to NamedShardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, on_mesh(spec, mesh.axis_names)),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, P),
    )
