"""Granite-MoE: every layer MoE, factors of embeddings, attention, residuals and logits, experts in two tensors."""

from moe.config import ModelConfig
from moe.interop.families.family import ATTENTION, Family, Tensor, read_bias
from moe.interop.schema import Experts, Json, OpenConfig, Positive


class GraniteConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    num_local_experts: Experts = 8
    embedding_multiplier: Positive = 1.0
    residual_multiplier: Positive = 1.0
    attention_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0


def read(source: GraniteConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    usual = source.dim_of_head**-0.5
    model = {
        "embedding_scale": source.embedding_multiplier,
        "residual_scale": source.residual_multiplier,
        "attention_scale": 0.0 if source.attention_multiplier == usual else source.attention_multiplier,
        "logit_scale": 1 / source.logits_scaling,
        "attention_bias": read_bias(source),
    }
    return model, {"gate": "mixtral", "num_experts": source.num_local_experts}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return {
        "intermediate_size": model.moe.d_ff,
        "num_local_experts": model.moe.num_experts,
        "embedding_multiplier": model.embedding_scale,
        "residual_multiplier": model.residual_scale,
        "attention_multiplier": model.attention_scale or model.head_dim**-0.5,
        "logits_scaling": _reciprocal(model.logit_scale),
        "attention_bias": model.attention_bias == "all",
    }


def _reciprocal(scale: float) -> float:
    """1/scale, without the digits of rounding where twelve give the scale back."""
    short = round(1 / scale, 12)
    return short if short and 1 / short == scale else 1 / scale


EXPERTS = {
    "moe.router.kernel": "block_sparse_moe.router.layer.weight",
    "moe.experts.gate": Tensor("block_sparse_moe.input_linear.weight", 0, 2),
    "moe.experts.up": Tensor("block_sparse_moe.input_linear.weight", 1, 2),
    "moe.experts.down": Tensor("block_sparse_moe.output_linear.weight"),
}
#: Names in the files, and in the library's memory.
ALIASES = (
    ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
)
TENSORS = ATTENTION | EXPERTS
FAMILY = Family("granitemoe", "GraniteMoeForCausalLM", GraniteConfig, read, write, TENSORS, aliases=ALIASES)
