"""Sizes of published decoders, from their config.json; configs/NAME.py is the row of that name.

They run in bfloat16 on rows of 4096 tokens, with experts split over ``mesh.expert``. ``losses.balance`` is
Hugging Face's coefficient · K / L where the paper's is not known (docs/gates.md).
"""

from collections.abc import Callable
from typing import Any

from moe.config import Changes
from moe.configs import base

#: (vocabulary, D, layers, heads, key/value heads, head dim, F of a dense FFN)
SIZES: dict[str, tuple[int, ...]] = {
    "deepseek_moe_16b": (102400, 2048, 28, 16, 16, 128, 10944),
    "deepseek_v2_lite": (102400, 2048, 27, 16, 16, 192, 10944),
    "deepseek_v2": (102400, 5120, 60, 128, 128, 192, 12288),
    "deepseek_v3": (129280, 7168, 61, 128, 128, 192, 18432),
    "kimi_k2": (163840, 7168, 61, 64, 64, 192, 18432),
    "gpt_oss_20b": (201088, 2880, 24, 64, 8, 64, 0),
    "gpt_oss_120b": (201088, 2880, 36, 64, 8, 64, 0),
    "mistral_7b": (32000, 4096, 32, 32, 8, 128, 14336),
    "mixtral_8x7b": (32000, 4096, 32, 32, 8, 128, 14336),
    "mixtral_8x22b": (32000, 6144, 56, 48, 8, 128, 16384),
    "olmoe_1b_7b": (50304, 2048, 16, 16, 16, 128, 1024),
    "qwen1_5_moe_a2_7b": (151936, 2048, 24, 16, 16, 128, 5632),
    "qwen3_30b_a3b": (151936, 2048, 48, 32, 4, 128, 6144),
    "qwen3_next_80b_a3b": (151936, 2048, 48, 16, 2, 256, 5120),
}

#: Latent attention (DeepSeek-V2 2024, section 2.1).
_LATENT = {"rope_dim": 64, "rope_interleaved": True, "kv_lora_rank": 512, "value_dim": 128, "norm_eps": 1e-6}
_GPT_OSS = {
    "activation": "swiglu_clamped",
    "rope_theta": 150_000.0,
    "rope_scaling": {"kind": "yarn", "factor": 32.0, "original_length": 4096, "truncate": False},
    "sliding_window": 128,
    "attention_bias": "all",
    "attention_sinks": True,
}
#: Gated DeltaNet in three of four layers.
_DELTA_NET = {
    **{"key_heads": 16, "value_heads": 32, "key_dim": 128, "value_dim": 128, "conv_width": 4},
}
#: Other settings of the model that differ from the defaults.
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_moe_16b": {"norm_eps": 1e-6},
    "deepseek_v2_lite": _LATENT,
    "deepseek_v2": _LATENT | {"q_lora_rank": 1536},
    "deepseek_v3": _LATENT | {"q_lora_rank": 1536},
    "kimi_k2": _LATENT | {"q_lora_rank": 1536, "rope_theta": 5e4},
    "gpt_oss_20b": _GPT_OSS | {"pattern": "sliding attention"},
    "gpt_oss_120b": _GPT_OSS | {"pattern": "sliding attention"},
    "mistral_7b": {"sliding_window": 4096},
    "mixtral_8x7b": {"rope_theta": 1e6},
    "mixtral_8x22b": {"rope_theta": 1e6},
    "olmoe_1b_7b": {"qk_norm": "full"},
    "qwen1_5_moe_a2_7b": {"rope_theta": 1e6, "norm_eps": 1e-6, "attention_bias": "qkv"},
    "qwen3_30b_a3b": {"rope_theta": 1e6, "norm_eps": 1e-6, "qk_norm": "head"},
    "qwen3_next_80b_a3b": {
        **{"rope_theta": 1e7, "rope_dim": 64, "norm_eps": 1e-6, "qk_norm": "head", "delta_net": _DELTA_NET},
        **{"pattern": "delta x 3 attention", "gated_attention": True, "zero_centred_norms": True},
    },
}

_DEEPSEEK_MOE = {
    **{"gate": {"name": "deepseek_moe", "k": 6}, "num_experts": 64, "d_ff": 1408, "first_dense": 1},
    **{"shared_d_ff": 2 * 1408},
}
_SEQUENCE = {"losses": {"balance": 1e-3, "scope": "sequence"}}
_V3_GATE = {"name": "deepseek_v3", "k": 8, "groups": 8, "kept_groups": 4, "scale": 2.5}
_K2_GATE = _V3_GATE | {"groups": 1, "kept_groups": 1, "scores_per_group": 1, "scale": 2.827}


def _mixtral(num_experts: int, balance: float, k: int = 2, **fields: Any) -> dict[str, Any]:
    gate, losses = {"name": "mixtral", "k": k}, {"balance": balance}
    return {"gate": gate, "num_experts": num_experts, "losses": losses, **fields}


#: Fields of the MoE layers.
LAYERS: dict[str, dict[str, Any]] = {
    "deepseek_moe_16b": _DEEPSEEK_MOE,
    "deepseek_v2_lite": _DEEPSEEK_MOE | _SEQUENCE,
    "deepseek_v2": {
        **{"gate": {"name": "deepseek_moe", "k": 6, "groups": 8, "kept_groups": 3, "scale": 16.0}},
        **{"num_experts": 160, "d_ff": 1536, "shared_d_ff": 2 * 1536, "first_dense": 1, **_SEQUENCE},
    },
    "deepseek_v3": {
        **{"gate": _V3_GATE, "num_experts": 256, "d_ff": 2048, "shared_d_ff": 2048, "first_dense": 3},
        **{"losses": {"balance": 1e-4, "scope": "sequence"}},
    },
    "kimi_k2": {
        **{"gate": _K2_GATE, "num_experts": 384, "d_ff": 2048, "shared_d_ff": 2048, "first_dense": 1},
        **{"losses": {"balance": 1e-4, "scope": "sequence"}},  # DeepSeek-V3's: the paper states none
    },
    # 0.9 is the coefficient of their config.json; OpenAI has not said what they were trained with.
    "gpt_oss_20b": _mixtral(32, 0.9 * 4 / 24, 4, d_ff=2880, bias="all"),
    "gpt_oss_120b": _mixtral(128, 0.9 * 4 / 36, 4, d_ff=2880, bias="all"),
    "mistral_7b": {"gate": "none"},
    "mixtral_8x7b": _mixtral(8, 0.02 * 2 / 32),
    "mixtral_8x22b": _mixtral(8, 0.001 * 2 / 56),
    "olmoe_1b_7b": {
        **{"gate": {"name": "switch", "k": 8}, "num_experts": 64, "jitter": 0.0},
        **{"losses": {"balance": 0.01 / 16, "z": 0.001}},  # OLMoE 2024, section 3; MegaBlocks: a mean over layers
    },
    "qwen1_5_moe_a2_7b": {
        **{"gate": {"name": "deepseek_moe", "k": 4}, "num_experts": 60, "d_ff": 1408},
        **{"shared_d_ff": 5632, "shared_gate": True, "losses": {"balance": 0.001 * 4 / 24}},
    },
    "qwen3_30b_a3b": _mixtral(128, 0.001 * 8 / 48, 8, d_ff=768),
    "qwen3_next_80b_a3b": _mixtral(512, 0.001 * 10 / 48, 10, d_ff=512, shared_d_ff=512, shared_gate=True),
}

#: Rows of a batch and devices over which experts are split, where these differ from 64 and 8.
RUNS = {
    "deepseek_v3": (512, 64),
    "kimi_k2": (1024, 8),
    "gpt_oss_120b": (128, 8),
    "mistral_7b": (64, 1),
    "qwen1_5_moe_a2_7b": (64, 4),
}


def config_of(name: str) -> Callable[..., Changes]:
    """``get_config`` of a row: the defaults with its sizes, and with the best settings known for a slice or hosts, such
    as ``v5p-128`` or ``h100:8x8``, where one is named."""

    def get_config(hardware: str = "") -> Changes:
        config = base.get_config()
        names = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff")
        sizes = {field: size for field, size in zip(names, SIZES[name], strict=True) if size}
        config.model.update(dtype="bfloat16", attention="blocked", remat="full", rope_theta=1e4, **sizes)
        config.model.update(MODELS.get(name, {}))
        config.model.moe.update(LAYERS[name])
        rows, experts = RUNS.get(name, (64, 8))
        config.data.sequence_length = 4096
        config.train.batch_size = rows
        config.mesh.update(data=1, fsdp=-1, expert=experts)
        base.use_best_plan(config, name, hardware)
        return config

    return get_config
