"""DeepSeek-V2 and V2-Lite: latent attention, softmax scores, selection limited to groups by their best expert."""

from typing import Annotated, Literal

from moe.config import ModelConfig
from moe.interop.families.deepseek_layers import (
    TENSORS,
    LatentConfig,
    read_latent_attention,
    write_fields,
)
from moe.interop.families.family import Family, gate_field, read_experts
from moe.interop.schema import Coefficient, Count, Json, Off, OptionalCount, Positive, named


class DeepseekV2Config(LatentConfig):
    """Fields of ``config.json``. With ``norm_topk_prob`` the published code and transformers differ: it is refused."""

    n_routed_experts: Annotated[Count, named("n_routed_experts", "num_experts")] = 64
    q_lora_rank: OptionalCount | None = 1536
    n_shared_experts: OptionalCount = 2
    num_experts_per_tok: OptionalCount = 0  # the library has no default
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    scoring_func: Literal["softmax"] = "softmax"
    norm_topk_prob: Off = False
    routed_scaling_factor: Positive = 1.0
    aux_loss_alpha: Coefficient = 0.001
    seq_aux: bool = True


def read(source: DeepseekV2Config) -> tuple[Json, Json]:
    """See :class:`Family`."""
    limited = source.topk_method == "group_limited_greedy"
    gate = {
        "name": "deepseek_moe",
        "groups": source.n_group if limited else 1,
        "kept_groups": source.topk_group if limited else 1,
        "scale": source.routed_scaling_factor,
    }
    moe = {"gate": gate, "losses": {"scope": "sequence" if source.seq_aux else "batch"}}
    return read_latent_attention(source, interleaved=True), moe | read_experts(source)


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return write_fields(model) | {
        "topk_method": "group_limited_greedy" if gate_field(model.moe, "groups") > 1 else "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "seq_aux": model.moe.losses.scope == "sequence",
    }


FAMILY = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    DeepseekV2Config,
    read,
    write,
    TENSORS,
    balance_field="aux_loss_alpha",
    balance_scale="per layer",
)
