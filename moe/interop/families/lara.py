"""Lara 4 Mini: gated DeltaNet, windows and attention without positions in one model."""

from typing import Any, ClassVar

from moe.config import ModelConfig, layer_kinds, pattern
from moe.config.mixers import GatedDelta
from moe.interop.families import groups, qwen
from moe.interop.families.family import ATTENTION, FUSED_EXPERTS, Family, Tensor, shared_expert
from moe.interop.families.rows import Row, always
from moe.interop.schema import NumExperts, Size

_WORDS: dict[str, pattern.Word] = {
    "linear_attention": "delta",
    "sliding_attention": "sliding",
    "full_attention": "attention",
}
#: Kinds of layers of files without ``layer_types``, which repeat.
_PERIOD = ("linear_attention", "sliding_attention", "linear_attention", "full_attention", "sliding_attention")


class _Config(qwen.HybridConfig):
    """Fields of ``config.json``, in which layers have attention, windows or gated DeltaNet."""

    kinds: ClassVar[tuple[str, ...]] = tuple(_WORDS)


def _kinds_here(file: Any) -> list[str]:
    return file.layer_types or [_PERIOD[layer % len(_PERIOD)] for layer in range(file.num_hidden_layers)]


def _kinds_there(model: ModelConfig) -> list[str]:
    linear = [isinstance(kind.mixer, GatedDelta) for kind in layer_kinds(model)]
    others = groups.window_kinds(model)
    return ["linear_attention" if is_linear else kind for is_linear, kind in zip(linear, others, strict=True)]


def _tensors(model: ModelConfig, stack: str) -> dict[str, str | Tensor]:
    """All projections of DeltaNet lie one after the other in one tensor."""
    del stack
    heads, values = model.delta_net.value_heads, model.delta_net.value_heads * model.delta_net.value_dim
    turns = (*qwen.delta_channels(model), values, heads, heads)
    result = {**ATTENTION, **FUSED_EXPERTS, **shared_expert("shared_expert"), **qwen.delta_tensors(model)}
    for part, name in enumerate(("query", "key", "value", "gate", "beta", "decay")):
        result[f"delta_net.{name}"] = Tensor("linear_attn.in_proj.weight", part, turns=turns)
    return result | {"delta_net.norm.scale": "linear_attn.out_norm.weight"}


#: Lara 4 Mini: positions in the layers with windows alone, softmax top-k, an ungated shared expert; its files do not
#: have the hidden size of dense layers.
LARA_MINI = Family(
    "lara_mini",
    "LaraMiniForCausalLM",
    (
        always("qk_norm", "head"),
        groups.ALL_BIASES,
        always("rotated_layers", "sliding"),
        groups.window_size(lambda layer, file: _kinds_here(file)[layer] == "sliding_attention"),
        Row(
            "layer_types",
            "pattern",
            here=lambda file: pattern.write([_WORDS[kind] for kind in _kinds_here(file)]),
            there=_kinds_there,
        ),
        *qwen.DELTA_NET,
        groups.SOFTMAX_GATE,
        Row("num_experts", "moe.num_experts", NumExperts, 128),
        Row("moe_intermediate_size", "moe.d_ff", Size, 512),
        Row("shared_expert_intermediate_size", "moe.shared_d_ff", Size, 512),
    ),
    _tensors,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 512,
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    base=_Config,
    unwritten=("intermediate_size",),
)
