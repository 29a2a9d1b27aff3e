"""Qwen3.5-MoE's text model, alone or beside its vision model: Qwen3-Next's layers, a tensor for each projection."""

from moe.config import ModelConfig
from moe.interop.families import qwen3_next
from moe.interop.families.family import ATTENTION, EXPERTS, Family, Tensor
from moe.interop.families.qwen2_moe import SHARED
from moe.interop.families.qwen3_next_layers import (
    DELTA_NET,
    PREDICTION,
    PREDICTION_PREFIXES,
    Qwen3NextConfig,
    channels,
    convolutions,
    gated_queries,
)
from moe.interop.schema import Count, Json, OptionalCount, OptionalNumExperts, Size


class Qwen35Config(Qwen3NextConfig):
    """Fields of ``config.json`` with the library's defaults."""

    intermediate_size: Size = 512  # not in these files: every layer is MoE
    num_experts: OptionalNumExperts = 256
    num_experts_per_tok: Count = 8
    num_nextn_predict_layers: OptionalCount = 0  # a family writes the field if its own schema names it


def read(source: Qwen35Config) -> tuple[Json, Json]:
    """See :class:`Family`."""
    everywhere = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": None}
    return qwen3_next.read(source.model_copy(update=everywhere))


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    absent = ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
    return {name: value for name, value in qwen3_next.write(model).items() if name not in absent}


def tensors(model: ModelConfig, stack: str) -> dict[str, str | Tensor]:
    """See :class:`Family`."""
    del stack
    together = "linear_attn.in_proj_qkv.weight"
    sizes = channels(model)
    result: dict[str, str | Tensor] = {**ATTENTION, **EXPERTS, **SHARED, **DELTA_NET}
    result |= convolutions(model) | gated_queries(model)
    for part, name in enumerate(("query", "key", "value")):
        result[f"delta_net.{name}"] = Tensor(together, part, turns=sizes)
    named = {"gate": "z", "beta": "b", "decay": "a"}
    return result | {f"delta_net.{name}": f"linear_attn.in_proj_{own}.weight" for name, own in named.items()}


FAMILY = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    Qwen35Config,
    read,
    write,
    tensors,
    field_names={"intermediate_size": None},
    skipped={"mtp.": "multi-token prediction", "model.visual.": "the vision model"},
    prediction=PREDICTION,
    prediction_prefixes=PREDICTION_PREFIXES,
    inside="model.language_model.",
)
