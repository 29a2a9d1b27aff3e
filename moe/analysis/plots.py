"""Plots of a summary (:func:`moe.analysis.summary.summarise`) as PNGs: load, depth, co-activation and saturation."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from moe.system.atomic_files import write_figure
from moe.system.escaping import FIGURE_TEXT


def plot_all(summary: dict[str, Any], folder: epath.Path) -> list[str]:
    """Write the plots that apply to the summary; return the file names."""
    figures = {"load.png": _load, "depth.png": _depth}
    if summary["experts_per_token"] > 1:
        figures["coactivation.png"] = _coactivation
    if "saturation" in summary:
        figures["saturation.png"] = _saturation
    with matplotlib.rc_context(FIGURE_TEXT):
        for name, draw in figures.items():
            fig = draw(summary)
            write_figure(folder / name, fig, 110)
    return list(figures)


def _sparse_ticks(labels: list[Any]) -> dict[str, Any]:
    """At most 16 ticks."""
    step = math.ceil(len(labels) / 16)
    return {"ticks": range(0, len(labels), step), "labels": [str(label) for label in labels[::step]]}


def _load(summary: dict[str, Any]) -> Any:
    """Heat map of load per domain: layers down, experts across; white is even load."""
    load = np.asarray(summary["load"])  # [L,domains,E]
    size, domains = summary["num_experts"], summary["domains"]
    fig = Figure(figsize=(3.1 * len(domains) + 1.4, 1.6 + 0.32 * min(len(load), 16)), layout="constrained")
    axes = fig.subplots(1, len(domains), squeeze=False, sharey=True)
    image = None
    for ax, domain, shares in zip(axes[0], domains, load.swapaxes(0, 1), strict=True):
        image = ax.imshow(shares * size, cmap="RdBu_r", aspect="auto", vmin=0, vmax=2)
        ax.set(title=domain, xlabel="expert")
        ax.set_xticks(**_sparse_ticks(list(range(size))))
        ax.set_yticks(**_sparse_ticks(summary["layers"]))
    axes[0, 0].set_ylabel("layer")
    assert image is not None
    fig.colorbar(image, ax=axes[0].tolist(), label="load / even", extend="max", pad=0.01, aspect=10)
    return fig


def _depth(summary: dict[str, Any]) -> Any:
    """Repetition and dependence per layer, with their chance values."""
    layers = summary["layers"]
    repetition = summary["repetition"]
    dependence = summary["dependence"]
    fig = Figure(figsize=(4.4 * (len(repetition) + 2), 5), layout="constrained")
    axes = fig.subplots(1, len(repetition) + 2)
    for ax, (name, by_domain) in zip(axes, repetition.items(), strict=False):
        for number, (domain, rows) in enumerate(by_domain.items()):
            colour = f"C{number}"
            ax.plot(layers, [100 * r["observed"] for r in rows], marker="o", color=colour, label=domain)
            means, stds = (np.array([100 * r[key] for r in rows]) for key in ("shuffled_mean", "shuffled_std"))
            ax.errorbar(layers, means, yerr=2 * stds, color=colour, linestyle=":", linewidth=1, capsize=2)
        uniform = 100 * next(iter(by_domain.values()))[0]["uniform"]
        ax.axhline(uniform, color="black", linestyle="--", linewidth=1, label=f"uniform chance {uniform:.1f}")
        ax.plot([], [], color="0.5", linestyle=":", label="shuffled, ± 2 deviations")
        ax.set(title=f"Same expert as the token before: {name.replace('_', ' ')}", ylabel="% of consecutive tokens")
    for number, (label, rows) in enumerate(dependence.items()):
        colour, shown = f"C{number}", label.replace("_", " ")
        axes[-2].plot(layers, [d["nmi"] for d in rows], marker="o", color=colour, label=shown)
        axes[-2].plot(layers, [d["nmi_null"] for d in rows], color=colour, linestyle=":", linewidth=1)
        axes[-1].plot(layers, [100 * d["explained"] for d in rows], marker="o", color=colour, label=shown)
        for control, linestyle in (("untrained", "--"), ("hash", ":")):
            if control in summary["controls"]:
                explained = [100 * d["explained"] for d in summary["controls"][control]["dependence"][label]]
                axes[-1].plot(layers, explained, color=colour, linestyle=linestyle, linewidth=1)
    axes[-2].plot([], [], color="0.5", linestyle=":", label="permuted labels")
    axes[-1].plot([], [], color="0.5", linestyle="--", label="untrained routers")
    axes[-1].plot([], [], color="0.5", linestyle=":", label="hash of the token")
    axes[-2].set(
        title="First expert and …: mutual information", ylabel="normalised by the mean entropy", ylim=(0, None)
    )
    axes[-1].set(title="First expert's entropy explained by …", ylabel="%, above the null")
    axes[-1].axhline(0, color="black", linewidth=0.8)
    for ax in axes:
        ax.set_xlabel("layer")
        ax.set_xticks(layers[:: math.ceil(len(layers) / 16)])
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return fig


def _coactivation(summary: dict[str, Any]) -> Any:
    """Share of the row expert's tokens that also chose the column expert, without the diagonal."""
    counts = np.asarray(summary["coactivation"], float)
    layers = summary["layers"]
    shown = sorted({0, len(layers) // 2, len(layers) - 1})
    even = 100 * max(summary["mean_experts"] - 1, 0) / max(summary["num_experts"] - 1, 1)
    fig = Figure(figsize=(4.6 * len(shown), 4), layout="constrained")
    axes = fig.subplots(1, len(shown), squeeze=False)
    for ax, layer in zip(axes[0], shown, strict=True):
        own = np.diag(counts[layer])
        share = 100 * counts[layer] / np.maximum(own[:, None], 1)
        np.fill_diagonal(share, np.nan)
        image = ax.imshow(share, cmap="viridis", vmin=0, vmax=max(np.nan_to_num(share).max(), 1e-9))
        ax.set(
            title=f"layer {layers[layer]} (even: {even:.1f} %)",
            xlabel="… that also chose expert",
            ylabel="tokens of expert …",
        )
        ax.set_xticks(**_sparse_ticks(list(range(len(own)))))
        ax.set_yticks(**_sparse_ticks(list(range(len(own)))))
        fig.colorbar(image, ax=ax, label="%", shrink=0.85)
    return fig


def _saturation(summary: dict[str, Any]) -> Any:
    """Share of the final experts that an earlier checkpoint chose too, one line per layer."""
    found, layers = summary["saturation"], summary["layers"]
    colour = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    panels = [("top_1", "first expert")]
    if summary["experts_per_token"] > 1:
        panels.insert(0, ("top_k", f"all K = {summary['mean_experts']:.3g} experts"))
    fig = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
    axes = fig.subplots(1, len(panels), squeeze=False)
    for ax, (name, title) in zip(axes[0], panels, strict=True):
        for i, layer in enumerate(layers):
            label = f"layer {layer}" if len(layers) <= 8 or i in (0, len(layers) - 1) else None
            shares = [100 * row[i] for row in found[name]]
            ax.plot(found["steps"], shares, marker="o", markersize=4, color=colour[i], label=label)
        chance = 100 * found[f"chance_{name}"]
        ax.axhline(chance, color="black", linestyle="--", linewidth=1, label=f"chance {chance:.1f}")
        ax.set(
            title=f"Saturation: {title}", xlabel="step", ylabel="% as at the last step", ylim=(0, 102), xlim=(0, None)
        )
        ax.legend(fontsize=8)
    return fig
