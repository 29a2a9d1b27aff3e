"""A summary (:func:`moe.analysis.summary.summarise`) as Markdown tables, one row per MoE layer where possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def markdown(summary: dict[str, Any], title: str) -> str:
    """Formats a summary as a document of tables."""
    layers, domains = summary["layers"], summary["domains"]
    k, size = summary["experts_per_token"], summary["num_experts"]
    tokens = ", ".join(f"{domain} {count:,}" for domain, count in zip(domains, summary["tokens"], strict=True))
    lines = [
        f"# {title}",
        "",
        f"{len(layers)} MoE layers of {size} experts, {k} per token; held-out tokens: {tokens}. Layers are numbered "
        f"from 0 in the whole model. Null distributions are of {summary['shuffles']} permutations (seed "
        f"{summary['seed']}), as mean ± standard deviation; p is one-sided, at least 1 / (1 + permutations).",
        "",
        "## With depth",
        "",
        *_depth_table(summary),
        "",
        "Repetition is the mean over domains, with the chance given the load; *explained* is the share of the first "
        "expert's entropy explained by a label, above its null.",
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
    lines += ["", "## Dependence of the first expert on labels", ""]
    lines += [
        "nmi = 2 I / (H(expert) + H(label)). Domains are permuted over rows, other labels over tokens. Token identity: "
        f"tokens with at least {summary['at_least']} occurrences.",
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
        f"{summary.get('documents_without_syntax', 0)} more do not tokenize as Python and were left out.",
        "",
        *_table(header, rows),
    ]


def _saturation_table(summary: dict[str, Any]) -> list[str]:
    found = summary["saturation"]
    lines = []
    for name, meaning in (("top_k", "the final experts"), ("top_1", "tokens' final first expert")):
        lines += [
            f"## Saturation: share of {meaning} that an earlier step chose too, % (chance "
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
        # repr shows newlines. A | would end the cell, a backtick the code.
        text = repr(token["piece"])[1:-1].replace("|", "¦").replace("`", "´")
        return f"`{text}` {token['count']}/{token['total']}"

    rows = [
        [layer, expert, " ".join(shown(token) for token in found) or "–"]
        for layer, of_layer in zip(summary["layers"], summary["top_tokens"], strict=True)
        for expert, found in enumerate(of_layer)
    ]
    return _table(["layer", "expert", "tokens: first choices / occurrences"], rows)
