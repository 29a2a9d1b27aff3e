"""GLM-4-MoE, and families of other vendors with grouped-query attention and DeepSeek-V3's routing."""

import dataclasses
from typing import Annotated

from moe.config import ModelConfig
from moe.interop.families import groups
from moe.interop.families.family import (
    ATTENTION,
    DENSE,
    EXPERTS,
    FUSED_EXPERTS,
    OUTSIDE,
    SELECTION_BIAS,
    Family,
    Tensor,
    shared_expert,
)
from moe.interop.families.rows import Row, always
from moe.interop.schema import Count, NumExperts, Off, OptionalCount, Positive, Size, named

TENSORS = ATTENTION | DENSE | EXPERTS | SELECTION_BIAS | shared_expert("shared_experts")
#: GLM-4.5: half of each head rotated.
GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    (
        groups.PARTIAL_ROTATION,
        Row("attention_bias", "attention_bias", names={False: "none", True: "qkv"}),
        Row("use_qk_norm", "qk_norm", bool, False, names={False: "none", True: "head"}),
        *groups.SIGMOID_GATE,
        *groups.SHARED_AND_ROUTED,
        groups.LEADING_DENSE,
        groups.PREDICTION,
    ),
    TENSORS,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    },
)
#: Solar-Open: whole heads are rotated, every layer is MoE; its files do not have the hidden size of dense layers.
SOLAR_OPEN = GLM4_MOE.renamed(
    "solar_open",
    "SolarOpenForCausalLM",
    without=("use_qk_norm", "first_k_dense_replace", "num_nextn_predict_layers"),
    head_dim=128,
    intermediate_size=1280,
    moe_intermediate_size=1280,
    rope_theta=1e6,
    partial_rotary_factor=1.0,
)
_SARVAM_LIBRARY = GLM4_MOE.renamed(
    "sarvam_moe",
    "Glm4MoeForCausalLM",
    *groups.SARVAM_NAMES,
    Row("attention_bias", type=Annotated[bool, named("attention_bias", "use_qkv_bias")], default=False),
    num_key_value_heads=4,
    head_dim=64,
    rms_norm_eps=1e-6,
    rope_theta=8e6,
    partial_rotary_factor=1.0,
    use_qk_norm=True,
    num_experts_per_tok=6,
    moe_intermediate_size=1024,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=0,
)


def _sarvam_tensors(model: ModelConfig, stack: str) -> dict[str, str | Tensor]:
    """Queries, keys and values lie one after the other."""
    del stack
    keys = model.num_kv_heads * model.head_dim
    turns = (model.num_heads * model.head_dim, keys, keys)
    result: dict[str, str | Tensor] = {**TENSORS, "moe.router.bias": "mlp.gate.expert_bias"}
    for part, name in enumerate(("query", "key", "value")):
        result[f"attention.{name}"] = Tensor("attention.query_key_value.weight", part, turns=turns)
        result[f"attention.{name}_bias"] = Tensor("attention.query_key_value.bias", part, turns=turns)
    result["attention.out"] = "attention.dense.weight"
    norms = {f"attention.{name}_norm.scale": f"attention.{name}_layernorm.weight" for name in ("query", "key")}
    return result | norms


_WORDS = "model.word_embeddings.weight"
#: Sarvam-30B: whole heads are rotated; published files have other names of tensors than the library's memory.
SARVAM_MOE = dataclasses.replace(
    _SARVAM_LIBRARY,
    tensors=_sarvam_tensors,
    outside=lambda _: OUTSIDE | {"embedding.table": _WORDS},
    copies={OUTSIDE["unembedding.kernel"]: _WORDS},
    library=_SARVAM_LIBRARY,
)
#: Hunyuan 3: QK-norm per head, MoE layers listed one by one.
HY_V3 = Family(
    "hy_v3",
    "HYV3ForCausalLM",
    (
        always("qk_norm", "head"),
        groups.ALL_BIASES,
        Row("mlp_bias", type=Off, default=False),
        always("moe.gate", {**groups.PLAIN_GATE, "renormalise": True}),
        Row("router_scaling_factor", "moe.gate.scale", Positive, 2.826),
        Row("num_experts", "moe.num_experts", NumExperts, 192),
        Row("moe_intermediate_size", "moe.d_ff", Size, 1536),
        groups.shared_size("num_shared_experts", 1),
        groups.listed_layers(lambda file: 1),
    ),
    ATTENTION
    | DENSE
    | EXPERTS
    | {"moe.router.kernel": "mlp.router.gate.weight", "moe.router.bias": "mlp.expert_bias"}
    | shared_expert("shared_mlp"),
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 11_158_840.0,
        "num_experts_per_tok": 8,
    },
    # Names in published files, and in the library's memory.
    aliases=(
        ("mlp.router.gate.weight", "mlp.gate.weight"),
        ("mlp.expert_bias", "mlp.e_score_correction_bias"),
        ("mlp.shared_mlp.", "mlp.shared_experts."),
    ),
)
#: EXAONE-MoE: DeepSeek-V3's routing, QK-norm per head; beside layers with windows, the others have no positions.
EXAONE_MOE = Family(
    "exaone_moe",
    "ExaoneMoeForCausalLM",
    (
        always("qk_norm", "head"),
        *groups.windows(lambda layer, file: (layer + 1) % file.sliding_window_pattern != 0),
        Row("sliding_window_pattern", type=Count, default=4),
        groups.rotated_windows(lambda file: groups.window(file) > 0),
        *groups.SIGMOID_GATE,
        Row("num_experts", "moe.num_experts", NumExperts, 64),
        Row("moe_intermediate_size", "moe.d_ff", Size, 1024),
        groups.shared_size("num_shared_experts", 1),
        Row("first_k_dense_replace", type=OptionalCount, default=1),
        groups.listed_layers(lambda file: file.first_k_dense_replace),
    ),
    TENSORS | {"moe.router.bias": "mlp.e_score_correction_bias"},
    defaults={
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    aliases=(("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),),  # in files, in the library's memory
)
_AFMOE_ROUTER = {"moe.router.kernel": "mlp.router.gate.weight"}
#: AFMoE (Trinity): norms before and after each half, gated attention, positions in the layers with windows alone;
#: ``mup_enabled`` multiplies the embeddings by the root of their size.
AFMOE = Family(
    "afmoe",
    "AfmoeForCausalLM",
    (
        always("norms", "both"),
        always("qk_norm", "head"),
        always("gated_attention", True),
        Row("attention_bias", type=Off, default=False),
        *groups.windows(lambda layer, file: (layer + 1) % file.global_attn_every_n_layers != 0),
        Row("global_attn_every_n_layers", type=Count, default=4),
        always("rotated_layers", "sliding"),
        Row(
            "mup_enabled",
            "embedding_scale",
            bool,
            False,
            here=lambda file: file.hidden_size**0.5 if file.mup_enabled else None,
            there=lambda m: m.embedding_scale != 1,
        ),
        always("moe.gate", {**groups.PLAIN_GATE, "renormalise": True}),
        Row("route_scale", "moe.gate.scale", Positive, 1.0),
        Row("num_experts", "moe.num_experts", NumExperts, 64),
        Row("moe_intermediate_size", "moe.d_ff", Size, 1408),
        groups.shared_size("num_shared_experts", 2),
        groups.leading_dense("num_dense_layers", 1),
    ),
    TENSORS
    | {
        "attention.gate": "self_attn.gate_proj.weight",
        "attention_output_norm.scale": "post_attention_layernorm.weight",
        "ffn_norm.scale": "pre_mlp_layernorm.weight",
        "ffn_output_norm.scale": "post_mlp_layernorm.weight",
        "moe.router.bias": "mlp.expert_bias",
    }
    | _AFMOE_ROUTER,
    defaults={
        "max_position_embeddings": 16384,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 6,
        "sliding_window": 1024,
        "router_aux_loss_coef": 0.0,
    },
    fused=FUSED_EXPERTS | _AFMOE_ROUTER,
)
#: Kolibri-1: norms before and after each half, positions in the layers with windows alone, a selection bias of logits;
#: its files do not have the hidden size of dense layers.
KOLIBRI1 = Family(
    "kolibri1",
    "Kolibri1ForCausalLM",
    (
        always("norms", "both"),
        always("qk_norm", "head"),
        *groups.windows(lambda layer, file: (layer + 1) % 5 != 0),
        groups.rotated_windows(lambda file: groups.window(file) > 0),
        always("moe.gate.name", "kolibri"),
        Row("norm_topk_prob", "moe.gate.renormalise"),
        Row("num_experts", "moe.num_experts", NumExperts, 384),
        Row("moe_intermediate_size", "moe.d_ff", Size, 512),
        Row("shared_expert_intermediate_size", "moe.shared_d_ff", Size, 512),
    ),
    TENSORS
    | {
        "attention_output_norm.scale": "post_attn_norm.weight",
        "ffn_output_norm.scale": "post_ffn_norm.weight",
        "moe.router.bias": "moe.router.expert_bias",
    },
    defaults={
        "max_position_embeddings": 262144,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 512,
        "sliding_window": 513,
        "num_experts_per_tok": 6,
        "router_aux_loss_coef": 0.0,
    },
    unwritten=("intermediate_size",),
    aliases=(  # in files, in the library's memory
        ("moe.router.expert_bias", "mlp.gate.e_score_correction_bias"),
        ("post_attn_norm.", "post_self_attn_layernorm."),
        ("post_ffn_norm.", "post_mlp_layernorm."),
    ),
)
#: dots.llm1: QK-norm per head, windows in the upper layers.
DOTS1 = Family(
    "dots1",
    "Dots1ForCausalLM",
    (
        always("qk_norm", "head"),
        groups.ALL_BIASES,
        *groups.UPPER_WINDOWS,
        *groups.SIGMOID_GATE,
        *groups.SHARED_AND_ROUTED,
        groups.LEADING_DENSE,
        Row("num_experts_per_tok", type=OptionalCount, default=0),  # the library has no default
    ),
    TENSORS,
    defaults={"num_key_value_heads": 32, "moe_intermediate_size": 1408, "max_window_layers": 62},
)
