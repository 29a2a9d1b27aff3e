"""Families of open checkpoints, one module each. A new family is one more module here and in :data:`FAMILIES`."""

from moe.interop.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    switch_transformers,
    t5,
)

#: By ``model_type``, in the order in which an export tries them.
FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        *(mistral, llama, mixtral, olmoe, qwen2_moe, deepseek, qwen3_moe),
        *(deepseek_v2, deepseek_v3, glm4_moe, gpt_oss, t5, switch_transformers),
    )
}

__all__ = ["FAMILIES"]
