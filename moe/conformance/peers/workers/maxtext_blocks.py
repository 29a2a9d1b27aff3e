"""MaxText's RoutedMoE on one device, by its dense products of all experts, with a softmax over the K highest logits.

The block ``envy-switch-base`` has the K = 1 of the shipped config of that name and claims Switch's rule, by which a
token's weight is its expert's probability.
"""

from __future__ import annotations

import importlib.metadata

from jax_blocks import Block, main

TEXT = """
import os
import jax
import maxtext
import numpy as np
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.layers import moe
from maxtext.layers.initializers import nd_dense_init
settings = {"num_experts": 8, "num_experts_per_tok": K, "base_emb_dim": 16, "base_mlp_dim": 24, "base_moe_mlp_dim": 24}
settings |= {"sparse_matmul": False, "megablox": False, "capacity_factor": -1.0, "decoder_block": "mixtral"}
settings |= {"dtype": "float32", "weight_dtype": "float32", "matmul_precision": "highest"}
settings |= {"enable_checkpointing": False, "skip_jax_distributed_system": True}
config = pyconfig.initialize(["", os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")], **settings)
devices = np.array(jax.devices()[:1]).reshape((1,) * len(config.mesh_axes))
axes = jax.sharding.Mesh(devices, config.mesh_axes)
init = nd_dense_init(1.0, "fan_in", "truncated_normal")
graph, state = nnx.split(moe.RoutedMoE(config, 8, K, axes, init, ("embed", None), nnx.Rngs(0), 24))
pure = nnx.to_pure_dict(state)
def layer(weights, x, mask):
    own = {"gate": {"kernel": weights["router"]}, "wi_0": weights["gate"], "wi_1": weights["up"], "wo": weights["down"]}
    filled = jax.tree.map(lambda array: array, state)
    nnx.replace_by_pure_dict(filled, pure | own)
    module = nnx.merge(graph, filled)
    with axes:
        y, (chosen, index) = module(x)[0], module.get_topk(*module.gate(x))
    return y, {"expert_index": index, "combine_weights": chosen}
"""
SKIP = {
    "precision": "the dtype is a setting of its config",
    "balance": "its loss is the mean of those of each sequence",
}
ADAPTERS = {
    "RoutedMoE": Block(text=TEXT, rule={"renormalise": True}, skip=SKIP),
    "RoutedMoE, envy-switch-base": Block(text=TEXT, k=1, skip=SKIP),
}

if __name__ == "__main__":
    main(f"MaxText {importlib.metadata.version('maxtext')}", ADAPTERS)
