"""DeepSeek's families, from DeepSeekMoE to V3, and those of other vendors with V3's latent attention."""

from typing import Annotated, Any, Literal

import pydantic

from moe.config import ConfigError, ModelConfig, sparse_layers
from moe.interop.families import groups
from moe.interop.families.family import (
    ATTENTION,
    DENSE,
    EXPERTS,
    FUSED_EXPERTS,
    SELECTION_BIAS,
    Family,
    shared_expert,
)
from moe.interop.families.groups import LEADING_DENSE, SEQUENCE_LOSS, SHARED_AND_ROUTED, SIGMOID_GATE, NullIsFalse
from moe.interop.families.rows import Row, always, constant, gate_field
from moe.interop.schema import Coefficient, Count, Off, OptionalCount, Positive, RopeParameters, named

# --- DeepSeekMoE -----------------------------------------------------------------------------------------------------


def _layers_by_step(file: Any) -> tuple[int, ...] | None:
    first, step = file.first_k_dense_replace, file.moe_layer_freq
    numbers = range(file.num_hidden_layers)
    return groups.some_layers([n for n in numbers if file.n_routed_experts and n >= first and n % step == 0], file)


def _step(model: ModelConfig) -> int:
    """Distance between MoE layers; if no step gives these layers, write_config reports what is lost."""
    sparse = sparse_layers(model)
    layers = [n for n, is_sparse in enumerate(sparse) if is_sparse]
    numbers = range(groups.first_sparse(model), len(sparse))
    steps = range(1, len(sparse) + 1)
    return next((step for step in steps if layers == [n for n in numbers if n % step == 0]), 1)


#: Fine-grained and shared experts. Its code is not part of transformers.
DEEPSEEK = Family(
    "deepseek",
    "DeepseekForCausalLM",
    (
        groups.ALL_BIASES,
        groups.SOFTMAX_GATE,
        *SHARED_AND_ROUTED,
        # None, or null: all layers are dense.
        Row("n_routed_experts", "moe.num_experts", OptionalCount, 0, here=lambda file: file.n_routed_experts or 1),
        Row("n_shared_experts", there=lambda m: groups.shared_experts(m) or None),
        Row("first_k_dense_replace", "moe.layers", OptionalCount, 0, here=_layers_by_step, there=groups.first_sparse),
        Row("moe_layer_freq", type=Count, default=1, there=_step),
        SEQUENCE_LOSS,
        constant("scoring_func", Literal["softmax"], "softmax"),
        Row("aux_loss_alpha", type=Coefficient, default=0.001),
        Row("topk_method", type=Literal["greedy"], default="greedy"),
        Row("routed_scaling_factor", type=Annotated[float, pydantic.Field(ge=1, le=1)], default=1.0),
        Row("kv_lora_rank", type=type(None), default=None),
    ),
    ATTENTION | DENSE | EXPERTS | shared_expert("shared_experts"),
    balance_field="aux_loss_alpha",
    balance_scale="per layer",
)

# --- Latent attention ------------------------------------------------------------------------------------------------


def _rotated(file: Any) -> int:
    rope = file.rope
    if rope.mscale_all_dim and rope.rope_type not in ("default", "yarn"):
        raise ConfigError(
            f"config.json: mscale_all_dim={rope.mscale_all_dim}: is read only with yarn, not with {rope.rope_type}"
        )
    return file.qk_rope_head_dim


#: Latent attention and experts of V2 and V3; biases, which no published model has, are refused.
LATENT = (
    Row(
        "q_lora_rank",
        "q_lora_rank",
        OptionalCount | None,
        None,
        here=lambda file: file.q_lora_rank or 0,
        there=lambda m: m.q_lora_rank or None,
    ),
    Row("kv_lora_rank", "kv_lora_rank", Count),
    Row(
        "qk_nope_head_dim",
        "head_dim",
        Count,
        here=lambda file: file.qk_nope_head_dim + file.qk_rope_head_dim,
        there=lambda m: m.head_dim - m.rope_dim,
    ),
    Row("qk_rope_head_dim", "rope_dim", Count, here=_rotated),
    Row("v_head_dim", "value_dim", Count),
    Row("head_dim", there=lambda m: m.rope_dim),
    Row("", "num_kv_heads", here=lambda file: file.num_attention_heads),
    *SHARED_AND_ROUTED,
    LEADING_DENSE,
    Row("moe_layer_freq", type=Literal[1], default=1),
    Row("attention_bias", type=Off, default=False),
    Row("mlp_bias", type=Off, default=False),
)
LATENT_ATTENTION = {name: tensor for name, tensor in ATTENTION.items() if "key" not in name and "value" not in name} | {
    "attention.query_down": "self_attn.q_a_proj.weight",
    "attention.query_latent_norm.scale": "self_attn.q_a_layernorm.weight",
    "attention.query_up": "self_attn.q_b_proj.weight",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_latent_norm.scale": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up": "self_attn.kv_b_proj.weight",
}
TENSORS = LATENT_ATTENTION | DENSE | EXPERTS | shared_expert("shared_experts")


def _group_limited(file: Any, groups_: int) -> int:
    return groups_ if file.topk_method == "group_limited_greedy" else 1


#: V2 and V2-Lite: softmax scores, selection limited to groups by their best expert. With ``norm_topk_prob`` the
#: published code and transformers differ: it is refused.
DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    (
        *LATENT,
        always("rope_interleaved", True),
        always("moe.gate.name", "deepseek_moe"),
        Row("n_group", "moe.gate.groups", Count, 1, here=lambda file: _group_limited(file, file.n_group)),
        Row("topk_group", "moe.gate.kept_groups", Count, 1, here=lambda file: _group_limited(file, file.topk_group)),
        Row("routed_scaling_factor", "moe.gate.scale", Positive, 1.0),
        Row(
            "topk_method",
            type=Literal["greedy", "group_limited_greedy"],
            default="greedy",
            there=lambda m: "group_limited_greedy" if gate_field(m.moe, "groups") > 1 else "greedy",
        ),
        constant("scoring_func", Literal["softmax"], "softmax"),
        constant("norm_topk_prob", Off, False),
        SEQUENCE_LOSS,
        Row("aux_loss_alpha", type=Coefficient, default=0.001),
        Row("n_routed_experts", type=Annotated[Count, named("n_routed_experts", "num_experts")], default=64),
        Row("num_experts_per_tok", type=OptionalCount, default=0),  # the library has no default
    ),
    TENSORS,
    defaults={"q_lora_rank": 1536, "n_shared_experts": 2},
    balance_field="aux_loss_alpha",
    balance_scale="per layer",
)
#: V3: sigmoid scores, a bias for the selection, groups by their two best experts.
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    (
        *LATENT,
        *SIGMOID_GATE,
        Row("norm_topk_prob", type=NullIsFalse, default=True),
        Row("rope_interleave", "rope_interleaved", NullIsFalse, True),
        constant("topk_method", Literal["noaux_tc"], "noaux_tc"),
        constant("scoring_func", Literal["sigmoid"], "sigmoid"),
        Row("aux_loss_alpha", type=Coefficient, default=0.0001),
        groups.PREDICTION,
    ),
    TENSORS | SELECTION_BIAS,
    defaults={
        "max_position_embeddings": 4096,
        "q_lora_rank": 1536,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
    balance_field="aux_loss_alpha",
    balance_scale="per layer",
)
#: V3 with other numbers; the published models have no layer for multi-token prediction.
KIMI_K2 = DEEPSEEK_V3.renamed("kimi_k2", "DeepseekV3ForCausalLM", num_nextn_predict_layers=0)
#: GLM-4.7-Flash: V3 with MoE layers listed one by one.
GLM4_MOE_LITE = Family(
    "glm4_moe_lite",
    "Glm4MoeLiteForCausalLM",
    (
        *(row for row in LATENT if row is not LEADING_DENSE),
        *SIGMOID_GATE,
        Row("first_k_dense_replace", type=OptionalCount, default=1),
        groups.listed_layers(lambda file: file.first_k_dense_replace),
        Row("rope_interleave", "rope_interleaved", bool, True),
        constant("topk_method", Literal["noaux_tc"], "noaux_tc"),
        groups.PREDICTION,
    ),
    TENSORS | SELECTION_BIAS,
    defaults={
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 1,
    },
)


def _yarn(scaling: Any) -> Any:
    """``deepseek_yarn``, as Sarvam's own code calls it, is YaRN."""
    if not isinstance(scaling, dict):
        return scaling
    kinds = ("type", "rope_type")
    return {name: "yarn" if name in kinds and kind == "deepseek_yarn" else kind for name, kind in scaling.items()}


#: Sarvam-105B: V3 with the names of its own code beside the library's.
SARVAM_MLA = DEEPSEEK_V3.renamed(
    "sarvam_mla",
    "DeepseekV3ForCausalLM",
    *groups.SARVAM_NAMES,
    Row("rope_scaling", type=Annotated[RopeParameters | None, pydantic.BeforeValidator(_yarn)], default=None),
    q_lora_rank=None,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
)
#: Mistral Small 4, whose files hold the experts of a layer together: V3's layers without a selection bias, softmax
#: scores, queries that grow with the position.
MISTRAL4 = Family(
    "mistral4",
    "Mistral4ForCausalLM",
    (
        *LATENT,
        always("moe.gate.name", "deepseek_moe"),
        *groups.GROUPS_AND_SCALE,
        Row("norm_topk_prob", type=NullIsFalse, default=True),
        Row("rope_interleave", "rope_interleaved", NullIsFalse, True),
        groups.BATCH_LOSS,
        groups.GROWN_ROTATION,
        Row("head_dim", there=lambda m: m.head_dim),
    ),
    LATENT_ATTENTION | DENSE | FUSED_EXPERTS | shared_expert("shared_experts"),
    defaults={
        "max_position_embeddings": 1 << 20,
        "rope_parameters": groups.grown_rotation(theta=10_000.0, factor=128.0, original=8192),
        "q_lora_rank": 1024,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 4,
    },
    base=groups.GrownQueries,
    unwritten=groups.NOT_BESIDE_GROWN,
)
