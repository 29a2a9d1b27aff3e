"""GLM-4.7-Flash: DeepSeek-V3's latent attention and routing, MoE layers listed one by one."""

from typing import Literal

import pydantic

from moe.config import ModelConfig, sparse_layers
from moe.interop.families.deepseek_layers import (
    TENSORS,
    LatentConfig,
    read_latent_attention,
    write_fields,
)
from moe.interop.families.family import (
    SELECTION_BIAS,
    Family,
    gate_field,
    read_experts,
    read_sigmoid_gate,
    read_sparse_layers,
)
from moe.interop.schema import Context, Count, Json, OptionalCount, Positive


class Glm4MoeLiteConfig(LatentConfig):
    """Fields of ``config.json`` with the library's defaults; multi-token prediction is skipped."""

    max_position_embeddings: Context = 202752
    rms_norm_eps: Positive = 1e-5
    q_lora_rank: OptionalCount | None = 768
    n_shared_experts: OptionalCount = 1
    first_k_dense_replace: OptionalCount = 1
    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None
    num_experts_per_tok: Count = 4
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.8
    rope_interleave: bool = True
    num_nextn_predict_layers: OptionalCount = 1

    @pydantic.model_validator(mode="after")
    def _check_kinds(self) -> "Glm4MoeLiteConfig":
        if self.mlp_layer_types is not None and len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(f"mlp_layer_types has {len(self.mlp_layer_types)} entries, not {self.num_hidden_layers}")
        return self


def read(source: Glm4MoeLiteConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    num_layers, kinds = source.num_hidden_layers, source.mlp_layer_types
    moe = read_sigmoid_gate(source) | read_experts(source)
    if kinds is not None:
        layers = [n for n, kind in enumerate(kinds) if kind == "sparse"]
        moe = {name: value for name, value in moe.items() if name != "layers"} | read_sparse_layers(layers, num_layers)
    return read_latent_attention(source, source.rope_interleave), moe


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    fields = write_fields(model)
    del fields["first_k_dense_replace"]
    return fields | {
        "topk_method": "noaux_tc",
        "norm_topk_prob": gate_field(model.moe, "renormalise"),
        "rope_interleave": model.rope_interleaved,
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in sparse_layers(model)],
    }


FAMILY = Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", Glm4MoeLiteConfig, read, write, TENSORS | SELECTION_BIAS)
