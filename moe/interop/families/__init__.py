"""Families of open checkpoints, one module each. A new family is one more module here and in :data:`FAMILIES`."""

from moe.interop.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    kimi_k2,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    switch_transformers,
    t5,
)

#: By ``model_type``, in the order in which an export tries them.
FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        *(mistral, llama, qwen2, qwen3, mixtral, olmoe, qwen2_moe, deepseek, qwen3_moe),
        *(deepseek_v2, deepseek_v3, kimi_k2, glm4_moe_lite, glm4_moe, dots1, minimax_m2, ernie4_5_moe, gpt_oss),
        *(t5, switch_transformers),
    )
}

__all__ = ["FAMILIES"]
