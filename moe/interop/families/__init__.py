"""Families of open checkpoints by vendor. A new family is a table of rows, and its name in :data:`FAMILIES`."""

from moe.interop.families import deepseek, glm, google, lara, mistral, others, qwen

#: By ``model_type``, in the order in which an export tries them.
FAMILIES = {
    family.model_type: family
    for family in (
        mistral.MISTRAL,
        mistral.LLAMA,
        qwen.QWEN2,
        qwen.QWEN3,
        mistral.MIXTRAL,
        others.OLMOE,
        qwen.QWEN2_MOE,
        deepseek.DEEPSEEK,
        qwen.QWEN3_MOE,
        qwen.MELLUM,
        qwen.FLINT,
        qwen.QWEN3_NEXT,
        qwen.QWEN3_5_MOE_TEXT,
        lara.LARA_MINI,
        deepseek.DEEPSEEK_V2,
        deepseek.DEEPSEEK_V3,
        deepseek.KIMI_K2,
        deepseek.GLM4_MOE_LITE,
        glm.GLM4_MOE,
        glm.DOTS1,
        glm.EXAONE_MOE,
        glm.AFMOE,
        glm.KOLIBRI1,
        mistral.MINIMAX_M2,
        others.ERNIE4_5_MOE,
        others.GPT_OSS,
        others.FLEX_OLMO,
        others.HUNYUAN_V1_MOE,
        mistral.PHIMOE,
        others.GRANITEMOE,
        others.GRANITEMOESHARED,
        others.GRANITEMOE_SWA,
        glm.SOLAR_OPEN,
        glm.SARVAM_MOE,
        glm.HY_V3,
        deepseek.SARVAM_MLA,
        deepseek.MISTRAL4,
        mistral.MINISTRAL3,
        google.T5,
        google.SWITCH_TRANSFORMERS,
    )
}

#: Other architectures with experts, and all that they need that no model here computes.
MISSING = {
    "deepseek_v32": "attention to tokens that an indexer chooses",
    "deepseek_v4": "compressed attention and hyper-connections",
    "gemma4": "norms before and after each half, dense FFN and experts side by side, a router with a norm and a scale "
    "of each expert, heads of another size in some layers, per-layer embeddings",
    "glm_moe_dsa": "attention to tokens that an indexer chooses",
    "granitemoehybrid": "Mamba layers",
    "jamba": "Mamba layers",
    "kimi_linear": "delta attention layers",
    "laguna": "another number of heads in some layers, another rotated share of heads in the layers with windows, "
    "gates of heads by softplus",
    "llama4": "attention within chunks, layers without positions, whose scores grow with the position, norms of "
    "queries and keys without a scale, routing weights on the experts' inputs",
    "longcat_flash": "two attentions and dense FFNs in a layer with experts beside the second, factors of the latents",
    "mimo_v2_flash": "another number of key heads and sinks in the layers with windows alone, values of another size "
    "than keys, a factor of values",
    "minimax": "lightning attention layers",
    "nemotron_h": "Mamba layers",
}

__all__ = ["FAMILIES", "MISSING"]
