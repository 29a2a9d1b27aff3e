"""EasyDeL's MoE blocks, on a mesh of one device unless another is named."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

from jax_blocks import Block, main

TEXT = """
from flax import nnx, traverse_util
from easydel.modules.{model} import {name}Config, modeling_{file}
config = {name}Config(**json.loads(str(given["settings"])))
def layer(weights, x, mask=None):
    block = modeling_{file}.{block}(config, {arguments}dtype=np.float32, param_dtype=np.float32, rngs=nnx.Rngs(0))
    nnx.update(block, traverse_util.unflatten_dict(weights, sep="."))
    with config.mesh:
        {result}
"""
LOSS = """y, logits = block(x)
        return y, {"balance_loss": balance_loss(logits, 8, K, jax.numpy.asarray(mask)) / K}"""
IMPORT = "from easydel.infra.loss_utils import auxiliary_load_balancing_loss_func as balance_loss"
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
    shared: str = "",
    arguments: str = "",
    axes: tuple[int, ...] = (1, 1, 1, 1, 1),
    **claims: Any,
) -> Block:
    """A block of easydel.modules; ``shared``: its shared expert's last matrix, which is 0; ``axes``: sizes of dp, fsdp,
    ep, tp and sp."""
    parameters = {"gate.kernel": "router"}
    for theirs, ours in zip(experts, ("gate", "up", "down"), strict=True):
        parameters[f"experts.{theirs}.kernel"] = ours
    parameters |= {"gate.e_score_correction_bias": "bias"} if claims.get("bias") else {}
    result = LOSS if claims.get("has_balance") else "return block(x)[0], {}"
    result = f"block.{shared}.value *= 0\n        {result}" if shared else result
    fields = {"hidden_size": 16, "num_experts_per_tok": "K", "sharding_axis_dims": axes} | settings
    names = {"model": model, "name": name, "file": file or model, "block": block, "arguments": arguments}
    text = (IMPORT if claims.get("has_balance") else "") + TEXT.format(**names, result=result)
    return Block(text=text, settings=json.dumps(fields), parameters=parameters, **claims)


RAW: dict[str, Any] = {
    "documented": {"logits_as_weights": True},
    "source": 'MoeRoutingStrategy.TOP_K_NDIV: "Expert weights are NOT normalized (raw logit values used as weights)"',
    "read": "besides logits as weights, which MoeRoutingStrategy.TOP_K_NDIV documents, _linear_moe.py rounds grouped "
    "products to bfloat16, whatever the block's dtype",
}
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
    "qwen3_moe, standard_moe": easydel(*QWEN, WIDTHS | {"moe_method": "standard_moe"}, skip=SOFTMAX, **RAW),
    "qwen3_moe, dense_moe": easydel(*QWEN, WIDTHS | {"moe_method": "dense_moe"}, skip=SOFTMAX),
    "qwen2_moe": easydel(
        *("qwen2_moe", "Qwen2Moe", "Qwen2MoeSparseBlock"), WIDTHS, shared="shared_expert.down_proj.kernel", skip=SOFTMAX
    ),
    "glm4_moe": easydel(
        *("glm4_moe", "Glm4Moe", "Glm4MoeMoE"),
        {"moe_intermediate_size": 24} | GROUPED,
        shared="shared_experts.down_proj.kernel",
        rule=V3,
        bias=True,
        skip=SOFTMAX,
    ),
    "deepseek_v3": easydel(
        *("deepseek_v3", "DeepseekV3", "DeepseekV3MoE"),
        {"moe_intermediate_size": 24, "n_shared_experts": None} | GROUPED,
        file="deepseek",
        arguments="0, ",
        read="its gate returns the K chosen weights, and moe_call routes on them as on logits: experts 0 to K - 1 are "
        "applied",
        rule=V3,
        bias=True,
        skip=SOFTMAX,
    ),
}

if __name__ == "__main__":
    main(f"EasyDeL {importlib.metadata.version('easydel')}", ADAPTERS)
