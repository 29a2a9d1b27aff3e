"""Models and tokenizers that the page's JavaScript supports; others are refused with the reason."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as schema

from moe.config import ConfigError, ModelConfig
from moe.data.json_tokenizer import JsonTokenizer
from moe.data.tokenizer import Tokenizer
from moe.routing.gates import GShard, SampledTopK, STMoE, TopK
from moe.routing.interface import Gate, Selecting
from moe.routing.newer_gates import DocumentPools
from moe.system.fields import facts_of

#: Activations of model.js.
_ACTIVATIONS = ("swiglu", "geglu", "reglu", "gelu", "relu")
#: Gates whose rule model.js computes; a subclass may have another.
_GATES = (TopK, GShard, SampledTopK, STMoE, DocumentPools)

_BPE = 2  # of TrainerSpec.ModelType
#: Types of pieces (ModelProto.SentencePiece.Type) as letters: normal, unknown, control, user-defined, byte.
_KINDS = {1: "n", 2: "c", 3: "c", 4: "u", 6: "b"}


def check(model: ModelConfig) -> Selecting:
    """Check that the page can run a model, and return the model's gate.

    Raises:
        ConfigError: model.js does not compute the model; the message names the first field.
    """
    gate: Gate | None = model.moe.gate
    if (
        not isinstance(gate, Selecting)
        or type(gate) not in _GATES
        or gate.kept_groups != gate.groups
        or gate.router != "linear"
        or (gate.biases_logits and gate.bias != "none")
    ):
        raise ConfigError(
            f"model.moe.gate={model.moe.gate_name!r}: the page needs a gate that chooses the top k of all experts' "
            "scores without a noise matrix, such as mixtral"
        )
    if gate.bias == "momentum":
        raise ConfigError("model.moe.gate.bias='momentum': the page supports only none, sign and quantile")
    default = ModelConfig()
    for name in facts_of(ModelConfig, "page"):
        value, computed = (operator.attrgetter(name)(each) for each in (model, default))
        if value != computed:
            raise ConfigError(f"model.{name}={value!r}: the page supports only {computed!r}")
    if model.moe.dispatch != "dropless" and model.moe.group_size:  # without a capacity, groups change nothing
        raise ConfigError(
            f"model.moe.group_size={model.moe.group_size}: the page supports only 0, the text as one group, unless "
            "model.moe.dispatch is dropless"
        )
    if model.activation not in _ACTIVATIONS:
        allowed = ", ".join(_ACTIVATIONS)
        raise ConfigError(f"model.activation={model.activation!r}: the page supports only {allowed}")
    return gate


def rules(gate: Selecting) -> list[dict[str, Any]]:
    """Routing rules of the page: the model's own, then those that its logits permit (:mod:`moe.routing.gates`)."""

    def top_k(score: str, renormalise: bool, scale: float = 1.0, **more: Any) -> dict[str, Any]:
        return {"kind": "topk", "score": score, "renormalise": renormalise, "scale": scale, **more}

    pool = {"pool": gate.pool} if isinstance(gate, DocumentPools) else {}  # share of the experts
    return [
        {"name": f"as trained: {gate.name}", **top_k(gate.score, gate.renormalise, gate.scale, own=True, **pool)},
        {"name": "Mixtral: top-k, softmax of the k logits", **top_k("softmax", True)},
        {"name": "Switch: top-k, softmax of all logits", **top_k("softmax", False)},
        {"name": "DeepSeek-V3: top-k, sigmoids divided by their sum", **top_k("sigmoid", True)},
        {"name": "expert choice: each expert takes its C best tokens", "kind": "choice"},
        {"name": "dense mixture: every expert, by the softmax", "kind": "all"},
        {"name": "hash of the token: no router", "kind": "hash"},
    ]


def vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """Pieces of a SentencePiece BPE vocabulary, a letter for the kind of each, and the id of the beginning of a text.

    Raises:
        ConfigError: tokenizer.js does not support this tokenizer.
    """
    needed = "the page reads SentencePiece BPE with byte fallback and no normalisation, as main.py trains it"
    if isinstance(tokenizer, JsonTokenizer):
        raise ConfigError(f"tokenizer.json: {needed}")
    model: Any = schema.ModelProto.FromString(tokenizer.model_bytes)  # pyright: ignore[reportAttributeAccessIssue]
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = "".join(_KINDS.get(piece.type, "?") for piece in model.pieces)
    merged = np.array([piece.score for piece, kind in zip(model.pieces, kinds, strict=True) if kind == "n"])
    fits = (
        trainer.model_type == _BPE
        and trainer.byte_fallback
        and normalizer.name == "identity"
        and not normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
        and "?" not in kinds
        and bool((np.diff(merged) < 0).all())  # so that ids order the merges
        and tokenizer.bos_id >= 0
    )
    if not fits:
        raise ConfigError(f"tokenizer.model: {needed}")
    return {"pieces": [piece.piece for piece in model.pieces], "kinds": kinds, "bos": tokenizer.bos_id}
