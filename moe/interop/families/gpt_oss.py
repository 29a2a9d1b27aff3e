"""gpt-oss: attention sinks, alternate windows, biases everywhere, clamped SwiGLU, experts in one tensor a layer."""

import pydantic

from moe.config import ModelConfig
from moe.dispatch.ffn import SWIGLU_LIMIT, SWIGLU_SLOPE
from moe.interop.families.family import ATTENTION, Family, Tensor, read_bias, read_windows, write_windows
from moe.interop.schema import (
    Coefficient,
    Context,
    Count,
    Json,
    NumLocalExperts,
    OpenConfig,
    Positive,
    RopeParameters,
    Window,
)

_SCALING = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


class GptOssConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults; the constants of the activation are the published ones."""

    num_key_value_heads: Count | None = 8
    head_dim: Count | None = 64
    max_position_embeddings: Context = 131072
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 150_000.0
    rope_scaling: RopeParameters | None = RopeParameters.model_validate(_SCALING)
    attention_bias: bool = True
    sliding_window: Window = 128
    num_local_experts: NumLocalExperts = 128
    num_experts_per_tok: Count = 4
    router_aux_loss_coef: Coefficient = 0.001
    swiglu_alpha: float = pydantic.Field(SWIGLU_SLOPE, ge=SWIGLU_SLOPE, le=SWIGLU_SLOPE)
    swiglu_limit: float = pydantic.Field(SWIGLU_LIMIT, ge=SWIGLU_LIMIT, le=SWIGLU_LIMIT)


def read(source: GptOssConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    alternate = ["full_attention" if n % 2 else "sliding_attention" for n in range(source.num_hidden_layers)]
    model = {"activation": "swiglu_clamped", "attention_bias": read_bias(source), "attention_sinks": True}
    windows = read_windows(source.sliding_window or 0, source.layer_types or alternate)
    return model | windows, {"gate": "mixtral", "num_experts": source.num_local_experts, "bias": "all"}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    # The library scales positions by default, so a model without scaling must state it.
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta}}
    return (
        ({} if model.rope_scaling.kind != "none" else plain)
        | write_windows(model)
        | {
            "intermediate_size": model.moe.d_ff,
            "attention_bias": model.attention_bias == "all",
            "num_local_experts": model.moe.num_experts,
            "swiglu_alpha": SWIGLU_SLOPE,
            "swiglu_limit": SWIGLU_LIMIT,
        }
    )


EXPERTS = {
    "moe.router.kernel": "mlp.router.weight",
    "moe.router.logit_bias": "mlp.router.bias",
    "moe.experts.gate": Tensor("mlp.experts.gate_up_proj", 0, turns=(1, 1), inputs_first=True),
    "moe.experts.up": Tensor("mlp.experts.gate_up_proj", 1, turns=(1, 1), inputs_first=True),
    "moe.experts.down": Tensor("mlp.experts.down_proj", inputs_first=True),
    "moe.experts.gate_bias": Tensor("mlp.experts.gate_up_proj_bias", 0, turns=(1, 1)),
    "moe.experts.up_bias": Tensor("mlp.experts.gate_up_proj_bias", 1, turns=(1, 1)),
    "moe.experts.down_bias": "mlp.experts.down_proj_bias",
}
TENSORS = ATTENTION | {"attention.sinks": "self_attn.sinks"} | EXPERTS
FAMILY = Family("gpt_oss", "GptOssForCausalLM", GptOssConfig, read, write, TENSORS)
