"""Statistics of the lab, by hand."""

import math
import warnings

import numpy as np
import pytest

from moe.lab import inference, law


def test_paired_interval_by_hand():
    # Mean 2, standard deviation 1, error 1/sqrt(3) = 0.57735; t(0.975, 2) = 4.30265: ± 2.48414. t = 3.46410,
    # p = 1 - t/sqrt(2 + t²) = 1 - 0.92582 = 0.07418, which is the closed form for two degrees of freedom.
    e = inference.effect([1.0, 2.0, 3.0])
    assert (e.mean, e.n, e.sd) == (2.0, 3, 1.0)
    assert (e.low, e.high, e.p) == pytest.approx((-0.48414, 4.48414, 0.07418), abs=1e-5)
    # Without a spread the interval is a point, and only zero is compatible with zero.
    assert inference.effect([2.0, 2.0]) == inference.Effect(2.0, 2.0, 2.0, 0.0, 2, 0.0)
    assert inference.effect([0.0, 0.0]).p == 1
    with warnings.catch_warnings(action="error"):  # 0.1 + 0.2 differs from 0.3 by one rounding
        assert inference.effect([0.3, 0.1 + 0.2, 0.3]).sd == 0


def test_one_seed_has_no_interval_and_a_diverged_one_no_mean():
    one, diverged = inference.effect([5.0]), inference.effect([5.0, math.inf, 4.0])
    assert (one.mean, one.low, one.high, one.n) == (5.0, -math.inf, math.inf, 1)
    assert math.isnan(diverged.mean)
    assert diverged.n == 3


def test_smallest_detectable_effect_matches_the_published_table():
    # papers: standard deviation 0.025 → 0.082 (n = 3), 0.042 (5), 0.025 (10).
    found = [inference.smallest_detectable(0.025, n) for n in (3, 5, 10)]
    assert found == pytest.approx([0.082, 0.042, 0.025], abs=6e-4)
    assert inference.smallest_detectable(0.025, 1) == math.inf
    assert inference.seeds_needed(0.025, found[1]) == 5
    assert inference.seeds_needed(0.025, -found[2]) == 10


def test_smallest_margin_by_hand():
    # Tables of t with one degree of freedom: t(0.975) = 12.7062 and, for a power of 80 %, t(0.9) = 3.0777.
    assert inference.smallest_margin(0.5, 2) == pytest.approx(0.5 * (12.7062 + 3.0777) / math.sqrt(2), abs=1e-4)
    assert inference.smallest_margin(0.5, 1) == math.inf


def test_holm_by_hand():
    # 0.01·3 = 0.03; 0.03·2 = 0.06; 0.04·1, but not less than the one before.
    assert inference.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert inference.holm([]) == []
    assert inference.holm([0.6, 0.7]) == [1.0, 1.0]  # 0.6·2, but at most 1


def test_intervals_corrections_power_and_the_pooled_model_are_those_of_statsmodels():
    """An implementation that shares no code with this one."""
    pytest.importorskip("statsmodels")
    import pandas as pd
    import statsmodels.formula.api as formulas
    from statsmodels.stats import multitest, power, weightstats

    rng = np.random.default_rng(3)
    values = rng.normal(0.03, 0.05, 10)
    theirs = weightstats.DescrStatsW(values)
    ours = inference.effect(values)
    np.testing.assert_allclose((ours.low, ours.high), theirs.tconfint_mean(0.05), rtol=1e-9)
    assert ours.p == pytest.approx(theirs.ttest_mean(0)[1], rel=1e-9)
    p_values = rng.uniform(0, 0.1, 8)
    np.testing.assert_allclose(
        inference.holm(p_values), multitest.multipletests(p_values, method="holm")[1], rtol=1e-12
    )
    detected = power.TTestPower().solve_power(nobs=10, alpha=0.05, power=0.8)
    assert inference.smallest_detectable(0.05, 10) == pytest.approx(0.05 * float(detected), rel=1e-4)
    losses = {arm: {seed: float(rng.normal(3, 0.1)) for seed in range(4)} for arm in ("a", "b", "c")}
    del losses["c"][1]
    cells = [(arm, str(seed), loss) for arm, of_arm in losses.items() for seed, loss in of_arm.items()]
    table = pd.DataFrame(cells, columns=["arm", "seed", "loss"])
    fitted = formulas.ols("loss ~ C(arm) + C(seed)", table).fit()
    pooled = inference.pooled(losses, "a")["c"]
    name = "C(arm)[T.c]"
    assert pooled.mean == pytest.approx(fitted.params[name], rel=1e-9)
    np.testing.assert_allclose((pooled.low, pooled.high), fitted.conf_int().loc[name], rtol=1e-9)


def test_pitman_morgan_by_hand():
    # Sums (1,-1,2,-2), differences (1,-1,-2,2): r = (1 + 1 - 4 - 4)/10 = -0.6, t = -0.6·√2/0.8 = -1.06066, and with
    # two degrees of freedom p = (1 - |t|/sqrt(2 + t²))/2 = (1 - 0.6)/2. Variances 2/3 and 8/3.
    assert inference.pitman_morgan([1, -1, 0, 0], [0, 0, 2, -2]) == pytest.approx((0.25, 0.2))
    assert inference.pitman_morgan([1, 2], [1, 3]) == (0.25, 1.0)  # two pairs always correlate by ±1


def test_pooled_model_of_two_arms_is_the_paired_test_and_uses_incomplete_seeds():
    losses = {"base": {0: 5.0, 1: 6.0, 2: 7.0}, "arm": {0: 6.0, 1: 8.0, 2: 10.0}}
    paired, found = inference.effect([1.0, 2.0, 3.0]), inference.pooled(losses, "base")["arm"]
    assert (found.mean, found.low, found.high, found.p, found.sd) == pytest.approx(
        (paired.mean, paired.low, paired.high, paired.p, paired.sd)
    )
    diverged = {arm: {**of_arm, 3: loss} for (arm, of_arm), loss in zip(losses.items(), (8.0, math.inf), strict=True)}
    assert inference.pooled(diverged, "base")["arm"].mean == pytest.approx(found.mean)
    more = inference.pooled({**losses, "third": {0: 5.0, 1: 6.5}}, "base")
    assert set(more) == {"arm", "third"}
    assert more["third"].n == 2
    assert inference.pooled({"base": {0: 5.0}, "arm": {0: 6.0}}, "base") == {}


def test_bootstrap_weighs_domains_equally_and_resamples_seeds():
    # Constant within a domain: every draw is (1 + 4)/2.
    assert inference.bootstrap([[1, 1, 1, 4]], ["a", "a", "a", "b"]) == (2.5, 2.5)
    # Seeds of -1, 0 and 1: three draws are all -1, or all 1, with probability 1/27 each, which is more than 2.5 %.
    assert inference.bootstrap([[-1.0], [0.0], [1.0]], ["a"]) == (-1.0, 1.0)
    # Rows of 0 and 2: a quarter of the draws has only the first, a quarter only the second.
    assert inference.bootstrap([[0.0, 2.0]], ["a", "a"]) == (0.0, 2.0)
    # Two seeds are not resampled, and one row leaves nothing to resample.
    assert inference.bootstrap([[-1.0], [2.0]], ["a"]) == (0.5, 0.5)


def test_censored_median_by_hand():
    # The range of three seeds covers the median with probability 1 - 2/8, that of six with 1 - 2/64.
    three = inference.censored_median([0.5, math.inf, 0.7])
    assert (three.median, three.low, three.high, three.coverage, three.censored) == (0.7, 0.5, math.inf, 0.75, 1)
    six = inference.censored_median([1, 2, 3, 4, 5, 6])
    assert (six.median, six.low, six.high, six.coverage) == (3.5, 1, 6, 1 - 2 / 64)
    # The second and the last but one of eight cover it with 1 - 2·9/256 = 0.93, of nine with 1 - 2·10/512 = 0.96.
    eight, nine = (inference.censored_median(range(1, n + 1)) for n in (8, 9))
    assert (eight.low, eight.high, eight.coverage) == (1, 8, 1 - 2 / 256)
    assert (nine.low, nine.high, nine.coverage) == (2, 8, pytest.approx(1 - 20 / 512))
    assert inference.censored_median([0.5, math.inf]).median == math.inf


def test_steps_to_reach_a_loss():
    curve = [(10, 5.0), (20, 4.0), (30, 3.5)]
    assert inference.steps_to_reach(curve, 4.25) == 17.5  # three quarters of the way from 5 to 4
    assert inference.steps_to_reach(curve, 3.5) == 30
    assert inference.steps_to_reach(curve, 3.4) == math.inf
    assert inference.steps_to_reach(curve, 9.0) == curve[0][0]  # reached at the first evaluation


def test_crossing_is_interpolated_in_log_tokens():
    def effect(mean, half):
        return inference.Effect(mean, mean - half, mean + half, 0.5, 3)

    # Halfway in log tokens; the lower end -0.1 is below zero from the start, the upper one 0.1 never.
    found = inference.crossing([100, 10_000], [effect(0.1, 0.2), effect(-0.1, 0.2)])
    assert (found.tokens, found.low, found.high) == (pytest.approx(1000), 0.0, math.inf)
    assert math.isnan(inference.crossing([100, 10_000], [effect(0.1, 0.05), effect(0.2, 0.05)]).tokens)
    found = inference.crossing([100, 10_000], [effect(0.2, 0.1), effect(-0.2, 0.1)])
    # Ends: 0.1 → -0.3 crosses at a quarter, 0.3 → -0.1 at three quarters of the two decades.
    assert (found.low, found.high) == pytest.approx((100 * 10**0.5, 100 * 10**1.5))
    # Without an interval at the first horizon, the upper end is below zero from the second one on.
    found = inference.crossing([100, 10_000], [effect(0.1, math.inf), effect(-0.2, 0.1)])
    assert (found.low, found.high) == (0.0, 10_000)
    # A difference of zero is reached where it is measured.
    assert inference.crossing([100, 10_000], [effect(0.1, 0.0), effect(0.0, 0.0)]).tokens == pytest.approx(10_000)


def test_law_is_recovered_from_its_own_losses():
    def loss(experts, tokens):
        return 1.5 + math.exp(
            3.0 - 0.2 * math.log(tokens) - 0.3 * math.log(experts) + 0.01 * math.log(tokens * 1.0) * math.log(experts)
        )

    points = {(e, t): loss(e, t) for e in (1, 4, 16, 64) for t in (10**5, 10**6, 10**7)}
    found = law.fit(points)
    assert found.names == law.NAMES
    assert found.floor == pytest.approx(1.5, abs=1e-3)
    assert found.coefficients == pytest.approx((3.0, -0.2, -0.3, 0.01), rel=2e-3)
    assert found.sd < 1e-4
    moved = law.fit({**points, (4, 10**6): points[4, 10**6] + 0.1})
    assert max(moved.residuals, key=moved.residuals.get) == (4, 10**6)
    # Twelve points less four coefficients and the floor leave seven degrees of freedom. An error of the loss is one of
    # its logarithm times 1/(L - L∞).
    assert moved.sd == pytest.approx(math.sqrt(sum(residual**2 for residual in moved.residuals.values()) / 7))
    logs = [(math.log(e), math.log(t)) for e, t in points]
    design = np.array([[1, of_tokens, of_experts, of_tokens * of_experts] for of_experts, of_tokens in logs])
    slopes = [1 / (value - moved.floor) for value in {**points, (4, 10**6): points[4, 10**6] + 0.1}.values()]
    unit = np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    assert moved.errors == pytest.approx(unit * moved.sd * math.sqrt(np.mean(np.square(slopes))))
    # One horizon leaves the slope in tokens open, one number of experts that in experts, one point both.
    assert law.fit({(e, 10**6): loss(e, 10**6) for e in (1, 4, 16, 64)}).names == ("d", "b")
    assert law.fit({(4, t): loss(4, t) for t in (10**5, 10**6, 10**7, 10**8)}).names == ("d", "a")
    assert law.fit({(4, 10**6): 3.0}).names == ("d",)


def test_the_interval_of_a_law_is_over_whole_seeds():
    """A seed that scales all losses by one factor shifts d by its logarithm and changes no slope."""
    points = {(e, n): 3.0 * e**-0.1 * n**-0.05 for e in (1, 4, 16) for n in (10**5, 10**6)}
    seeds = [{point: factor * loss for point, loss in points.items()} for factor in (0.99, 1.0, 1.01)]
    found = law.intervals(seeds)
    exact = law.fit(points)
    for name, value in zip(exact.names, exact.coefficients, strict=True):
        low, high = found[name]
        assert low - 1e-6 <= value <= high + 1e-6
    assert law.intervals([points] * 3)["b"] == pytest.approx((exact.coefficients[2],) * 2)
    assert law.intervals(seeds[:2]) == {}
    # One draw in 27 has only the first seed, which is more than 2.5 % and less than 5 %; so for the last.
    d = exact.coefficients[0]
    assert found["d"] == pytest.approx((d + math.log(0.99), d + math.log(1.01)), abs=1e-6)
    # Of nine seeds one is lower by a tenth: with it drawn B(9, 1/9) times, 2.5 % of the draws have it three times.
    nine = law.intervals([{point: loss * (0.9 if i == 4 else 1) for point, loss in points.items()} for i in range(9)])
    assert nine["d"] == pytest.approx((d + math.log(1 - 0.1 * 3 / 9), d), abs=1e-6)


def test_share_of_a_whole_by_hand():
    """Values 1, 3 and wholes 4, 4: the whole has no variance, so that the interval is that of the values, divided by 4.

    Mean 2, sd √2, error √2 / √2 = 1, t(0.975, 1) = 12.7062: 2 ∓ 12.7062 over 4.
    """
    found = inference.share([1.0, 3.0], [4.0, 4.0])
    assert (found.mean, found.n) == (0.5, 2)
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(2))  # t = 2/1 with one degree of freedom
    assert inference.share([1.0, 3.0], [2.0, 8.0]).mean == 2 / 5  # the mean's share, not the mean share
    assert found.low == pytest.approx((2 - 12.7062) / 4, abs=1e-4)
    assert found.high == pytest.approx((2 + 12.7062) / 4, abs=1e-4)
    whole = inference.share([2.0, 3.0, 4.0], [2.0, 3.0, 4.0])
    assert (whole.low, whole.mean, whole.high) == pytest.approx((1.0, 1.0, 1.0))
    open_ended = inference.share([1.0, 1.5, 2.0], [-1.0, 1.0, 3.0])  # the whole may be zero
    assert (open_ended.low, open_ended.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("shape", [(1.0, 2.0), (2.0, 1.0), (-0.5, 3.0)])
def test_the_interval_of_a_share_contains_what_the_paired_test_does_not_reject(shape):
    rng = np.random.default_rng(0)
    values, wholes = (mean + rng.normal(0, 0.2, 6) for mean in shape)
    found = inference.share(values, wholes)
    for end, outside in ((found.low, found.low - 0.01), (found.high, found.high + 0.01)):
        assert inference.effect(values - end * wholes).p == pytest.approx(0.05, abs=1e-6)
        assert inference.effect(values - outside * wholes).p < 0.05
