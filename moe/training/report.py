"""Final report of a run: a table, sampled text and a figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from moe.config import Config, ConfigError
from moe.data import pipeline
from moe.models import sampling
from moe.models.state import TrainState
from moe.system import process
from moe.system.atomic_files import write_atomic, write_figure
from moe.system.escaping import FIGURE_TEXT, terminal
from moe.system.metrics_files import METRICS, TIMING, iterate_rows
from moe.training.metrics import shown_terms
from moe.training.step import Program

_FIRST_DOCUMENTS = 1_000  # documents of a domain that are searched for a prompt
_LISTS = ("fraction_tokens_dropped",)  # that are read of rows before the last step


def finish(
    program: Program,
    state: TrainState,
    prepared: pipeline.Prepared,
    directory: epath.Path,
    first_step: int,
    say: Callable[[str], Any],
) -> None:
    """Write report.txt and training.png from the last evaluation and the final state.

    Args:
        program: of the run.
        state: after the last step.
        prepared: data of the run.
        directory: the workdir.
        first_step: step at which this process began or resumed the run.
        say: prints.

    Raises:
        ConfigError: the rows of the last evaluation are missing from the metrics file.
    """
    config = program.config
    rows = [_shown(row, config.train.num_steps) for row in iterate_rows(directory / METRICS)]
    final = [row for row in rows if row["step"] == config.train.num_steps and row["kind"].startswith("heldout/")]
    if not final:
        raise ConfigError(f"{directory / METRICS}: the last evaluation, which the report shows, is missing; restore it")
    results = {row["kind"].removeprefix("heldout/"): row for row in final}
    unigram = {domain: pipeline.unigram_nll(prepared, config.data, domain) for domain in prepared.domains}
    try:
        unigram = unigram_over_all(results, unigram)
        losses = table(results, unigram, [row for row in rows if row["kind"] == "train"])
        figure(directory / "training.png", rows, unigram)
    except LookupError as error:
        raise ConfigError(
            f"{directory / METRICS}: its rows lack {error}, which the report shows; restore it"
        ) from error
    sample = ""
    if config.train.sample_tokens and jax.process_count() == 1:
        sample = f"\n\n{_sampled(program, state, prepared)}"
    losses, sample = terminal(losses), terminal(sample)  # they name domains, and quote documents and the model
    write_atomic(directory / "report.txt", f"{losses}{sample}\n")
    say(f"\n{losses}\n\n{_spent(directory, first_step)}In {directory}: {', '.join(_files(directory))}{sample}")
    say(f"\nThe picture: {directory / 'training.png'}")


def _files(directory: epath.Path) -> list[str]:
    """Names of what the end of a run points to."""
    events = ["tensorboard/"] if (directory / "tensorboard").exists() else []
    return ["report.txt", "training.png", METRICS, *events, "checkpoints/"]


def _spent(directory: epath.Path, first_step: int) -> str:
    """Sentence on what the time of this process went to; "" where no step was timed."""
    rows = (row for row in iterate_rows(directory / TIMING) if row["kind"] == "timing")
    timed = [row for row in rows if row["step"] > first_step]
    if len(timed) < 2:
        return ""
    each = float(np.median([row["step_seconds"] for row in timed[1:]]))  # the first row may count the compilation
    steps = timed[-1]["step"] - first_step
    return (
        f"{process.seconds_running():.0f} s since the start of this program; a step takes {each:.2f} s, so that "
        f"{steps} steps take {each * steps:.0f} s, and the rest went to preparing the data, compiling, evaluations, "
        "checkpoints and this report.\n"
    )


def _shown(row: dict[str, Any], last: int) -> dict[str, Any]:
    """A row without the lists that the report does not read: loads of experts, say, before the last step."""
    if row["step"] == last:
        return row
    return {name: value for name, value in row.items() if name in _LISTS or not isinstance(value, list)}


def prompts(config: Config, prepared: pipeline.Prepared) -> dict[str, Any]:
    """Domain → what the report continues of a held-out document (:meth:`moe.config.objectives.Objective.prompt`).

    Each is from the first of :data:`_FIRST_DOCUMENTS` documents that has one; a domain without one is left out. Also
    called at the start of a run, to refuse a run whose report would fail.

    Raises:
        ConfigError: a document is not of the objective's kind, or has a token that the model lacks.
    """
    objective = config.objective
    found: dict[str, Any] = {}
    for domain in prepared.domains:
        texts = itertools.islice(prepared.heldout[domain], _FIRST_DOCUMENTS)
        examples = (objective.prompt(text, config.data, prepared.tokenizer) for text in texts)
        if (first := next((one for one in examples if one is not None), None)) is not None:
            found[domain] = first
    if found:
        sampling.check_tokens(config.model, [objective.prompt_ids(prompt) for prompt in found.values()])
    return found


def _sampled(program: Program, state: TrainState, prepared: pipeline.Prepared) -> str:
    """Continuations of :func:`prompts`."""
    config, tokenizer = program.config, prepared.tokenizer
    objective = config.objective
    if why := sampling.looks_ahead(config.model):
        return f"no text was sampled: {why}"
    examples = prompts(config, prepared)
    if not examples:
        return "no text was sampled: the first held-out documents are too short"
    ids = [objective.prompt_ids(prompt) for prompt in examples.values()]
    options = objective.sampling(config, tokenizer)
    written = sampling.sample(config.model, state.variables, ids, config.train.sample_tokens, options)
    return "\n\n".join(
        f"{objective.title()}, {domain}:\n{objective.show(prompt, ids, tokenizer)}"
        for (domain, prompt), ids in zip(examples.items(), written, strict=True)
    )


def table(results: dict[str, dict[str, Any]], unigram: dict[str, float], train_rows: Sequence[dict[str, Any]]) -> str:
    """Held-out metrics per domain beside the unigram baseline, then the load per expert and layer.

    Args:
        results: domain, or "all" → metrics.
        unigram: domain → nats per token of the unigram model on the same tokens.
        train_rows: rows of kind "train"; the first and the last give the numbers of an objective on answers, and the
            share of assignments dropped in training.
    """
    names = f"{'loss':>8}{'± s.e.':>8}{'perplexity':>12}{'bits/byte':>11}{'unigram loss':>14}{'tokens':>9}"
    lines = [f"{'held-out text':<16}{names}"]
    for domain, m in results.items():
        error = f"{m['standard_error']:.3f}" if "standard_error" in m else "–"
        lines.append(
            f"{domain:<16}{m['loss']:>8.3f}{error:>8}{m['perplexity']:>12.1f}{m['bits_per_byte']:>11.3f}"
            f"{unigram[domain]:>14.3f}{m['targets']:>9d}"
        )
    first_terms, last_terms = shown_terms(train_rows[0]), shown_terms(train_rows[-1])
    if last_terms:
        lines += ["", f"{'training':<24}{'first logged row':>17}{'last':>10}"]
        lines += [f"  {name:<22}{first_terms.get(name, '–'):>17}{value:>10}" for name, value in last_terms.items()]
    overall = results["all"]
    if "expert_load" in overall:
        load = np.asarray(overall["expert_load"])
        width = 6 * min(load.shape[1], 16) + (2 if load.shape[1] > 16 else 0)
        title = f"  share of tokens per expert, %, even = {100 / load.shape[1]:.1f}"
        lines += ["", f"{title:<{width + 15}}   dropped, %: held-out, training (first and last logged row)"]
        first, last = (row["fraction_tokens_dropped"] for row in (train_rows[0], train_rows[-1]))
        for layer, (row, dropped) in enumerate(zip(load, overall["fraction_tokens_dropped"], strict=True)):
            shown = " ".join(f"{100 * share:5.1f}" for share in row[:16]) + (" …" if len(row) > 16 else "")
            training = f"{100 * first[layer]:5.2f} {100 * last[layer]:5.2f}"
            lines.append(f"  MoE layer {layer:<3} {shown}   {100 * dropped:5.2f}  {training}")
    return "\n".join(lines)


def unigram_over_all(results: dict[str, dict[str, Any]], unigram: dict[str, float]) -> dict[str, float]:
    """Add "all", the token-weighted mean over domains."""
    weights = {domain: results[domain]["targets"] for domain in unigram}
    total = sum(weights.values())
    return {"all": sum(unigram[d] * weights[d] for d in unigram) / total, **unigram}


@matplotlib.rc_context(FIGURE_TEXT)
def figure(path: epath.Path, rows: list[dict[str, Any]], unigram: dict[str, float]) -> None:
    """Write a PNG: loss over steps, and the load of every expert at the last evaluation.

    Args:
        unigram: "all" → baseline, drawn as a line.
    """
    train = [row for row in rows if row["kind"] == "train"]
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"].startswith("heldout/"):
            evaluations.setdefault(row["kind"].removeprefix("heldout/"), []).append(row)
    last = evaluations["all"][-1] if evaluations.get("all") else {}
    load = np.asarray(last["expert_load"]) if "expert_load" in last else None
    fig = Figure(figsize=(6 if load is None else 12, 4.2), layout="tight")
    axes = fig.subplots(1, 1 if load is None else 2, squeeze=False)
    loss = axes[0, 0]
    loss.plot([r["step"] for r in train], [r["cross_entropy"] for r in train], color="0.6", label="train")
    for domain, points in evaluations.items():
        style = {"color": "black", "linewidth": 2} if domain == "all" else {"linestyle": "--"}
        steps, values = [r["step"] for r in points], [r["loss"] for r in points]
        loss.plot(steps, values, marker="o", markersize=4, label=f"held-out, {domain}", **style)
    loss.axhline(unigram["all"], color="tab:red", linestyle=":", label="unigram baseline, all")
    loss.set(xlabel="step", ylabel="loss, nats per token", title="Cross-entropy")
    loss.legend()
    if load is not None:
        even = 1 / load.shape[1]
        image = axes[0, 1].imshow(100 * load, cmap="RdBu_r", aspect="auto", vmin=0, vmax=200 * even)
        axes[0, 1].set(
            xlabel="expert",
            ylabel="MoE layer",
            title=f"Share of held-out tokens per expert, % (even = {100 * even:.1f})",
            xticks=range(0, load.shape[1], math.ceil(load.shape[1] / 16)),
            yticks=range(0, load.shape[0], math.ceil(load.shape[0] / 16)),
        )
        if load.size <= 128:
            for (layer, expert), share in np.ndenumerate(load):
                # White text on the two dark ends of the scale.
                color = "white" if abs(share / even - 1) > 0.6 else "black"
                axes[0, 1].text(expert, layer, f"{100 * share:.1f}", ha="center", va="center", color=color, fontsize=8)
        fig.colorbar(image, ax=axes[0, 1])
    write_figure(path, fig, 120)
