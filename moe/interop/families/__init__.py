"""Families of open checkpoints, one module each. A new family is one more module here and in :data:`FAMILIES`."""

from moe.interop.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    flex_olmo,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granitemoe,
    granitemoeshared,
    hunyuan_v1_moe,
    kimi_k2,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    olmoe,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe_text,
    qwen3_moe,
    qwen3_next,
    switch_transformers,
    t5,
)

#: By ``model_type``, in the order in which an export tries them.
FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        *(mistral, llama, qwen2, qwen3, mixtral, olmoe, qwen2_moe, deepseek, qwen3_moe, qwen3_next, qwen3_5_moe_text),
        *(deepseek_v2, deepseek_v3, kimi_k2, glm4_moe_lite, glm4_moe, dots1, minimax_m2, ernie4_5_moe, gpt_oss),
        *(flex_olmo, hunyuan_v1_moe, phimoe, granitemoe, granitemoeshared, t5, switch_transformers),
    )
}

#: Other architectures with experts, and what they need that no model here computes.
MISSING = {
    "deepseek_v32": "attention to tokens that an indexer chooses",
    "deepseek_v4": "compressed attention and hyper-connections",
    "gemma4": "norms before and after each half, dense FFN and experts side by side, a router with a norm and a scale "
    "of each expert, heads of another size in some layers, per-layer embeddings",
    "glm_moe_dsa": "attention to tokens that an indexer chooses",
    "granitemoehybrid": "Mamba layers",
    "jamba": "Mamba layers",
    "kimi_linear": "delta attention layers",
    "llama4": "attention within chunks, layers without positions, whose scores grow with the position, norms of "
    "queries and keys without a scale, routing weights on the experts' inputs",
    "longcat_flash": "two attentions and dense FFNs in a layer with experts beside the second, factors of the latents",
    "minimax": "lightning attention layers",
    "nemotron_h": "Mamba layers",
}

__all__ = ["FAMILIES", "MISSING"]
