"""All measures of a checkpoint in one tree of plain numbers, and that tree as tables.

In: :class:`moe.analysis.record.Records` of held-out rows per domain and, if there is Python among them, of whole
Python documents. Out: a dict ready for JSON, and Markdown.

Letters: L MoE layers, n tokens, K choices, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe.analysis import measures
from moe.analysis.documents import Document, document_batches
from moe.analysis.record import Records
from moe.analysis.syntax import CLASSES, NONE, token_classes
from moe.data.tokenizer import Tokenizer
from moe.routing.balancing import max_violation

#: Tokens that occur less often than this are in no statistic of token identity.
AT_LEAST = 20
_TOP = 8  # tokens listed per expert


def code_batches(
    documents: Sequence[Document], sequence_length: int, batch_size: int, *, keep: int = 0
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Batches of those documents that are Python, with the mark ``syntax``; and how many documents are not.

    ``keep`` as in :func:`moe.analysis.documents.document_batches`.
    """
    classes = [(document, token_classes(document)) for document in documents]
    sound = [(document, found) for document, found in classes if found is not None]
    if not sound:
        return [], len(documents)
    kept, found = zip(*sound, strict=True)
    return document_batches(kept, {"syntax": found}, sequence_length, batch_size, keep), len(documents) - len(kept)


def summarise(
    records: Records, code: Records | None, piece: Callable[[int], str], *, shuffles: int, seed: int
) -> dict[str, Any]:
    """Every measure per layer.

    Args:
        records: of rows per domain.
        code: of whole Python documents with the mark ``syntax``, or None.
        piece: token id → its text.
        shuffles: permutations behind every null.
        seed: of all of them.

    Returns:
        layers, domains, num_experts, experts_per_token, tokens (per domain), shuffles, seed, at_least;
        load [L][domain][E], max_violation [L][domain], router_entropy [L];
        repetition: "first" and, with K ≥ 2, "first_or_second" → domain → [L] :class:`moe.analysis.measures.Repetition`;
        dependence: "domain" (over at least two), "token", "syntax" and "token_in_code" → [L]
        :class:`moe.analysis.measures.Dependence` with nmi, nmi_null, nmi_null_std, nmi_debiased and explained;
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
        "tokens": np.bincount(records.domain, minlength=len(domains)).tolist(),
        "shuffles": shuffles,
        "seed": seed,
        "at_least": AT_LEAST,
        "load": load.tolist(),
        "max_violation": max_violation(load).tolist(),
        "router_entropy": measures.mean_entropy(records.router_probs).tolist(),
        "repetition": _repetitions(records, shuffles, rng),
        "dependence": _dependences(records, code, shuffles, rng),
        "coactivation": measures.coactivation(records.expert_index, records.chosen, size).tolist(),
        "top_tokens": [
            [
                [{"piece": piece(t.token), **dataclasses.asdict(t)} for t in of_expert]
                for of_expert in measures.top_tokens(first, records.tokens, size, at_least=AT_LEAST, number=_TOP)
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


def _repetitions(records: Records, shuffles: int, rng: np.random.Generator) -> dict[str, Any]:
    result: dict[str, Any] = {"first": {}}
    if records.expert_index.shape[-1] >= 2:
        result["first_or_second"] = {}
    for number, domain in enumerate(records.domains):
        own = records.select(records.domain == number)
        if len(own.consecutive) == 0:
            continue
        for choices, by_domain in enumerate(result.values(), start=1):
            by_domain[domain] = [
                dataclasses.asdict(
                    measures.repetition(
                        index[:, :choices], own.consecutive, records.num_experts, shuffles=shuffles, rng=rng
                    )
                )
                for index in own.expert_index
            ]
    return result


def _dependences(records: Records, code: Records | None, shuffles: int, rng: np.random.Generator) -> dict[str, Any]:
    def over_layers(of: Records, labels: np.ndarray, units: np.ndarray | None = None) -> list[dict[str, Any]]:
        found = [
            measures.dependence(first, labels, shuffles=shuffles, rng=rng, units=units) for first in of.first_choice
        ]
        derived = ("nmi", "nmi_null", "nmi_null_std", "nmi_debiased", "explained")
        return [dataclasses.asdict(d) | {name: getattr(d, name) for name in derived} for d in found]

    def of_tokens(of: Records) -> list[dict[str, Any]]:
        of = of.select(measures.frequent(of.tokens, AT_LEAST))
        return over_layers(of, of.tokens) if len(of.tokens) else []

    result = {"token": of_tokens(records)}
    if len(records.domains) > 1:
        result = {"domain": over_layers(records, records.domain, units=records.row), **result}
    if code is not None:
        code = code.select(code.marks["syntax"] != NONE)
        result |= {"syntax": over_layers(code, code.marks["syntax"]), "token_in_code": of_tokens(code)}
    return {label: layers for label, layers in result.items() if layers}


def saturation(earlier: Mapping[int, Records], final: Records) -> dict[str, Any]:
    """Of the same tokens at several checkpoints.

    Args:
        earlier: step → records, in order.
        final: of the last checkpoint.

    Returns:
        steps; top_k and top_1: [steps][L]; chance_top_k = K/E (of the choices that are sent) and chance_top_1 = 1/E.
    """
    size = final.num_experts

    def members(records: Records, choices: int | None) -> np.ndarray:
        return measures.membership(records.expert_index[..., :choices], records.chosen[..., :choices], size)

    return {
        "steps": list(earlier),
        "top_k": [measures.saturation(members(r, None), members(final, None)).tolist() for r in earlier.values()],
        "top_1": [measures.saturation(members(r, 1), members(final, 1)).tolist() for r in earlier.values()],
        "chance_top_k": float(final.chosen.sum(-1).mean() / size),
        "chance_top_1": 1 / size,
    }


def piece_of(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Token id → its text, a leading space included; «id» for what is no text by itself (control tokens, bytes)."""

    def piece(token: int) -> str:
        size = int(tokenizer.token_bytes[token])
        # Twice: some tokenizers drop the space at the very beginning of a text.
        text = tokenizer.decode([token, token]).encode()[-size:].decode(errors="replace") if size else ""
        return f"«{token}»" if not text or "\N{REPLACEMENT CHARACTER}" in text else text

    return piece


# --- Tables ----------------------------------------------------------------------------------------------------------
def markdown(summary: dict[str, Any], title: str) -> str:
    """The summary as a document of tables, one row per MoE layer where it can be."""
    layers, domains = summary["layers"], summary["domains"]
    k, size = summary["experts_per_token"], summary["num_experts"]
    tokens = ", ".join(f"{domain} {count:,}" for domain, count in zip(domains, summary["tokens"], strict=True))
    lines = [
        f"# {title}",
        "",
        f"{len(layers)} MoE layers of {size} experts, {k} per token; held-out tokens: {tokens}. Layers are numbered "
        f"from 0 in the whole model. Every null is {summary['shuffles']} permutations (seed {summary['seed']}): "
        "mean ± standard deviation; p is one-sided and cannot be below 1 / (1 + permutations).",
        "",
        "## With depth",
        "",
        *_depth_table(summary),
        "",
        "Repetition is the mean over domains, beside the chance given the load; *explained* is the share of the first "
        "expert's entropy that a label accounts for, above its null.",
    ]
    for name, by_domain in summary["repetition"].items():
        uniform = next(iter(by_domain.values()))[0]["uniform"] if by_domain else float("nan")
        lines += [
            "",
            f"## Consecutive tokens with the same expert: {name.replace('_', ' ')} choice, %",
            "",
            f"Chance if all sets of experts were equally likely: {100 * uniform:.1f}. In brackets: tokens shuffled "
            "within the domain; p.",
            "",
            *_table(
                ["layer", *by_domain],
                [[layer, *(_repetition(rows[i]) for rows in by_domain.values())] for i, layer in enumerate(layers)],
            ),
        ]
    lines += ["", "## What the first expert depends on", ""]
    lines += [
        "nmi = 2 I / (H(expert) + H(label)). Domains are permuted over rows, other labels over tokens. Token identity: "
        f"tokens that occur at least {summary['at_least']} times.",
        "",
        *_table(
            ["label", "layer", "nmi", "null", "nmi − null", "explained", "p", "values", "tokens"],
            [
                [
                    label.replace("_", " "),
                    layer,
                    f"{d['nmi']:.4f}",
                    f"{d['nmi_null']:.4f} ± {d['nmi_null_std']:.4f}",
                    f"{d['nmi_debiased']:.4f}",
                    f"{d['explained']:.4f}",
                    f"{d['p_value']:.3f}",
                    d["values"],
                    f"{d['samples']:,}",
                ]
                for label, rows in summary["dependence"].items()
                for layer, d in zip(layers, rows, strict=True)
            ],
        ),
    ]
    if "syntax_load" in summary:
        lines += ["", *_syntax_table(summary)]
    lines += ["", f"## Load, % of a domain's choices (even: {100 / size:.1f})", "", *_load_table(summary)]
    if "saturation" in summary:
        lines += ["", *_saturation_table(summary)]
    lines += ["", "## Tokens of highest lift per expert", "", *_token_table(summary)]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *(line(row) for row in rows)]


def _repetition(r: dict[str, Any]) -> str:
    observed, mean, std = (100 * r[name] for name in ("observed", "shuffled_mean", "shuffled_std"))
    return f"{observed:.1f} ({mean:.1f} ± {std:.1f}; {r['p_value']:.3f})"


def _depth_table(summary: dict[str, Any]) -> list[str]:
    repetition, dependence = summary["repetition"], summary["dependence"]
    header = ["layer", "router entropy", "MaxVio, all domains' mean"]
    header += [f"repeated, {name.replace('_', ' ')}, %" for name in repetition]
    header += [f"explained by {label.replace('_', ' ')}" for label in dependence]
    rows = []
    for i, layer in enumerate(summary["layers"]):
        row = [layer, f"{summary['router_entropy'][i]:.3f}", f"{np.mean(summary['max_violation'][i]):.2f}"]
        for by_domain in repetition.values():
            observed = np.mean([r[i]["observed"] for r in by_domain.values()])
            chance = np.mean([r[i]["load"] for r in by_domain.values()])
            row.append(f"{100 * observed:.1f} (chance {100 * chance:.1f})")
        rows.append(row + [f"{layers[i]['explained']:.3f}" for layers in dependence.values()])
    return _table(header, rows)


def _load_table(summary: dict[str, Any]) -> list[str]:
    shown = min(summary["num_experts"], 16)
    header = ["layer", "domain", "MaxVio", *range(shown)] + (["…"] if summary["num_experts"] > shown else [])
    rows = []
    for layer, loads, violations in zip(summary["layers"], summary["load"], summary["max_violation"], strict=True):
        for domain, load, violation in zip(summary["domains"], loads, violations, strict=True):
            rows.append([layer, domain, f"{violation:.2f}", *(f"{100 * share:.1f}" for share in load[:shown])])
            rows[-1] += ["…"] if summary["num_experts"] > shown else []
    return _table([str(cell) for cell in header], rows)


def _syntax_table(summary: dict[str, Any]) -> list[str]:
    shown = min(summary["num_experts"], 16)
    header = ["layer", "class", *(str(expert) for expert in range(shown))]
    header += ["…"] if summary["num_experts"] > shown else []
    rows = [
        [layer, name, *(f"{100 * share:.1f}" for share in shares[:shown])] + ["…"] * (len(header) - shown - 2)
        for layer, of_layer in zip(summary["layers"], summary["syntax_load"], strict=True)
        for name, shares in zip(summary["syntax_classes"], of_layer, strict=True)
    ]
    return [
        "## First choices of each syntax class, %",
        "",
        f"{summary['code_tokens']:,} tokens of {summary['code_documents']} documents, each tokenised whole; "
        f"{summary.get('documents_without_syntax', 0)} more are no Python by themselves, and were left out.",
        "",
        *_table(header, rows),
    ]


def _saturation_table(summary: dict[str, Any]) -> list[str]:
    found = summary["saturation"]
    lines = []
    for name, meaning in (("top_k", "the final experts"), ("top_1", "tokens' final first expert")):
        lines += [
            f"## Saturation: share of {meaning} chosen at an earlier step already, % (chance "
            f"{100 * found[f'chance_{name}']:.1f})",
            "",
            *_table(
                ["step", *(f"layer {layer}" for layer in summary["layers"])],
                [
                    [step, *(f"{100 * share:.1f}" for share in shares)]
                    for step, shares in zip(found["steps"], found[name], strict=True)
                ],
            ),
            "",
        ]
    return lines[:-1]


def _token_table(summary: dict[str, Any]) -> list[str]:
    def shown(token: dict[str, Any]) -> str:
        # repr: newlines and blanks can be seen. A | would end the cell, a backtick the code.
        text = repr(token["piece"])[1:-1].replace("|", "¦").replace("`", "´")
        return f"`{text}` {token['count']}/{token['total']}"

    rows = [
        [layer, expert, " ".join(shown(token) for token in found) or "–"]
        for layer, of_layer in zip(summary["layers"], summary["top_tokens"], strict=True)
        for expert, found in enumerate(of_layer)
    ]
    return _table(["layer", "expert", "first choice of … in all its occurrences"], rows)
