"""Base of the families of open checkpoints: what one declares, and what several share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from moe.config import ModelConfig, MoEConfig, layer_kinds, sparse_layers
from moe.interop.schema import Json, OpenConfig
from moe.routing.gates import GShard, TopK

#: Hugging Face computes one loss over all MoE layers, K at perfect balance; DeepSeek's code sums a loss per layer that
#: is 1 at perfect balance; Hugging Face's of Switch is a mean over a stack's layers, 1 at perfect balance.
BalanceScale = Literal["all layers together", "per layer", "per stack"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Place of one parameter of a block in the tensors of a checkpoint.

    Attributes:
        name: what follows ``model.layers.N.``. ``{expert}`` stands for the number of an expert; without it, the
            parameters of all experts are one tensor with a leading axis E.
        part: index of the parameter among the shares of the tensor's outputs.
        parts: number of equal shares, one after the other.
        turns: instead of ``parts``, for interleaved shares: outputs of each share in one turn; turns repeat.
        inputs_first: matrices are [inputs, outputs] instead of [outputs, inputs].
        axes: for each axis of the tensor, the axes of the parameter that are flattened into it; empty: [outputs,
            inputs] for a matrix, one axis for a bias, else the parameter's own.
    """

    name: str
    part: int = 0
    parts: int = 1
    turns: tuple[int, ...] = ()
    inputs_first: bool = False
    axes: tuple[tuple[int, ...], ...] = ()

    @property
    def shared(self) -> bool:
        """Whether several parameters share the tensor."""
        return self.parts > 1 or len(self.turns) > 1


#: Tensors of multi-token prediction, whose layers are numbered after the last layer.
PREDICTION_TENSORS = {
    "prediction.hidden_norm.scale": "hnorm.weight",
    "prediction.embedding_norm.scale": "enorm.weight",
    "prediction.project": "eh_proj.weight",
    "prediction.output_norm.scale": "shared_head.norm.weight",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of open checkpoints.

    Attributes:
        model_type: value of that field in ``config.json``.
        architecture: class name in Hugging Face transformers, for ``architectures``.
        schema: fields of ``config.json`` that are read.
        read: fields → (changes of ModelConfig, sections of ``model.moe``); K and the balance weight are read for all.
        write: the reverse of ``read``.
        tensors: parameter within a block → its tensor, or that tensor's name if it holds nothing else; or a function
            that returns this for a model and the name of a stack.
        balance_field: name of the load-balancing coefficient.
        balance_scale: normalisation of its loss, see :data:`BalanceScale`.
        block: prefix of a block's tensors, with the number of the layer and the name of the stack.
        outside: parameter outside the blocks of a model → its tensor.
        field_names: other names of fields that all families write; None: not written.
        fused: tensors of the experts where a layer's lie together, in families that also allow three for each expert.
        copies: copy → original, for tensors that a file may also hold and that must equal the original.
        unread: tensors to ignore.
        skipped: prefixes of tensors to ignore with a warning, and what they are.
        prediction: parameter of multi-token prediction outside its block → its tensor, under the prefix of the block.
        prediction_prefixes: prefixes of these tensors and of the block's, in families whose files have a single
            prediction layer, without a number.
        inside: prefix of the text model's tensors within a larger model; it is read as ``model.``.
        aliases: groups of prefixes of a block's tensors that mean the same; a file may have any of a group.
        ties_by_file: embeddings are tied where the file has no other output matrix, whatever ``config.json`` says.
    """

    model_type: str
    architecture: str
    schema: type[OpenConfig]
    read: Callable[[Any], tuple[Json, Json]]
    write: Callable[[ModelConfig], Json]
    tensors: Mapping[str, str | Tensor] | Callable[[ModelConfig, str], Mapping[str, str | Tensor]]
    balance_field: str = "router_aux_loss_coef"
    balance_scale: BalanceScale = "all layers together"
    block: str = "model.layers.{layer}."
    outside: Callable[[ModelConfig], Mapping[str, str]] = lambda _: OUTSIDE
    field_names: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, str | Tensor] = dataclasses.field(default_factory=lambda: FUSED_EXPERTS)
    copies: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {OUTSIDE["unembedding.kernel"]: OUTSIDE["embedding.table"]}
    )
    unread: tuple[str, ...] = ()
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prediction: Mapping[str, str] = dataclasses.field(default_factory=lambda: PREDICTION_TENSORS)
    prediction_prefixes: tuple[str, ...] = ()
    inside: str = ""
    aliases: tuple[tuple[str, ...], ...] = ()
    ties_by_file: bool = False


# --- Tensor names ----------------------------------------------------------------------------------------------------
ATTENTION = {
    "attention_norm.scale": "input_layernorm.weight",
    "ffn_norm.scale": "post_attention_layernorm.weight",
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.out": "self_attn.o_proj.weight",
    "attention.query_bias": "self_attn.q_proj.bias",
    "attention.key_bias": "self_attn.k_proj.bias",
    "attention.value_bias": "self_attn.v_proj.bias",
    "attention.out_bias": "self_attn.o_proj.bias",
    "attention.query_norm.scale": "self_attn.q_norm.weight",
    "attention.key_norm.scale": "self_attn.k_norm.weight",
}
DENSE = {
    "dense.gate": "mlp.gate_proj.weight",
    "dense.up": "mlp.up_proj.weight",
    "dense.down": "mlp.down_proj.weight",
}
EXPERTS = {
    "moe.router.kernel": "mlp.gate.weight",
    "moe.experts.gate": "mlp.experts.{expert}.gate_proj.weight",
    "moe.experts.up": "mlp.experts.{expert}.up_proj.weight",
    "moe.experts.down": "mlp.experts.{expert}.down_proj.weight",
}
SELECTION_BIAS = {"moe.router.bias": "mlp.gate.e_score_correction_bias"}
#: Hugging Face transformers' own layout, whatever the family: the matrices of all experts in two tensors, gate first.
FUSED_EXPERTS = {
    "moe.router.kernel": Tensor("mlp.gate.weight"),
    "moe.experts.gate": Tensor("mlp.experts.gate_up_proj", part=0, parts=2),
    "moe.experts.up": Tensor("mlp.experts.gate_up_proj", part=1, parts=2),
    "moe.experts.down": Tensor("mlp.experts.down_proj"),
}
#: Tensors that published files repeat in layers of multi-token prediction → their originals.
PREDICTION_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
#: Parameters outside the blocks, the same in every family.
OUTSIDE = {
    "embedding.table": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "unembedding.kernel": "lm_head.weight",
}


def shared_expert(name: str) -> dict[str, str]:
    """Tensor names of the expert that every token visits, under ``mlp.NAME``."""
    return {f"moe.shared.dense.{matrix}": f"mlp.{name}.{matrix}_proj.weight" for matrix in ("gate", "up", "down")}


# --- Fields ----------------------------------------------------------------------------------------------------------
def read_bias(source: OpenConfig) -> str:
    """``attention_bias`` → model.attention_bias, for families in which it includes the output's bias."""
    return "all" if source.attention_bias else "none"


def read_gate(source: OpenConfig) -> str:
    """``norm_topk_prob`` → the gate with that rule."""
    return "mixtral" if source.norm_topk_prob else "switch"


#: Fields of DeepSeek-V3's gate without groups.
ONE_GROUP = {"groups": 1, "kept_groups": 1, "scores_per_group": 1}


def read_sigmoid_gate(source: Any) -> Json:
    """Changes of MoEConfig for a DeepSeek-V3 gate, from the fields that such families share."""
    gate = {
        "name": "deepseek_v3",
        "groups": source.n_group,
        "kept_groups": source.topk_group,
        "scores_per_group": 2 if source.n_group > 1 else 1,
        "renormalise": source.norm_topk_prob,
        "scale": source.routed_scaling_factor,
    }
    return {"gate": gate}


def read_experts(source: Any) -> Json:
    """Changes of MoEConfig from DeepSeek's fields: dense layers first, then experts of which some are shared."""
    width, num_layers = source.moe_intermediate_size, source.num_hidden_layers
    moe = {"num_experts": source.n_routed_experts, "d_ff": width, "shared_d_ff": width * source.n_shared_experts}
    return moe | read_sparse_layers(list(range(source.first_k_dense_replace, num_layers)), num_layers)


def write_experts(model: ModelConfig) -> Json:
    """The fields of :func:`read_experts`, groups of experts and scale of the weights."""
    moe, sparse = model.moe, sparse_layers(model)
    return {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_d_ff // moe.d_ff,
        "moe_intermediate_size": moe.d_ff,
        "first_k_dense_replace": sparse.index(True) if any(sparse) else model.num_layers,
    } | write_groups(moe)


def gate_field(moe: MoEConfig, name: str) -> Any:
    """A field of a top-k gate; its default for a gate without it."""
    return getattr(moe.gate, name, getattr(TopK(), name))


def write_groups(moe: MoEConfig) -> Json:
    """Groups of experts and scale of the weights, for DeepSeek's gates."""
    return {
        "n_group": gate_field(moe, "groups"),
        "topk_group": gate_field(moe, "kept_groups"),
        "routed_scaling_factor": gate_field(moe, "scale"),
    }


def read_sparse_layers(layers: list[int], num_layers: int) -> Json:
    """Changes of MoEConfig that make exactly these layers MoE."""
    if not layers:
        return {"gate": "none"}
    return {} if len(layers) == num_layers else {"layers": tuple(layers)}


def window_of(model: ModelConfig) -> int:
    """The largest window of all layers; if a family cannot express the others, write_config reports what is lost."""
    return max(kind.window for kind in layer_kinds(model))


def read_windows(window: int, kinds: Sequence[str]) -> Json:
    """Changes of ModelConfig for ``layer_types``: the layers of "sliding_attention" have the window."""
    windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    if not window or not windowed:
        return {}
    return {"sliding_window": window, "sliding_window_layers": () if len(windowed) == len(kinds) else windowed}


def write_windows(model: ModelConfig) -> Json:
    """The reverse of :func:`read_windows`."""
    kinds = ["sliding_attention" if kind.window else "full_attention" for kind in layer_kinds(model)]
    return {"sliding_window": window_of(model) or None, "layer_types": kinds}


def dense_layers(model: ModelConfig) -> list[int]:
    """Numbers of the layers that are not MoE."""
    return [layer for layer, sparse in enumerate(sparse_layers(model)) if not sparse]


def selection_rule(moe: MoEConfig) -> bool | str:
    """``norm_topk_prob``, for softmax top-k; the gate's name if its rule is another."""
    limited = gate_field(moe, "kept_groups") < gate_field(moe, "groups") or gate_field(moe, "scale") != 1.0
    plain = gate_field(moe, "score") == "softmax" and gate_field(moe, "bias") == "none" and not limited
    standard = plain and type(moe.gate) in (TopK, GShard)
    return gate_field(moe, "renormalise") if standard else moe.gate_name
