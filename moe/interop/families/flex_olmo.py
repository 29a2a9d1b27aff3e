"""FlexOlmo: OLMoE's layers with norms after attention and experts instead of before."""

from moe.config import ModelConfig
from moe.interop.families import olmoe
from moe.interop.families.family import ATTENTION, EXPERTS, Family
from moe.interop.schema import Count, Json, NumExperts, Positive


class FlexOlmoConfig(olmoe.OlmoeConfig):
    """Fields of ``config.json`` with the library's defaults."""

    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 500_000.0
    num_experts: NumExperts = 7
    num_experts_per_tok: Count = 5


def read(source: FlexOlmoConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    model, moe = olmoe.read(source)
    return model | {"norms": "after", "clip_qkv": 0.0}, moe


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return {name: value for name, value in olmoe.write(model).items() if name != "clip_qkv"}


NORMS = {
    "attention_norm.scale": "post_attention_layernorm.weight",
    "ffn_norm.scale": "post_feedforward_layernorm.weight",
}
FAMILY = Family("flex_olmo", "FlexOlmoForCausalLM", FlexOlmoConfig, read, write, ATTENTION | NORMS | EXPERTS)
