"""Sections of a suite's report, against values made by hand."""

import math

import pytest

from moe.lab.records import DIVERGED, PRIMARY
from moe.lab.report import sections
from moe.lab.suite import Comparison, Variant
from tests.lab_helpers import DENSE, SWITCH, record, suite_of, table, tables

NULL = Variant(
    {
        "model.moe.gate": "moe_plus_plus",
        "model.moe.num_experts": 8,
        "model.moe.copy_experts": 8,
        "model.moe.zero_experts": 0,
        "model.moe.constant_experts": 0,
    }
)


def rows_of(text):
    """Cells of the rows of the first table, by the first cell."""
    return {first: cells for first, *cells in tables(text)[0][1]}


@pytest.mark.parametrize(("shares", "compared"), [((0.30, 0.31), True), ((0.30, 0.33), False), ((0.33, 0.30), False)])
def test_arms_are_not_comparable_where_their_dropped_shares_differ(shares, compared):
    """The suite allows a difference of 2 points, whatever the shares themselves are."""
    suite = suite_of({"a": SWITCH, "b": NULL}, seeds=(0,), horizons=(20,))
    dropped = "train_fraction_tokens_dropped"
    runs = [
        record(name, 0, 5.0, rows=[(20, dropped, "", "0", share), (20, "loss", PRIMARY, "", 5.0)])
        for name, share in zip("ab", shares, strict=True)
    ]
    text = sections.comparison_section(table(suite, runs), Comparison("a", ("b",), ("steps",)), "")
    assert ("Not comparable" not in text) == compared
    assert (f"a {shares[0]:.1%}, b {shares[1]:.1%}" in text) != compared


def test_a_comparison_counts_the_diverged_runs_of_both_arms():
    """One run of the baseline and two of the arm diverge; the pair of seed 3 is the only finished one."""
    suite = suite_of({"a": DENSE, "b": SWITCH}, seeds=range(4), horizons=(20,))
    diverged = {("a", 0), ("b", 1), ("b", 2)}
    runs = [
        record(name, seed, 5.0, status=DIVERGED, rows=[]) if (name, seed) in diverged else record(name, seed, 5.0)
        for name in "ab"
        for seed in range(4)
    ]
    found = table(suite, runs)
    text = sections.comparison_section(found, Comparison("a", ("b",), ("steps",)), "")
    assert rows_of(text)["b"][1] == "diverged runs: 3"
    only_baseline = table(suite, [run for run in runs if run.variant == "a" or run.seed in (0, 3)])
    assert "diverged runs: 1" in sections.comparison_section(only_baseline, Comparison("a", ("b",), ("steps",)), "")


def test_router_entropy_is_a_share_of_that_of_all_experts_null_ones_included():
    """ln 8 of at most ln 16 with eight null experts, of at most ln 8 without: 3/4 and 1."""
    suite = suite_of(
        {"null": NULL, "plain": Variant({"model.moe.gate": "switch", "model.moe.num_experts": 8})},
        seeds=(0,),
        horizons=(20,),
    )
    rows = [(20, "max_violation", "", "0", 0.5), (20, "router_entropy", "", "0", math.log(8))]
    text = sections.routing_section(table(suite, [record(name, 0, 5.0, rows=rows) for name in ("null", "plain")]))
    assert [rows_of(text)[name][3] for name in ("null", "plain")] == ["0.75", "1.00"]


def test_residuals_of_the_law_are_the_losses_less_the_law():
    """Six points, which no law with four coefficients and a floor fits: the middle of three numbers of experts is the
    best at one size and the worst at the other."""
    experts = {"a": 1, "b": 4, "c": 16, "d": 1, "e": 4, "f": 16}
    sizes = {"a": 10**5, "b": 10**5, "c": 10**5, "d": 10**6, "e": 10**6, "f": 10**6}
    losses = {"a": 4.0, "b": 3.6, "c": 3.8, "d": 3.4, "e": 3.6, "f": 3.2}
    arms = {name: Variant({"model.moe.gate": "none", "model.d_ff": 8 * (1 + i)}) for i, name in enumerate(experts)}
    suite = suite_of(arms, seeds=(0,), experts=experts, sizes=sizes)
    runs = [record(name, 0, loss, steps=suite.longest) for name, loss in losses.items()]
    cells = [[float(cell) for cell in row[2:]] for row in tables(sections.law_section(table(suite, runs)))[0][1]]
    assert sorted(loss for loss, _, _ in cells) == sorted(losses.values())
    for loss, law, residual in cells:
        assert residual == pytest.approx(loss - law, abs=1.1e-4)
    assert max(residual for *_, residual in cells) > 0.05
