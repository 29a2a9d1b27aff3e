"""Published laws at values computed by hand, regions, and the page of advice."""

import itertools
import math

import numpy as np
import pytest

from moe.lab import advice
from moe.lab import published_laws as laws


def test_krajewski_by_hand():
    """At G = 1, N = e^20, D = e^25: 0.47 + 20.2·e^-2.3 + 30.8·e^-3.675 = 0.47 + 2.0252 + 0.7808."""
    assert laws.krajewski_loss(math.exp(20), math.exp(25), 1) == pytest.approx(3.2760, abs=2e-4)
    # 2 layers of 128: 2·128²·(8·64 + 4) in all, 2·12·128² active; FLOPs 2·(12·128²·6 + 128·64·4·14).
    assert laws.krajewski_model(128, 4) == (16_908_288, 393_216, 3_276_800)


def test_ling_by_hand():
    """C = 10^20: 0.1915·10^10.19 FLOPs a token, 5.2232·10^9.81 tokens, whose product is C again (0.1915·5.2232 = 1)."""
    flops, tokens = laws.ling_allocation(1e20)
    assert (flops, tokens) == (pytest.approx(2.966e9, rel=1e-3), pytest.approx(3.372e10, rel=1e-3))
    assert flops * tokens == pytest.approx(1e20, rel=1e-3)
    assert laws.ling_compute(tokens) == pytest.approx(1e20)
    assert laws.ling_rate(1e20) == pytest.approx(1.1576 * 10**-3.058)
    # G = 10: exponent 1.23 - 0.0761·20 + 0.0167 - 0.117 = -0.3923; A = 0.1: 0.1^-0.3923 and 0.1163^-0.3923.
    low, high = laws.ling_leverage(0.1, 10, 1e20)
    assert (low, high) == (pytest.approx(2.325, abs=2e-3), pytest.approx(2.468, abs=2e-3))
    assert laws.ling_leverage(1 / 32, 10, 1e22)[0] > low  # sparser, at more compute: larger leverage


def test_clark_by_hand():
    """One expert changes nothing; the gain shrinks with N, and vanishes at N = 10^(0.108/0.009) = 10^12."""
    assert laws.clark_gain(1e9, 1) == 1
    assert laws.clark_gain(1e12, 64) == pytest.approx(1)
    assert laws.clark_gain(1e8, 64) < laws.clark_gain(1e9, 64) < 1
    # N = 10^9: slope -0.027; Ê(64) = 1/(1/64.858 + 1/314.478) = 53.77, Ê(1) = 1.847: (53.77/1.847)^-0.027.
    assert laws.clark_gain(1e9, 64) == pytest.approx((53.77 / 1.847) ** -0.027, abs=1e-4)


def test_extrapolation_beyond_the_published_runs_is_named():
    assert laws.KRAJEWSKI_RANGE.beyond(parameters=1e9, tokens=2e10) == ""
    assert laws.KRAJEWSKI_RANGE.beyond(tokens=1.3e12) == "tokens 1.3e+12 is 10 times above 1.3e+11"
    assert laws.KRAJEWSKI_RANGE.beyond(tokens=8e9) == "tokens 8e+09 is 2 times below 1.6e+10"
    assert laws.KRAJEWSKI_RANGE.beyond(parameters=3.9e11) == "parameters 3.9e+11 is 105 times above 3.7e+09"


def test_a_region_contains_the_optimum_and_widens_with_tolerance_and_budget():
    budget = advice.Budget(1e20, 1e20, 1e20, "")
    narrow, wide = advice.by_krajewski(budget, 0.001), advice.by_krajewski(budget, 0.02)
    assert narrow.width[1] == wide.width[1]
    assert wide.width[0] < narrow.width[0] <= narrow.width[1] <= narrow.width[2] < wide.width[2]
    # Neighbours of the best width are worse, at the same compute.
    best, grain = narrow.width[1], narrow.granularity[0]
    losses = []
    for width in (best - 64, best, best + 64):
        total, _, flops = laws.krajewski_model(width, grain)
        losses.append(laws.krajewski_loss(total, 1e20 / flops, grain))
    assert losses[1] == min(losses)
    uncertain = advice.by_krajewski(advice.Budget(5e19, 1e20, 2e20, ""), 0.001)
    assert uncertain.width[0] < narrow.width[0]
    assert uncertain.width[2] > narrow.width[2]


def test_memory_and_sparsity_by_hand():
    """3e9 active: 1e9 outside the experts and 2e9 in K of them; at K/E = 1/8, 1e9 + 16e9 parameters of 16 bytes."""
    rows = advice.sparsities(3e9, 1e20, 8, 16 * 34e9)
    assert rows[1].total == pytest.approx(17e9)
    assert rows[1].memory == pytest.approx(0.5)
    assert [row.activation for row in rows] == sorted((row.activation for row in rows), reverse=True)
    assert all(a.total < b.total and a.gain > b.gain for a, b in itertools.pairwise(rows))


def test_expert_counts_of_a_row_match_its_parameters():
    """D = 2880, 45 layers, granularity 8: F = 720; K = 11 such experts have about 8 of a layer's 12 D² parameters."""
    size = advice.Size("law", (2880, 2880, 2880), 12 * 2880**2 * 45, (1.0, 1.0, 1.0), None, None, "")
    rows = advice.sparsities(size.active, 1e20, 8, None)
    text = advice._sparsities(rows, size, 8)
    for row, line in zip(rows, text.splitlines()[2:], strict=False):
        experts, k = (int(number) for number in line.split("|")[1].split("/"))
        assert k == 11
        assert (4 * 2880 + 3 * experts * 720) * 2880 * 45 == pytest.approx(row.total, rel=0.1)


def test_spreads_are_of_differences_paired_by_seed():
    """Differences 0.1, 0.3 and 0.2 over three common seeds: standard deviation 0.1."""
    dense = {0: (4.0, 1.0), 1: (4.2, 1.0), 2: (4.4, 1.0), 9: (9.0, 9.0)}
    losses = {
        ("dense", 10): dense,
        ("moe", 10): {0: (4.1, 2.0), 1: (4.5, 2.0), 2: (4.6, 2.0)},
        ("two", 10): {0: (1, 1)},
    }
    (found,) = advice.spreads(losses, 64, "dense")
    assert (found.contrast, found.seeds, found.hours) == ("moe − dense", 3, 3.0)
    assert found.sd == pytest.approx(0.1)
    assert found.loss == pytest.approx(4.2)


def test_the_page_of_advice_shows_budget_law_and_spreads():
    tokens = [100, 1000, 10_000]
    own = {
        (e, d): 2 + math.exp(3 - 0.3 * math.log(d) + 0.1 * math.log(e) - 0.02 * math.log(d) * math.log(e))
        for e in (1, 4, 16)
        for d in tokens
    }
    spread = advice.Spread("moe − dense", 64, 2000, 0.02, 4.0, 0.5, 5)
    settings = {"tolerance": 0.01, "memory": 1e12, "gain": 0.01, "own": own}
    page = advice.render(advice.Budget(1e20, 2e20, 3e20, "because"), measured=[spread], **settings)
    assert "Budget: 2e+20 FLOPs (1e+20 to 3e+20): because" in page
    # exp(0.1 / 0.02) = 148: from there c log D outweighs b.
    assert "more experts lower the loss above 1.5e+02 tokens" in page
    assert "| moe − dense | 64 | 2,000 | 0.0200 (5) | 0.0400 | 5 | 2.5 |" in page
    assert np.isfinite(advice.by_ling(advice.Budget(1e20, 1e20, 1e20, "")).active)
    without = advice.render(advice.Budget(1e20, 2e20, 3e20, ""), measured=[], **settings | {"memory": None, "own": {}})
    assert "No records with three seeds" in without
    assert "The lab's records do not determine its law." in without
