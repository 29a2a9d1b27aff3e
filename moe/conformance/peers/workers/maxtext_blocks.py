"""MaxText's RoutedMoE on one device, and with its experts or their matrices over four of eight fake devices.

The rule is a softmax over the K highest. The block ``envy-switch-base`` has the K = 1 of the shipped config of that
name and claims Switch's rule, by which a token's weight is its expert's probability.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from jax_blocks import Block, main

TEXT = """
from flax import nnx, traverse_util
from flax.linen import partitioning
from maxtext.configs import pyconfig
from maxtext.layers import moe
config = pyconfig.initialize(["", pyconfig.__file__.replace("pyconfig.py", "base.yml"), *given["settings"]])
axes = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]).reshape(SIZES), config.mesh_axes)
init = moe.nd_dense_init(1.0, "fan_in", "truncated_normal")
def layer(weights, x, mask=None):
    block = moe.RoutedMoE(config, 8, K, axes, init, ("embed", None), nnx.Rngs(0), 24)
    nnx.update(block, traverse_util.unflatten_dict(weights, sep="."))
    with axes, partitioning.axis_rules(config.logical_axis_rules):
        return block(x)[0], dict(zip(("combine_weights", "expert_index"), block.get_topk(*block.gate(x))))
"""
SETTINGS: dict[str, Any] = {"num_experts": 8, "base_emb_dim": 16, "base_mlp_dim": 24, "base_moe_mlp_dim": 24}
SETTINGS |= {"capacity_factor": -1.0, "decoder_block": "mixtral", "max_target_length": 16}
SETTINGS |= {"dtype": "float32", "weight_dtype": "float32", "matmul_precision": "highest"}
SETTINGS |= {"enable_checkpointing": False, "skip_jax_distributed_system": True}
SKIP = {
    "precision": "the dtype is a setting of its config",
    "balance": "its loss is the mean of those of each sequence",
}
PARAMETERS = {"gate.kernel": "router", "wi_0": "gate", "wi_1": "up", "wo": "down"}
DENSE = {"sparse_matmul": False, "megablox": False}
RAGGED = {"sparse_matmul": True, "megablox": False}
RING = {"sparse_matmul": True, "megablox": True, "use_ring_of_experts": True}


def routed(more: dict[str, Any], devices: int = 1, axis: str = "expert", **claims: Any) -> Block:
    """RoutedMoE with settings of its products, on devices of an axis."""
    settings = SETTINGS | more
    if devices > 1:
        settings |= {f"ici_{axis}_parallelism": devices, "per_device_batch_size": 4 / devices}
    named = [f"{name}={value}" for name, value in settings.items()]
    sizes = f"[{devices} if name == '{axis}' else 1 for name in config.mesh_axes]"
    text = TEXT.replace("SIZES", sizes if devices > 1 else "[1] * len(config.mesh_axes)")
    text = text.replace("DEVICES", str(devices))
    return Block(
        text=text, settings=['num_experts_per_tok="K"', *named], parameters=PARAMETERS, **{"skip": SKIP} | claims
    )


UNEVEN = SKIP | {"parts": "two of its rows do not divide over four devices"}
MIXTRAL = {"rule": {"renormalise": True}}
ADAPTERS = {
    "RoutedMoE": routed(DENSE, **MIXTRAL),
    "RoutedMoE, ragged_dot": routed(RAGGED, **MIXTRAL),
    "RoutedMoE, experts over 4 devices": routed(DENSE, 4, **MIXTRAL),
    "RoutedMoE, ring of experts, 4 devices": routed(RING, 4, skip=UNEVEN, **MIXTRAL),
    "RoutedMoE, tensor parallel, 4 devices": routed(DENSE, 4, "tensor", **MIXTRAL),
    "RoutedMoE, ragged_dot, tensor parallel, 4 devices": routed(RAGGED, 4, "tensor", **MIXTRAL),
    "RoutedMoE, envy-switch-base": routed(DENSE, k=1),
    "RoutedMoE, gemma4's decoder, K = 1": routed(DENSE | {"decoder_block": "gemma4"}, k=1),
}

if __name__ == "__main__":
    main(f"MaxText {importlib.metadata.version('maxtext')}", ADAPTERS)
