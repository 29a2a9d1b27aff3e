"""OLMoE: every layer MoE, QK-norm over all heads together."""

from moe.config import ModelConfig
from moe.interop.families.family import ATTENTION, EXPERTS, Family, read_bias, read_gate, selection_rule
from moe.interop.schema import Coefficient, Context, Count, Json, NumExperts, OpenConfig, Positive


class OlmoeConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    max_position_embeddings: Context = 4096
    rms_norm_eps: Positive = 1e-5
    clip_qkv: Positive | None = None  # 0 would make all queries, keys and values zero
    num_experts: NumExperts = 64
    num_experts_per_tok: Count = 8
    router_aux_loss_coef: Coefficient = 0.01


def read(source: OlmoeConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    model = {"qk_norm": "full", "attention_bias": read_bias(source), "clip_qkv": source.clip_qkv or 0.0}
    return model, {"gate": read_gate(source), "num_experts": source.num_experts}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return {
        "intermediate_size": model.moe.d_ff,
        "attention_bias": model.attention_bias == "all",
        "clip_qkv": model.clip_qkv or None,
        "num_experts": model.moe.num_experts,
        "norm_topk_prob": selection_rule(model.moe) is True,
    }


FAMILY = Family("olmoe", "OlmoeForCausalLM", OlmoeConfig, read, write, ATTENTION | EXPERTS)
