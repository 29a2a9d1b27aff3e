"""All routing measures of a checkpoint as a tree of plain numbers, ready for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe.analysis import measures
from moe.analysis.documents import Document, document_batches
from moe.analysis.record import Records
from moe.analysis.specialisation import AT_LEAST, specialise
from moe.analysis.syntax import CLASSES, NONE, token_classes
from moe.data.sentinels import decode_blanks
from moe.data.tokenizer import Tokenizer
from moe.routing.balancing import max_violation

_TOP_TOKENS = 8  # tokens listed per expert


def code_batches(
    documents: Sequence[Document], sequence_length: int, batch_size: int, *, keep: int = 0
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Return batches of the Python documents with the mark ``syntax``, and the number of documents that are not Python.

    ``keep``: see :func:`moe.analysis.documents.document_batches`.
    """
    classes = [(document, token_classes(document)) for document in documents]
    valid = [(document, found) for document, found in classes if found is not None]
    if not valid:
        return [], len(documents)
    kept, found = zip(*valid, strict=True)
    return document_batches(kept, {"syntax": found}, sequence_length, batch_size, keep), len(documents) - len(kept)


def summarise(
    records: Records,
    code: Records | None,
    piece: Callable[[int], str],
    *,
    shuffles: int,
    seed: int,
    controls: Mapping[str, tuple[Records, Records | None]] | None = None,
) -> dict[str, Any]:
    """Compute every measure per layer.

    Args:
        records: records of rows per domain.
        code: records of whole Python documents with the mark ``syntax``, or None.
        piece: token id → its text.
        shuffles: permutations per null distribution.
        seed: seed of all permutations.
        controls: name → records and code of a control (:mod:`moe.analysis.controls`).

    Returns:
        layers, domains, num_experts, experts_per_token (columns of the records), mean_experts (chosen per token),
        tokens (per domain), shuffles, seed, at_least;
        load [L][domain][E], max_violation [L][domain], router_entropy [L];
        repetition: "first" and, with K ≥ 2, "first_or_second" → domain → [L]
        :class:`moe.analysis.repetition.Repetition` and :class:`moe.analysis.repetition.TokenNull`;
        dependence: with two or more domains "domain", and "domain_matched" and "lexical_matched" (as many labels, on
        the same tokens); "token", "syntax" and "token_in_code" → [L]
        :class:`moe.analysis.dependence.Dependence` with nmi, nmi_null, nmi_null_std, nmi_debiased and explained;
        controls: name → repetition and dependence;
        syntax_classes, code_tokens, code_documents, syntax_load [L][class][E] share of first choices;
        coactivation [L][E][E] counts; top_tokens [L][E] of piece, count, total, lift. All as plain lists and dicts.
    """
    rng = np.random.default_rng(seed)
    size, domains = records.num_experts, records.domains
    load = measures.expert_load(records.expert_index, records.chosen, records.domain, len(domains), size)
    summary: dict[str, Any] = {
        "layers": list(records.layers),
        "domains": list(domains),
        "num_experts": size,
        "experts_per_token": records.expert_index.shape[-1],
        "mean_experts": float(records.chosen.sum(-1).mean()),
        "tokens": np.bincount(records.domain, minlength=len(domains)).tolist(),
        "shuffles": shuffles,
        "seed": seed,
        "at_least": AT_LEAST,
        "load": load.tolist(),
        "max_violation": max_violation(load).tolist(),
        "router_entropy": measures.mean_entropy(records.router_probs).tolist(),
        **specialise(records, code, piece, shuffles, rng),
        "controls": {
            name: specialise(*of_control, piece, shuffles, rng) for name, of_control in (controls or {}).items()
        },
        "coactivation": measures.coactivation(records.expert_index, records.chosen, size).tolist(),
        "top_tokens": [
            [
                [{"piece": piece(t.token), **dataclasses.asdict(t)} for t in of_expert]
                for of_expert in measures.top_tokens(first, records.tokens, size, at_least=AT_LEAST, number=_TOP_TOKENS)
            ]
            for first in records.first_choice
        ],
    }
    if code is not None:
        code = code.select(code.marks["syntax"] != NONE)
        first, everything = code.expert_index[..., :1], np.ones_like(code.expert_index[..., :1], bool)
        shares = measures.expert_load(first, everything, code.marks["syntax"], len(CLASSES), size)
        summary |= {"syntax_classes": list(CLASSES), "syntax_load": shares.tolist()}
        summary |= {"code_tokens": len(code.tokens), "code_documents": len(np.unique(code.marks["document"]))}
    return summary


def saturation(earlier: Mapping[int, Records], final: Records, untrained: Records | None = None) -> dict[str, Any]:
    """Compute router saturation of the same tokens over checkpoints.

    Args:
        earlier: step → records, in order.
        final: records of the last checkpoint.
        untrained: records of the final model with untrained routers.

    Returns:
        steps; top_k and top_1: [steps][L]; chance_top_k = K/E (K: mean assignments per token) and chance_top_1 = 1/E;
        excess_top_k and excess_top_1: [steps][L] (share − chance) / (1 − chance), 0 by chance and 1 for equal routing,
        where chance is that of as many experts as the earlier router chose, which may be more or fewer (ReMoE);
        untrained_top_k and untrained_top_1 [L]: the same share for the untrained routers.
    """
    size = final.num_experts

    def members(records: Records, choices: int | None) -> np.ndarray:
        return measures.membership(records.expert_index[..., :choices], records.chosen[..., :choices], size)

    result: dict[str, Any] = {"steps": list(earlier)}
    chances = {"top_k": float(final.chosen.sum(-1).mean() / size), "top_1": 1 / size}
    for name, choices in (("top_k", None), ("top_1", 1)):
        last = members(final, choices)
        shares = np.array([measures.saturation(members(r, choices), last) for r in earlier.values()])
        chance = np.array([r.chosen[..., :choices].sum(-1).mean() / size for r in earlier.values()])[:, None]
        excess = (shares - chance) / np.maximum(1 - chance, 1e-9)
        result |= {name: shares.tolist(), f"chance_{name}": chances[name], f"excess_{name}": excess.tolist()}
        if untrained is not None:
            result[f"untrained_{name}"] = measures.saturation(members(untrained, choices), last).tolist()
    return result


def load_over_training(by_step: Mapping[int, Records]) -> dict[str, Any]:
    """Share of all assignments per expert at several checkpoints: steps, and load [steps][L][E]."""

    def load(records: Records) -> np.ndarray:
        everything = np.zeros_like(records.domain)
        return measures.expert_load(records.expert_index, records.chosen, everything, 1, records.num_experts)[:, 0]

    return {"steps": list(by_step), "load": [load(records).tolist() for records in by_step.values()]}


def piece_of(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return token id → its text with leading space; «id» for control tokens and single bytes, sentinels by name."""

    def piece(token: int) -> str:
        if token >= tokenizer.vocab_size:
            return decode_blanks(tokenizer, [token]) or f"«{token}»"
        size = int(tokenizer.token_bytes[token])
        # Decode it twice: some tokenizers drop a space at the beginning of a text.
        text = tokenizer.decode([token, token]).encode()[-size:].decode(errors="replace") if size else ""
        return f"«{token}»" if not text or "\N{REPLACEMENT CHARACTER}" in text else text

    return piece
