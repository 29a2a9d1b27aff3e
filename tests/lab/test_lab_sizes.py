"""Slopes of contrasts over sizes, and the page of predictions."""

import dataclasses
import math

import pytest

from moe.configs import base as defaults
from moe.lab import trend
from moe.lab.report import sizes
from moe.lab.suite import Variant
from tests.lab_helpers import DENSE, SWITCH, record, suite_of, table, tables


def test_a_line_by_hand():
    """Values 0, 1, 3 at log sizes 0, 1, 2: Sxx = 2, Sxy = 4/3 + 5/3 = 3, residuals 1/6, -1/3, 1/6 with SS 1/6."""
    line = trend.fit({1.0: [0.0], math.e: [1.0], math.e**2: [3.0]})
    assert (line.slope, line.n) == (pytest.approx(1.5), 3)
    # t(0.975, 1) = 12.7062; half-width 12.7062 · √(1/6) / √2
    assert line.half_width == pytest.approx(12.7062 * math.sqrt(1 / 12), rel=1e-5)
    # At log size 3, two new runs: 4/3 + 1.5 · 2, and 12.7062 · √(1/6) · √(1/2 + 1/3 + 2²/2)
    mean, half = line.predict(math.e**3, 2)
    assert mean == pytest.approx(13 / 3)
    assert half == pytest.approx(12.7062 * math.sqrt(1 / 6 * 17 / 6), rel=1e-5)
    with pytest.raises(ValueError, match="1 sizes with 3 runs: a line needs two sizes and three runs"):
        trend.fit({2.0: [0.0, 1.0, 2.0]})


def _size(width, switch, mixtral, seeds):
    """Runs of a width whose dense loss is 5 on every seed, for the suite that is named by it."""
    base = defaults.get_config()
    base.model.d_model = width
    arms = {"dense": DENSE, "switch": SWITCH, "mixtral": Variant({"model.moe.gate": "mixtral"})}
    suite = dataclasses.replace(suite_of(arms, seeds=seeds, base=base, horizons=(20,)), name=f"size_{width}")
    losses = {"dense": [5.0] * len(switch), "switch": switch, "mixtral": mixtral}
    runs = [
        record(arm, seed, loss) for arm, values in losses.items() for seed, loss in zip(seeds, values, strict=False)
    ]
    return table(suite, runs)


def test_the_page_of_sizes_predicts_and_scores(tmp_path):
    seeds = (0, 1, 2)
    found = {
        "size_32": _size(32, (4.9, 4.91, 4.89), (4.88, 4.88, 4.88), seeds),
        "size_96": _size(96, (4.8, 4.81, 4.79), (4.77, 4.77, 4.77), seeds),
        "size_128": _size(128, (), (), seeds),
    }
    sizes.write_page(tmp_path, found)
    text = (tmp_path / "sizes.md").read_text()
    (_, rows), (_, predicted) = tables(text)
    values = {
        found[name].suite.costs("dense")["active_parameters"]: differences
        for name, differences in (("size_32", (-0.1, -0.09, -0.11)), ("size_96", (-0.2, -0.19, -0.21)))
    }
    line = trend.fit(values)
    by_name = {row[0]: row for row in rows}
    assert by_name["loss, Switch's arm − dense"][-1].startswith(f"{line.slope:+.4f} [")
    mean, half = line.predict(found["size_128"].suite.costs("dense")["active_parameters"], 3)
    row = next(row for row in predicted if row[0] == "loss, Switch's arm − dense")
    assert row[1:] == [
        f"{mean:+.4f} ± {half:.4f}",
        f"`loss[switch] - loss[dense] + {-mean:.4f}`, within {half:.4f}",
        "–",
        "–",
    ]
    found["size_128"] = _size(128, (4.0,) * 3, (4.0,) * 3, seeds)
    sizes.write_page(tmp_path, found)
    row = next(
        row for row in tables((tmp_path / "sizes.md").read_text())[1][1] if row[0] == "loss, Switch's arm − dense"
    )
    verdict = "inside" if abs(-1.0 - mean) <= half else "outside"
    assert row[3:] == ["-1.0000 [-1.0000, -1.0000], n = 3", f"off by {-1.0 - mean:+.4f}, {verdict} the interval"]


def test_no_page_of_sizes_without_two_of_them(tmp_path):
    sizes.write_page(tmp_path, {"size_32": _size(32, (4.9, 4.9, 4.9), (4.8, 4.8, 4.8), (0, 1, 2))})
    assert not (tmp_path / "sizes.md").exists()
