"""EasyDeL's MoE blocks, on one device."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from jax_blocks import Block, main

TEXT = """
import importlib
import jax
import jax.numpy as jnp
from flax import nnx
from easydel.infra.loss_utils import auxiliary_load_balancing_loss_func as balance_loss
package = importlib.import_module("easydel.modules." + MODEL)
config = getattr(package, NAME + "Config")(hidden_size=16, num_experts_per_tok=K, **SETTINGS)
modeling = importlib.import_module(f"easydel.modules.{MODEL}.modeling_{FILE}")
built = getattr(modeling, BLOCK)(config, *ARGUMENTS, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
graph, state = nnx.split(built)
def layer(weights, x, mask):
    block = nnx.merge(graph, jax.tree.map(lambda array: array, state))
    block.gate.kernel.value = weights["router"]
    for name, source in zip(EXPERTS, ("gate", "up", "down")):
        getattr(block.experts, name).kernel.value = weights[source]
    if "bias" in weights:
        block.gate.e_score_correction_bias.value = weights["bias"]
    if hasattr(block, SHARED):
        getattr(block, SHARED).down_proj.kernel.value *= 0
    with config.mesh:
        y, logits = block(x)
    return y, {"balance_loss": balance_loss(logits, 8, K, jnp.asarray(mask)) / K} if BALANCE else {}
"""
NAMES = ("gate_proj", "up_proj", "down_proj")
V3 = {"score": "sigmoid", "renormalise": True, "scale": 2.5, "groups": 4, "kept_groups": 3, "scores_per_group": 2}
GROUPED = {"n_routed_experts": 8, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 3}
SOFTMAX = {"precision": "choices are not recorded"}
NORMALISED = SOFTMAX | {"one": "of a single expert it keeps the probability, as a comment in moe_call says"}


def easydel(
    model: str,
    name: str,
    block: str,
    settings: dict[str, Any],
    *,
    file: str = "",
    experts: tuple[str, ...] = NAMES,
    shared: str = "shared_experts",
    arguments: tuple[int, ...] = (),
    **claims: Any,
) -> Block:
    """A block of easydel.modules on a mesh of one device."""
    chosen = {"MODEL": model, "NAME": name, "FILE": file or model, "BLOCK": block, "EXPERTS": experts, "SHARED": shared}
    chosen |= {"SETTINGS": settings | {"sharding_axis_dims": (1, 1, 1, 1, 1)}, "ARGUMENTS": arguments}
    chosen |= {"BALANCE": claims.get("has_balance", False)}
    return Block(text="\n".join(f"{key} = {value!r}" for key, value in chosen.items()) + TEXT, **claims)


WIDTHS = {"num_experts": 8, "moe_intermediate_size": 24}
MIXTRAL: dict[str, Any] = {
    "settings": {"intermediate_size": 24, "num_local_experts": 8},
    "experts": ("w1", "w3", "w2"),
    "rule": {"renormalise": True},
}
QWEN = ("qwen3_moe", "Qwen3Moe", "Qwen3MoeSparseBlock")
ADAPTERS = {
    "mixtral": easydel(*("mixtral", "Mixtral", "MixtralSparseMoeBlock"), **MIXTRAL, skip=NORMALISED, has_balance=True),
    "qwen3_moe": easydel(*QWEN, WIDTHS, skip=SOFTMAX, has_balance=True),
    "qwen3_moe, normalised": easydel(
        *QWEN, WIDTHS | {"norm_topk_prob": True}, rule={"renormalise": True}, skip=NORMALISED, has_balance=True
    ),
    "qwen3_moe, standard_moe": easydel(*QWEN, WIDTHS | {"moe_method": "standard_moe"}, skip=SOFTMAX),
    "qwen3_moe, dense_moe": easydel(*QWEN, WIDTHS | {"moe_method": "dense_moe"}, skip=SOFTMAX),
    "qwen2_moe": easydel(
        *("qwen2_moe", "Qwen2Moe", "Qwen2MoeSparseBlock"), WIDTHS, shared="shared_expert", skip=SOFTMAX
    ),
    "glm4_moe": easydel(
        *("glm4_moe", "Glm4Moe", "Glm4MoeMoE"),
        {"moe_intermediate_size": 24} | GROUPED,
        rule=V3,
        bias=True,
        skip=SOFTMAX,
    ),
    "deepseek_v3": easydel(
        *("deepseek_v3", "DeepseekV3", "DeepseekV3MoE"),
        {"moe_intermediate_size": 24, "n_shared_experts": None} | GROUPED,
        file="deepseek",
        arguments=(0,),
        rule=V3,
        bias=True,
        skip=SOFTMAX,
    ),
}

if __name__ == "__main__":
    main(f"EasyDeL {importlib.metadata.version('easydel')}", ADAPTERS)
