"""A SentencePiece BPE vocabulary for tokenizer.js."""

from __future__ import annotations

from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as schema

from moe.config import ConfigError
from moe.data.json_tokenizer import JsonTokenizer
from moe.data.tokenizer import Tokenizer

_BPE = 2  # of TrainerSpec.ModelType
#: Types of pieces (ModelProto.SentencePiece.Type) as letters: normal, unknown, control, user-defined, byte.
_KINDS = {1: "n", 2: "c", 3: "c", 4: "u", 6: "b"}


def vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """Pieces, a letter for the kind of each, and the id at the beginning of a text.

    Raises:
        ConfigError: tokenizer.js does not compute this tokenizer.
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
