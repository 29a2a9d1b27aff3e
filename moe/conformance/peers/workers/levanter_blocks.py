"""levanter's grug MoE layer, alone and with its experts spread over four of eight fake devices.

Its caller routes: choices and weights are computed here, by Mixtral's rule, and are not compared.
"""

from __future__ import annotations

import importlib.metadata
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from jax_blocks import Block, main

ALONE = """
import jax.numpy as jnp
from levanter.grug.grug_moe import moe_mlp, moe_routing_stats
def layer(weights, x, mask):
    rows, valid = x.reshape(-1, x.shape[-1]), jnp.asarray(mask).reshape(-1)
    logits = (rows @ weights["router"]).astype(jnp.float32)
    probs = jax.nn.softmax(logits)
    values, index = jax.lax.top_k(logits, K)
    chosen = jax.nn.softmax(values)
    both = jnp.concatenate([weights["gate"], weights["up"]], -1)
    y = moe_mlp(rows, index, chosen.astype(x.dtype), both, weights["down"], token_valid=valid)
    stats = moe_routing_stats(index, probs, logits, valid, num_experts=8, num_experts_per_token=K)
    return y.reshape(x.shape), {"balance_loss": stats["load_balancing_loss"] / K, "z_loss": stats["router_z_loss"]}
"""
SPREAD = """
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from levanter.grug.grug_moe import moe_mlp
mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2)
def layer(weights, x, mask):
    rows = x.reshape(-1, x.shape[-1])
    values, index = jax.lax.top_k((rows @ weights["router"]).astype(jnp.float32), K)
    chosen = jax.nn.softmax(values).astype(x.dtype)
    both = jnp.concatenate([weights["gate"], weights["up"]], -1)
    put = lambda a, spec: jax.sharding.reshard(a, NamedSharding(mesh, spec))
    tokens, experts = P(("data", "expert"), None), P("expert", None, None)
    arrays = [put(a, tokens) for a in (rows, index, chosen)] + [put(both, experts), put(weights["down"], experts)]
    y = moe_mlp(*arrays, implementation=IMPLEMENTATION, mesh=mesh, capacity_factor=8.0)
    return put(y, P(None, None)).reshape(x.shape), {}
"""
MIXTRAL = {"renormalise": True}
CALLER = {"precision": "its caller routes"}
ADAPTERS = {
    "moe_mlp": Block(text=ALONE, rule=MIXTRAL, skip=CALLER, has_balance=True, has_z=True),
    "moe_mlp, ring, 4 devices": Block(text='IMPLEMENTATION = "ring"\n' + SPREAD, rule=MIXTRAL, skip=CALLER),
    "moe_mlp, fixed_all_to_all, 4 devices": Block(
        text='IMPLEMENTATION = "fixed_all_to_all"\n' + SPREAD, rule=MIXTRAL, skip=CALLER
    ),
}

if __name__ == "__main__":
    main(f"levanter {importlib.metadata.version('marin-levanter')}", ADAPTERS)
