"""This package's own layers on one device: a check that deviates is a false alarm of the judge, or a bug here.

Losses are compared where a paper's are those of the whole batch.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from typing import Any

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)

from jax_blocks import Block, main

TEXT = """
from moe.interop.layers import single_layer
settings = json.loads(str(given["settings"]))
def layer(weights, x, mask=None):
    names = {"gate": "gate_matrix", "bias": "selection_bias"}
    block = single_layer(**settings, **{names.get(name, name): array for name, array in weights.items()})
    y, report, routing = block(x, mask)
    losses = {"balance_loss": report.load_balancing_loss, "z_loss": report.router_z_loss}
    return y, {"expert_index": routing.expert_index, "combine_weights": routing.combine_weights, **losses}
"""
#: No expert's tokens exceed a capacity of this factor.
ALL = 8.0
REFUSED = "with one expert per token every weight would be 1: its config refuses K = 1"
SEQUENCES = "its loss is the mean of those of each sequence"
GROUPS = {"groups": 4, "kept_groups": 3}
ONE_GROUP = {"groups": 1, "kept_groups": 1}
SWITCH: tuple[dict[str, Any], dict[str, Any]] = {"name": "switch"}, {"has_balance": True, "has_z": True}
MIXTRAL: tuple[dict[str, Any], dict[str, Any]] = (
    {"name": "mixtral"},
    {
        "rule": {"renormalise": True},
        "skip": dict.fromkeys(("one", "precision"), REFUSED),
        "has_balance": True,
        "has_z": True,
    },
)
V3: tuple[dict[str, Any], dict[str, Any]] = (
    {"name": "deepseek_v3", "scores_per_group": 2, **GROUPS},
    {
        "rule": {"score": "sigmoid", "renormalise": True, "scale": 2.5, "scores_per_group": 2, **GROUPS},
        "bias": True,
        "skip": {"balance": SEQUENCES, **dict.fromkeys(("one", "precision"), REFUSED)},
        "has_z": True,
    },
)
#: Name → fields of the gate, and claims.
GATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "switch": (SWITCH[0], SWITCH[1] | {"k": 1}),
    "switch, K = 2": SWITCH,
    "mixtral": MIXTRAL,
    "mixtral, K = 3": (MIXTRAL[0], MIXTRAL[1] | {"k": 3}),
    "deepseek_moe": (
        {"name": "deepseek_moe", "scale": 1.5, **GROUPS},
        {"rule": {"scale": 1.5, **GROUPS}, "has_balance": True, "has_z": True},
    ),
    "deepseek_v3": V3,
    "deepseek_v3, one group, K = 3": (
        {"name": "deepseek_v3", "scores_per_group": 1, **ONE_GROUP},
        V3[1] | {"rule": {"score": "sigmoid", "renormalise": True, "scale": 2.5}, "k": 3},
    ),
    "deepseek_v4": (
        {"name": "deepseek_v4", "scores_per_group": 1, **ONE_GROUP},
        V3[1] | {"rule": {"score": "sqrt_softplus", "renormalise": True, "scale": 1.5}},
    ),
}
MODES = ("gather", "einsum", "dropless")


def own(name: str, mode: str, *, capacity: float = 0.0, activation: str = "swiglu", mesh: str = "") -> Block:
    """A layer; ``capacity``: its factor, 0 where nothing is dropped; ``mesh``: fields of MeshConfig."""
    gate, claims = GATES[name]
    fields: dict[str, Any] = {"gate": gate | {"k": "K"}, "dispatch": mode, "activation": activation}
    fields |= {} if mode == "dropless" else {"capacity": {"eval": capacity or ALL}}
    rule = claims.get("rule", {}) | {"activation": activation} | ({"capacity_factor": capacity} if capacity else {})
    text = TEXT
    if mesh:
        made = "from moe.config import MeshConfig\nfrom moe.parallel.mesh import make_mesh\n"
        count = math.prod(int(part.split("=")[1]) for part in mesh.split(", "))
        text = f"{made}mesh = make_mesh(MeshConfig({mesh}), jax.devices()[:{count}]){TEXT}"
    return Block(text=text, settings=json.dumps(fields), **claims | {"rule": rule})


ADAPTERS = {f"{name}, {mode}": own(name, mode) for name in GATES for mode in MODES}
ADAPTERS |= {
    f"{name}, {activation}, {mode}": own(name, mode, activation=activation)
    for name in ("switch, K = 2", "mixtral")
    for activation in ("geglu", "gelu", "relu")
    for mode in MODES
}
ADAPTERS |= {
    f"{name}, capacity factor 1, {mode}": own(name, mode, capacity=1.0)
    for name in ("switch", "switch, K = 2", "mixtral", "deepseek_moe", "deepseek_v3")
    for mode in ("gather", "einsum")
}

if __name__ == "__main__":
    main(f"moe-jax {importlib.metadata.version('moe-jax')}", ADAPTERS)
