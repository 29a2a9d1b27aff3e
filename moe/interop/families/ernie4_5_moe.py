"""ERNIE-4.5-MoE: softmax scores with a selection bias, renormalised; interleaved rotation, shared experts."""

from typing import Annotated

import pydantic

from moe.config import ModelConfig, sparse_layers
from moe.interop.families.family import (
    ATTENTION,
    DENSE,
    EXPERTS,
    ONE_GROUP,
    Family,
    Tensor,
    read_sparse_layers,
    shared_expert,
)
from moe.interop.schema import Context, Count, Experts, Json, Off, OpenConfig, OptionalCount, Positive, Size, named


class ErnieConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults; biases, which no published model has, are refused."""

    max_position_embeddings: Context = 131072
    num_key_value_heads: Count | None = 4
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 500_000.0
    tie_word_embeddings: bool = True
    num_experts_per_tok: Annotated[Count, named("moe_k", "num_experts_per_tok")] = 6
    moe_num_experts: Annotated[Experts, named("moe_num_experts", "num_experts")] = 64
    moe_num_shared_experts: OptionalCount = 2
    moe_intermediate_size: Size = 1536
    moe_layer_start_index: OptionalCount = 1
    moe_layer_end_index: Annotated[int, pydantic.Field(ge=-1, le=1024)] = -1
    moe_layer_interval: Count = 1
    moe_norm_min: Annotated[float, pydantic.Field(ge=0, le=1e-6)] = 1e-12
    use_bias: Off = False


def read(source: ErnieConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    num_layers, width = source.num_hidden_layers, source.moe_intermediate_size
    last = num_layers - 1 if source.moe_layer_end_index == -1 else min(source.moe_layer_end_index, num_layers - 1)
    moe = {
        "gate": {"name": "deepseek_v3", "score": "softmax", **ONE_GROUP, "scale": 1.0},
        "num_experts": source.moe_num_experts,
        "d_ff": width,
        "shared_d_ff": width * source.moe_num_shared_experts,
    }
    layers = [n for n in range(source.moe_layer_start_index, last + 1) if (n + 1) % source.moe_layer_interval == 0]
    return {"rope_interleaved": True}, moe | {"losses": {"scope": "batch"}} | read_sparse_layers(layers, num_layers)


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    layers = [n for n, sparse in enumerate(sparse_layers(model)) if sparse] or [model.num_layers]
    # The interval counts from layer 0: where the second MoE layer follows at once, it is 1.
    return {
        "moe_num_experts": model.moe.num_experts,
        "moe_num_shared_experts": model.moe.shared_d_ff // model.moe.d_ff,
        "moe_intermediate_size": model.moe.d_ff,
        "moe_layer_start_index": layers[0],
        "moe_layer_end_index": layers[-1],
        "moe_layer_interval": layers[1] - layers[0] if len(layers) > 1 else 1,
        "use_bias": False,
    }


BIAS = {"moe.router.bias": Tensor("mlp.moe_statics.e_score_correction_bias", axes=((), (0,)))}
FAMILY = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    ErnieConfig,
    read,
    write,
    ATTENTION | DENSE | EXPERTS | BIAS | shared_expert("shared_experts"),
    field_names={"num_experts_per_tok": "moe_k"},
    aliases=(("mlp.moe_statics.", "mlp.gate.moe_statics."),),
    skipped={"model.mtp_": "multi-token prediction"},
)
