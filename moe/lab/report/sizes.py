"""The page of sizes: each contrast's slope in log N over the suites size_32 to size_96, predictions for size_128."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe.lab import inference, trend
from moe.lab.report.elsewhere import effects
from moe.lab.table import Table
from moe.system.atomic_files import write_atomic
from moe.system.escaping import markdown_page, markdown_table, markdown_text

NAME = "sizes"
#: Suites from which the slopes are fitted, and the one that they predict.
FITTED = ("size_32", "size_48", "size_64", "size_96")
PREDICTED = "size_128"
#: Contrasts: label → value, as in claims.toml.
CONTRASTS = {
    "loss, Mixtral's arm − Switch's": "loss[mixtral] - loss[switch]",
    "loss, Switch's arm − dense": "loss[switch] - loss[dense]",
    "loss, Mixtral's arm − dense": "loss[mixtral] - loss[dense]",
}
_TEXT = """\
Each contrast at its width's own length, 32 tokens for each active parameter, and the slope of a least-squares line in
ln N over all runs, N being the dense model's active parameters. A registered prediction is a claim of the suite
`{predicted}`: the contrast less its predicted value is within the half-width of the prediction's interval."""


def write_page(directory: Path, tables: Mapping[str, Table]) -> None:
    """Write sizes.md, if at least two of the fitted sizes have runs."""
    rows, predictions = [], []
    for what, value in CONTRASTS.items():
        by_suite = {name: effects(tables.get(name), value) for name in FITTED}
        fitted = {_parameters(tables[name]): found for name, found in by_suite.items() if found}
        if len(fitted) < 2 or sum(map(len, fitted.values())) < 3:
            continue
        line = trend.fit(fitted)
        cells = [str(inference.effect(found)) if found else "–" for found in by_suite.values()]
        low, high = line.slope - line.half_width, line.slope + line.half_width
        rows.append((markdown_text(what), *cells, f"{line.slope:+.4f} [{low:+.4f}, {high:+.4f}], n = {line.n}"))
        if (target := tables.get(PREDICTED)) is not None:
            mean, half = line.predict(_parameters(target), len(target.suite.registered_seeds))
            own = effects(target, value)
            predictions.append((
                markdown_text(what),
                f"{mean:+.4f} ± {half:.4f}",
                f"`{value} {'-' if mean >= 0 else '+'} {abs(mean):.4f}`, within {half:.4f}",
                str(inference.effect(own)) if own else "–",
                _score(mean, half, own),
            ))  # fmt: skip
    if not rows:
        return
    text = ["# Sizes", _TEXT.replace("\n", " ").format(predicted=PREDICTED)]
    text.append(markdown_table(("contrast, nats per token", *FITTED, "slope in ln N [95 %]"), rows))
    if predictions:
        header = ("contrast", f"predicted for {PREDICTED}", "as a claim", "measured [95 %]", "score")
        text += [f"## Prediction for {PREDICTED}", markdown_table(header, predictions)]
    write_atomic(directory / f"{NAME}.md", markdown_page("\n\n".join(text) + "\n"))


def _parameters(table: Table) -> float:
    """Active parameters of a suite's dense arm."""
    return table.suite.costs("dense")["active_parameters"]


def _score(mean: float, half: float, measured: list[float]) -> str:
    if not measured:
        return "–"
    error = sum(measured) / len(measured) - mean
    return f"off by {error:+.4f}, {'inside' if abs(error) <= half else 'outside'} the interval"
