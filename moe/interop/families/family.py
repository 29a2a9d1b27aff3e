"""Declaration of a family of open checkpoints, and the names of tensors that several families share."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import pydantic

from moe.config import ModelConfig
from moe.interop.families.rows import Row
from moe.interop.schema import Json, OpenConfig

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
        rows: size of the axes of the tensor that the parameter does not have; it is the first row of them.
        axes: for each axis of the tensor, the axes of the parameter that are flattened into it; empty: [outputs,
            inputs] for a matrix, one axis for a bias, else the parameter's own.
    """

    name: str
    part: int = 0
    parts: int = 1
    turns: tuple[int, ...] = ()
    inputs_first: bool = False
    rows: int = 1
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
        rows: fields of ``config.json`` and the settings that they state, beside those of all families.
        tensors: parameter within a block → its tensor, or that tensor's name if it holds nothing else; or a function
            that returns this for a model and the name of a stack.
        defaults: of fields of ``config.json``, where they are not those of the rows or of all families.
        base: schema with further checks of fields, or other names of those that all families have.
        balance_field: name of the load-balancing coefficient.
        balance_scale: normalisation of its loss, see :data:`BalanceScale`.
        block: prefix of a block's tensors, with the number of the layer and the name of the stack.
        outside: parameter outside the blocks of a model → its tensor.
        unwritten: fields of all families that this one does not write.
        fused: tensors of the experts where a layer's lie together, in families that also allow three for each expert.
        copies: copy → original, for tensors that a file may also hold and that must equal the original.
        unread: tensors to ignore.
        skipped: prefixes of tensors to ignore with a warning, or patterns of their names, and what they are.
        prediction: parameter of multi-token prediction outside its block → its tensor, under the prefix of the block.
        prediction_prefixes: prefixes of these tensors and of the block's, in families whose files have a single
            prediction layer, without a number.
        inside: prefix of tensors within a larger model → that prefix in files of the text model alone.
        aliases: groups of prefixes of a block's tensors that mean the same; a file may have any of a group.
        library: the same family with other names of tensors, read where a file has that one's embeddings.
        ties_by_file: embeddings are tied where the file has no other output matrix, whatever ``config.json`` says.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    tensors: Mapping[str, str | Tensor] | Callable[[ModelConfig, str], Mapping[str, str | Tensor]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: type[OpenConfig] = OpenConfig
    balance_field: str = "router_aux_loss_coef"
    balance_scale: BalanceScale = "all layers together"
    block: str = "model.layers.{layer}."
    outside: Callable[[ModelConfig], Mapping[str, str]] = lambda _: OUTSIDE
    unwritten: tuple[str, ...] = ()
    fused: Mapping[str, str | Tensor] = dataclasses.field(default_factory=lambda: FUSED_EXPERTS)
    copies: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {OUTSIDE["unembedding.kernel"]: OUTSIDE["embedding.table"]}
    )
    unread: tuple[str, ...] = ()
    skipped: Mapping[str | re.Pattern[str], str] = dataclasses.field(default_factory=dict)
    prediction: Mapping[str, str] = dataclasses.field(default_factory=lambda: PREDICTION_TENSORS)
    prediction_prefixes: tuple[str, ...] = ()
    inside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[tuple[str, ...], ...] = ()
    library: Family | None = None
    ties_by_file: bool = False

    def renamed(
        self, model_type: str, architecture: str, *rows: Row, without: tuple[str, ...] = (), **defaults: Any
    ) -> Family:
        """The same family under another name.

        Args:
            model_type: see :class:`Family`.
            architecture: see :class:`Family`.
            rows: further rows; their types replace those of the same fields.
            without: fields that the other family does not have.
            defaults: of fields, where they differ.
        """
        kept = tuple(row for row in self.rows if row.theirs not in without)
        changed = {name: value for name, value in self.defaults.items() if name not in without} | defaults
        changes: dict[str, Any] = {"model_type": model_type, "architecture": architecture}
        return dataclasses.replace(self, **changes, rows=kept + rows, defaults=changed)

    @functools.cached_property
    def schema(self) -> type[OpenConfig]:
        """Fields of ``config.json`` that are read; of two rows with a type for one field the later one counts."""
        fields: dict[str, Any] = {row.theirs: (row.type, row.default) for row in self.rows if row.type is not None}
        shared = typing.get_type_hints(self.base, include_extras=True)
        for name, default in self.defaults.items():
            type_ = fields[name][0] if name in fields else shared[name]
            fields[name] = (type_, default)
        return pydantic.create_model(f"{self.model_type} config", __base__=self.base, **fields)

    def as_stored(self, model: ModelConfig, names: Collection[str]) -> Family:
        """The family with the names of tensors that a file has."""
        other = self.library
        return other if other and other.outside(model)["embedding.table"] in names else self

    def name(self, field: str) -> str:
        """Name in files of a field of the schema: of several names the first one."""
        alias = self.schema.model_fields[field].validation_alias if field in self.schema.model_fields else None
        return str(alias.choices[0]) if isinstance(alias, pydantic.AliasChoices) else field

    def read(self, source: OpenConfig) -> Json:
        """Settings by their paths below ``model.``, without K and the balance weight, which are read for all families.

        A model none of whose layers is MoE has no gate.
        """
        settings: Json = {}
        for row in self.rows:
            settings |= row.read(source)
        if settings.get("moe.layers") == ():
            dense = {path: value for path, value in settings.items() if not path.startswith(("moe.gate", "moe.layers"))}
            return dense | {"moe.gate": "none"}
        return settings

    def write(self, model: ModelConfig) -> Json:
        """Fields of ``config.json`` that the rows state."""
        fields: Json = {}
        for row in self.rows:
            fields |= row.write(model)
        return fields


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
DENSE = {"dense.gate": "mlp.gate_proj.weight", "dense.up": "mlp.up_proj.weight", "dense.down": "mlp.down_proj.weight"}
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
PREDICTION_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
#: Parameters outside the blocks, the same in every family.
OUTSIDE = {
    "embedding.table": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "unembedding.kernel": "lm_head.weight",
}


def shared_expert(name: str) -> dict[str, str]:
    """Tensor names of the expert that every token visits, under ``mlp.NAME``."""
    return {f"moe.shared.dense.{matrix}": f"mlp.{name}.{matrix}_proj.weight" for matrix in ("gate", "up", "down")}
