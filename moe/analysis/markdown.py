"""A summary (:func:`moe.analysis.summary.summarise`) as Markdown tables, one row per MoE layer where possible."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe.analysis.conclusion import conclude, few_values
from moe.system.escaping import markdown_table, markdown_text


def markdown(summary: dict[str, Any], title: str) -> str:
    """Formats a summary as a document of tables."""
    domains = summary["domains"]
    k = f"{summary['mean_experts']:.3g}"
    size = summary["num_experts"]
    tokens = ", ".join(f"{markdown_text(domain)} {n:,}" for domain, n in zip(domains, summary["tokens"], strict=True))
    sections = [
        [
            f"# {markdown_text(title)}",
            "",
            *(f"- {sentence}" for sentence in conclude(summary)),
            "",
            f"{len(summary['layers'])} MoE layers of {size} experts, {k} per token; held-out tokens: {tokens}. Layers "
            f"are numbered from 0 in the whole model. Null distributions are of {summary['shuffles']} permutations "
            f"(seed {summary['seed']}), as mean ± standard deviation; p is one-sided, at least 1 / (1 + permutations).",
        ],
        [
            "## With depth",
            "",
            _depth_table(summary),
            "",
            "Repetition is the mean over domains, with the chance given the load; *explained* is the share of the "
            "first expert's entropy explained by a label, above its null. *matched*: domains and classes of "
            "the tokens' text with the same number of labels, on the same tokens.",
        ],
        _controls_table(summary) if summary["controls"] else [],
        *(_repetition_section(summary, name) for name in summary["repetition"]),
        _dependence_section(summary),
        _syntax_table(summary) if "syntax_load" in summary else _no_syntax(summary),
        [f"## Load, % of a domain's choices (even: {100 / size:.1f})", "", _load_table(summary)],
        _saturation_table(summary) if "saturation" in summary else [],
        ["## Tokens of highest lift per expert", "", _token_table(summary)],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _repetition_section(summary: dict[str, Any], name: str) -> list[str]:
    by_domain = summary["repetition"][name]
    uniform = next(iter(by_domain.values()))[0]["uniform"] if by_domain else float("nan")
    rows = [
        [layer, *(_repetition(of_layers[i]) for of_layers in by_domain.values())]
        for i, layer in enumerate(summary["layers"])
    ]
    return [
        f"## Consecutive tokens with the same expert: {_words(name)} choice, %",
        "",
        f"Chance if all sets of experts were equally likely: {100 * uniform:.1f}. In brackets: tokens shuffled within "
        "the domain, with p; then expert sets exchanged among occurrences of the same token, with p.",
        "",
        markdown_table(["layer", *map(markdown_text, by_domain)], rows),
    ]


def _dependence_section(summary: dict[str, Any]) -> list[str]:
    rows = [
        [
            _words(label),
            layer,
            f"{d['nmi']:.4f}",
            f"{d['nmi_null']:.4f} ± {d['nmi_null_std']:.4f}",
            f"{d['nmi_debiased']:.4f}",
            f"{d['explained']:.4f}",
            f"{d['p_value']:.3f}",
            d["values"],
            f"{d['samples']:,}",
        ]
        for label, of_layers in summary["dependence"].items()
        for layer, d in zip(summary["layers"], of_layers, strict=True)
    ]
    return [
        "## Dependence of the first expert on labels",
        "",
        "nmi = 2 I / (H(expert) + H(label)). The null exchanges whole rows of labels, each from a random "
        f"starting point. Token identity: tokens with at least {summary['at_least']} occurrences. "
        f"{few_values(summary)}".rstrip(),
        "",
        markdown_table(["label", "layer", "nmi", "null", "nmi − null", "explained", "p", "values", "tokens"], rows),
    ]


def _controls_table(summary: dict[str, Any]) -> list[str]:
    """Repetition and dependence of the model, and of the controls."""
    names = ["trained", *summary["controls"]]
    found = [summary, *summary["controls"].values()]
    repeated, labels = list(summary["repetition"]), list(summary["dependence"])

    def repetition(of: dict[str, Any], name: str, i: int) -> str:
        rows = [of_layers[i] for of_layers in of["repetition"][name].values()]
        observed, null = (100 * np.mean([row[key] for row in rows]) for key in ("observed", "token_mean"))
        return f"{observed:.1f} ({null:.1f})"

    def explained(of: dict[str, Any], label: str, i: int) -> str:
        return f"{of['dependence'][label][i]['explained']:.3f}"

    rows = []
    for i, layer in enumerate(summary["layers"]):
        for name, of in zip(names, found, strict=True):
            cells = [repetition(of, choice, i) for choice in repeated]
            rows.append([layer, name, *cells, *(explained(of, label, i) for label in labels)])
    header = [
        "layer",
        "router",
        *(f"repeated, {_words(choice)}, %" for choice in repeated),
        *(f"explained by {_words(label)}" for label in labels),
    ]
    return [
        "## Controls, by depth",
        "",
        "The same measures for the trained model with untrained routers, and for routing by a hash of the token id. In "
        "brackets: expert sets exchanged among occurrences of the same token.",
        "",
        markdown_table(header, rows),
    ]


def _repetition(r: dict[str, Any]) -> str:
    def null(kind: str, p: str) -> str:
        return f"{100 * r[f'{kind}_mean']:.1f} ± {100 * r[f'{kind}_std']:.1f}; {r[p]:.3f}"

    return f"{100 * r['observed']:.1f} ({null('shuffled', 'p_value')}) ({null('token', 'token_p_value')})"


def _depth_table(summary: dict[str, Any]) -> str:
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
    return markdown_table(header, rows)


def _load_table(summary: dict[str, Any]) -> str:
    shown = min(summary["num_experts"], 16)
    header = ["layer", "domain", "MaxVio", *range(shown)] + (["…"] if summary["num_experts"] > shown else [])
    rows = []
    for layer, loads, violations in zip(summary["layers"], summary["load"], summary["max_violation"], strict=True):
        for domain, load, violation in zip(summary["domains"], loads, violations, strict=True):
            rows.append(
                [layer, markdown_text(domain), f"{violation:.2f}", *(f"{100 * share:.1f}" for share in load[:shown])]
            )
            rows[-1] += ["…"] if summary["num_experts"] > shown else []
    return markdown_table([str(cell) for cell in header], rows)


def _no_syntax(summary: dict[str, Any]) -> list[str]:
    return ["## Syntax", "", f"Not measured: {summary['no_syntax']}."] if "no_syntax" in summary else []


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
        markdown_table(header, rows),
    ]


def _saturation_table(summary: dict[str, Any]) -> list[str]:
    found = summary["saturation"]
    lines = []
    for name, meaning in (("top_k", "the final experts"), ("top_1", "tokens' final first expert")):
        rows = [
            [step, *(f"{100 * share:.1f} ({100 * excess:.1f})" for share, excess in zip(*of_step, strict=True))]
            for step, *of_step in zip(found["steps"], found[name], found[f"excess_{name}"], strict=True)
        ]
        if f"untrained_{name}" in found:
            rows.append(["untrained routers", *(f"{100 * share:.1f}" for share in found[f"untrained_{name}"])])
        lines += [
            f"## Saturation: share of {meaning} that an earlier step chose too, %",
            "",
            f"Chance: {100 * found[f'chance_{name}']:.1f}. In brackets: excess over the chance of as many experts as "
            "that step chose, from 0 (chance) to 100 (the same experts).",
            "",
            markdown_table(["step", *(f"layer {layer}" for layer in summary["layers"])], rows),
            "",
        ]
    return lines[:-1]


def _token_table(summary: dict[str, Any]) -> str:
    def shown(token: dict[str, Any]) -> str:
        # repr shows newlines. A | would end the cell, a backtick the code.
        text = repr(token["piece"])[1:-1].replace("|", "¦").replace("`", "´")
        return f"`{text}` {token['count']}/{token['total']}"

    rows = [
        [layer, expert, " ".join(shown(token) for token in found) or "–"]
        for layer, of_layer in zip(summary["layers"], summary["top_tokens"], strict=True)
        for expert, found in enumerate(of_layer)
    ]
    return markdown_table(["layer", "expert", "tokens: first choices / occurrences"], rows)
