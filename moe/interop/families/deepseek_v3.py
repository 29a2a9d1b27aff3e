"""DeepSeek-V3: latent attention, sigmoid scores, a bias for the selection, groups by their two best experts."""

from typing import Any, Literal

import pydantic

from moe.config import ModelConfig
from moe.interop.families.deepseek_layers import (
    TENSORS,
    LatentConfig,
    read_latent_attention,
    write_fields,
)
from moe.interop.families.family import SELECTION_BIAS, Family, gate_field, read_experts, read_sigmoid_gate
from moe.interop.schema import Coefficient, Context, Count, Json, OptionalCount, Positive


class DeepseekV3Config(LatentConfig):
    """Fields of ``config.json`` with the library's defaults; multi-token prediction is skipped."""

    max_position_embeddings: Context = 4096
    q_lora_rank: OptionalCount | None = 1536
    n_shared_experts: OptionalCount = 1
    first_k_dense_replace: OptionalCount = 3
    n_group: Count = 8
    topk_group: Count = 4
    num_experts_per_tok: Count = 8
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    scoring_func: Literal["sigmoid"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 2.5
    rope_interleave: bool = True
    aux_loss_alpha: Coefficient = 0.0001
    num_nextn_predict_layers: OptionalCount = 1

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read_null_as_false(cls, tree: Any) -> Any:
        """Read a null of these two fields as the library does: as false, not as their default."""
        if not isinstance(tree, dict):
            return tree
        null = {name for name in ("norm_topk_prob", "rope_interleave") if name in tree and tree[name] is None}
        return tree | dict.fromkeys(null, False)


def read(source: DeepseekV3Config) -> tuple[Json, Json]:
    """See :class:`Family`."""
    return read_latent_attention(source, source.rope_interleave), read_sigmoid_gate(source) | read_experts(source)


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return write_fields(model) | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": gate_field(model.moe, "renormalise"),
        "rope_interleave": model.rope_interleaved,
    }


FAMILY = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    DeepseekV3Config,
    read,
    write,
    TENSORS | SELECTION_BIAS,
    balance_field="aux_loss_alpha",
    balance_scale="per layer",
)
