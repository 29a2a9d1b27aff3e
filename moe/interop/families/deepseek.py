"""DeepSeekMoE (v1): fine-grained and shared experts, leading dense layers. Its code is not part of transformers."""

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic

from moe.config import ModelConfig, sparse_layers
from moe.interop.families import family
from moe.interop.schema import Coefficient, Count, Json, OpenConfig, OptionalCount, Size


class DeepseekConfig(OpenConfig):
    """Fields of ``config.json`` with the defaults of the published code."""

    n_routed_experts: OptionalCount = 0
    n_shared_experts: OptionalCount = 0
    moe_intermediate_size: Size
    first_k_dense_replace: OptionalCount = 0
    moe_layer_freq: Count = 1
    aux_loss_alpha: Coefficient = 0.001
    seq_aux: bool = True
    scoring_func: Literal["softmax"] = "softmax"
    topk_method: Literal["greedy"] = "greedy"
    routed_scaling_factor: Annotated[float, pydantic.Field(ge=1, le=1)] = 1.0
    kv_lora_rank: None = None


def read(source: DeepseekConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    num_layers, width = source.num_hidden_layers, source.moe_intermediate_size
    first, step = source.first_k_dense_replace, source.moe_layer_freq
    chosen = [n for n in range(num_layers) if source.n_routed_experts and n >= first and n % step == 0]
    moe = {
        "gate": family.read_gate(source),
        "num_experts": source.n_routed_experts or 1,  # none, or null: all layers are dense
        "d_ff": width,
        "shared_d_ff": width * source.n_shared_experts,
        "losses": {"scope": "sequence" if source.seq_aux else "batch"},
    }
    return {"attention_bias": family.read_bias(source)}, moe | family.read_sparse_layers(chosen, num_layers)


def _layer_fields(sparse: Sequence[bool]) -> Json:
    """The first MoE layer and the step between them; if no step gives these layers, write_config reports what is
    lost."""
    layers = [n for n, is_sparse in enumerate(sparse) if is_sparse]
    first = layers[0] if layers else len(sparse)
    steps = range(1, len(sparse) + 1)
    step = next((step for step in steps if layers == [n for n in range(first, len(sparse)) if n % step == 0]), 1)
    return {"first_k_dense_replace": first, "moe_layer_freq": step}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    moe, sparse = model.moe, sparse_layers(model)
    return {
        "attention_bias": model.attention_bias == "all",
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_d_ff // moe.d_ff or None,
        "moe_intermediate_size": moe.d_ff,
        "norm_topk_prob": family.selection_rule(moe) is True,
        "scoring_func": "softmax",
        **_layer_fields(sparse),
        "seq_aux": moe.losses.scope == "sequence",
    }


FAMILY = family.Family(
    "deepseek",
    "DeepseekForCausalLM",
    DeepseekConfig,
    read,
    write,
    family.ATTENTION | family.DENSE | family.EXPERTS | family.shared_expert("shared_experts"),
    balance_field="aux_loss_alpha",
    balance_scale="per layer",
)
