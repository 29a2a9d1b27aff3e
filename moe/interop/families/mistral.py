"""Dense Llama and Mistral, Mixtral, and families of other vendors with Mixtral's tensors."""

from typing import Annotated, Any, Literal

import pydantic

from moe.config import ConfigError, ModelConfig, layer_kinds
from moe.interop.families import groups
from moe.interop.families.family import ATTENTION, DENSE, FUSED_EXPERTS, OUTSIDE, Family, Tensor
from moe.interop.families.rows import ABSENT, Row, always, constant
from moe.interop.rope import write_scaling
from moe.interop.schema import Count, Experts, Fraction, Json, NumLocalExperts, Off, OpenConfig, RopeParameters
from moe.routing.gates import SparseMixer

#: Grouped-query attention over the whole context.
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (groups.ALL_BIASES, constant("mlp_bias", Off, False), always("moe.gate.name", "none")),
    ATTENTION | DENSE,
)


def _kinds(model: ModelConfig) -> Any:
    one_window = len({kind.window for kind in layer_kinds(model)}) == 1
    return ABSENT if one_window else groups.window_kinds(model)


#: One window for all layers or, as in Ministral, for those that are listed; the library reads a file with
#: ``layer_types`` as Ministral, whose other layers have no window.
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    (*groups.windows(lambda layer, file: True, write_kinds=_kinds), always("moe.gate.name", "none")),
    ATTENTION | DENSE,
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8},
)
#: Ministral 3: dense layers whose queries grow with the position.
MINISTRAL3 = Family(
    "ministral3",
    "Ministral3ForCausalLM",
    (groups.WINDOW, always("moe.gate.name", "none"), groups.GROWN_ROTATION),
    ATTENTION | DENSE,
    defaults={
        "max_position_embeddings": 262144,
        "rope_parameters": groups.grown_rotation(theta=1e6, factor=16.0, original=16384),
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
    },
    base=groups.GrownQueries,
    unwritten=groups.NOT_BESIDE_GROWN,
)
EXPERTS = {
    "moe.router.kernel": "block_sparse_moe.gate.weight",
    "moe.experts.gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "moe.experts.up": "block_sparse_moe.experts.{expert}.w3.weight",
    "moe.experts.down": "block_sparse_moe.experts.{expert}.w2.weight",
}
#: The library renamed the block; files of its own fused layout have either name.
ALIASES = (("block_sparse_moe.", "mlp."),)
#: Softmax over the K chosen logits.
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        always("moe.gate.name", "mixtral"),
        groups.WINDOW,
        groups.EXPERT_SIZE,
        groups.JITTER,
        Row("num_local_experts", "moe.num_experts", NumLocalExperts, 8),
    ),
    ATTENTION | EXPERTS,
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    aliases=ALIASES,
)


class MiniMaxM2Config(OpenConfig):
    """Fields of ``config.json``; ``rotary_dim`` is the older ``partial_rotary_factor``."""

    rotary_dim: Count | None = None

    @property
    def rope(self) -> RopeParameters:
        """Rotary positions; ``rotary_dim`` is read where no ``partial_rotary_factor`` is stated."""
        if self.rotary_dim is None or "partial_rotary_factor" in self.model_fields_set:
            return super().rope
        return self.model_copy(update={"partial_rotary_factor": self.rotary_dim / self.dim_of_head}).rope


#: Sigmoid scores with a selection bias, QK-norm over all heads, partial rotation.
MINIMAX_M2 = Family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    (
        always("qk_norm", "full"),
        groups.PARTIAL_ROTATION,
        always("moe.gate", groups.PLAIN_GATE),
        groups.BATCH_LOSS,
        groups.EXPERT_SIZE,
        groups.JITTER,
        Row("num_local_experts", "moe.num_experts", NumLocalExperts, 256),
        constant("scoring_func", Literal["sigmoid"], "sigmoid"),
        Row("qk_norm_type", type=Literal["per_layer"], default="per_layer"),
    ),
    ATTENTION | EXPERTS | {"moe.router.bias": Tensor("block_sparse_moe.e_score_correction_bias")},
    defaults={
        "max_position_embeddings": 196608,
        "num_key_value_heads": 8,
        "rope_theta": 5e6,
        "head_dim": 128,
        "num_experts_per_tok": 8,
    },
    base=MiniMaxM2Config,
    aliases=ALIASES,
)


class PhimoeConfig(OpenConfig):
    """Fields of ``config.json``; the scales of short and of long rows are factors of queries and keys."""

    @property
    def rope(self) -> RopeParameters:
        """Rotary positions. Raises ConfigError for what no published model has: two scales, or another scaling."""
        rope = super().rope
        if rope.rope_type == "default":
            return rope
        if rope.rope_type != "longrope" or rope.short_mscale is None or rope.short_mscale != rope.long_mscale:
            scales = f"short_mscale={rope.short_mscale}, long_mscale={rope.long_mscale}"
            raise ConfigError(f"config.json: {rope.rope_type}, {scales}: must be longrope with two equal scales")
        return rope.model_copy(
            update={"attention_factor": rope.short_mscale, "short_mscale": None, "long_mscale": None}
        )


def _head_bias(file: Any) -> bool:
    if file.lm_head_bias and file.tie_word_embeddings:
        raise ConfigError("config.json: lm_head_bias=true: is read only with tie_word_embeddings=false")
    return file.lm_head_bias


def _scales(model: ModelConfig) -> Any:
    """``rope_scaling`` with the two scales, which are equal here."""
    scaling: Json = write_scaling(model).get("rope_scaling", {})
    factor = scaling.pop("attention_factor", 1.0)
    return scaling | {"short_mscale": factor, "long_mscale": factor} if scaling else ABSENT


def _tolerance(model: ModelConfig) -> float:
    gate = model.moe.gate
    return gate.tolerance if isinstance(gate, SparseMixer) else SparseMixer.tolerance


#: Phi-3.5-MoE: SparseMixer's routing, which chooses two experts whatever the file says, LayerNorm, biases of attention
#: and logits, longrope.
PHIMOE = Family(
    "phimoe",
    "PhimoeForCausalLM",
    (
        always("layer_norm", True),
        Row("lm_head_bias", "logit_bias", bool, False, here=_head_bias),
        groups.ALL_BIASES,
        groups.WINDOW,
        Row("rope_scaling", there=_scales),
        always("moe.gate.name", "sparse_mixer"),
        Row("router_jitter_noise", "moe.gate.tolerance", Fraction, 0.01, there=_tolerance),
        Row("input_jitter_noise", "moe.jitter", Fraction, 0.0),
        groups.EXPERT_SIZE,
        Row("num_local_experts", "moe.num_experts", Experts, 16),
        Row("num_experts_per_tok", type=Annotated[int, pydantic.Field(ge=2, le=2)], default=2),
    ),
    ATTENTION
    | {"attention_norm.bias": "input_layernorm.bias", "ffn_norm.bias": "post_attention_layernorm.bias"}
    | EXPERTS,
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    base=PhimoeConfig,
    outside=lambda _: OUTSIDE | {"final_norm.bias": "model.norm.bias", "unembedding.bias": "lm_head.bias"},
    fused=FUSED_EXPERTS | {"moe.router.kernel": Tensor("mlp.router.weight")},
    aliases=ALIASES,
)
