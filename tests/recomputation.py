"""Independent recomputation of a suite's report from the table of its records, with pandas and SciPy.

It uses nothing of :mod:`moe.lab`, and other methods where there are any: power by integration over the chi-square
distribution instead of the noncentral t, multinomial row weights in the bootstrap, normal equations for the law.
"""

import functools
import itertools
import json
import re

import numpy as np
import pandas as pd
import scipy.linalg
import scipy.optimize
import scipy.stats

TERM = re.compile(r"([+-]?)\s*(\d+(?:\.\d+)?)?\s*(?:([a-z][\w/.]*)\[([\w.]+)((?:,[^\]]*)?)\])?")


def read_records(path, reserved=(), rates=None):
    """Runs of a suite's records.parquet.

    Args:
        path: of the table.
        reserved: seeds of the sweep, which no comparison uses.
        rates: (arm, steps) → learning rate of the comparisons; None: whatever there is.
    """
    records, losses = pd.read_parquet(path), {}
    table = {name: [] for name in (*KEYS, "compared", *FIELDS)}
    for record in records.to_dict("records"):
        rate = rates.get((record["variant"], record["steps"])) if rates else None
        compared = record["seed"] not in reserved and (rate is None or np.isclose(record["learning_rate"], rate))
        columns = [record[f"row_{name}"] for name in ("step", "quantity", "domain", "layer", "value")]
        rows = list(zip(*columns, strict=True))
        rows += [(0, name, "", "", value) for name, value in json.loads(record["costs"]).items()]
        for name, value in json.loads(record["probes"]).items():
            quantity, _, layer = name.partition("@")
            rows.append((record["steps"], quantity, "", layer, value))
        for name, column in zip(FIELDS, zip(*rows, strict=True), strict=True):
            table[name] += column
        for name in KEYS:
            table[name] += [record[name]] * len(rows)
        table["compared"] += [bool(compared)] * len(rows)
        if compared:
            found = np.asarray(record["row_losses"]), np.asarray(record["row_domains"])
            losses[record["variant"], record["steps"], record["seed"]] = found
    return Runs(pd.DataFrame(table), losses)


#: Columns of a run, and of its values.
KEYS = ("variant", "steps", "learning_rate", "seed", "seconds", "evaluated")
FIELDS = ("step", "quantity", "domain", "layer", "value")


class Runs:
    """All runs of a suite as a long table, and the subset that comparisons use. Results are cached; none is changed."""

    def __init__(self, table, losses=None):
        self.all, self._losses = table, losses or {}
        self.data = table[table.compared]
        self.arms = set(self.data.variant.unique())
        for method in (self.seeds, self.fullest, self.last):
            setattr(self, method.__name__, functools.cache(method))
        self._places = self.data.groupby(["variant", "steps", "quantity", "domain"], sort=False).indices

    def seeds(self, arm, steps):
        runs = self.data[(self.data.variant == arm) & (self.data.steps == steps)]
        return sorted(runs.seed.unique())

    def horizons(self, *arms):
        """Horizons at which these arms share seeds, ascending."""
        steps = sorted(self.data.steps.unique())
        return [s for s in steps if set.intersection(*(set(self.seeds(arm, s)) for arm in arms))]

    def fullest(self, arm):
        """Horizon with the most seeds; the longest if several tie."""
        return max(self.data.steps.unique(), key=lambda steps: (len(self.seeds(arm, steps)), steps))

    def rows(self, arm, steps, quantity, domain=""):
        return self.data.iloc[self._places.get((arm, steps, quantity, domain), [])]

    def per_layer(self, arm, steps, quantity):
        """Table of the last values: seeds down, layers across."""
        rows = self.rows(arm, steps, quantity).sort_values("step")
        return rows.pivot_table("value", "seed", rows.layer.astype(str), aggfunc="last")

    def last(self, arm, steps, quantity, domain="", layers="", first=False, until=None):
        """Seed → value at the last (or first) step, optionally up to a given step, averaged over layers."""
        rows = self.rows(arm, steps, quantity, domain).sort_values("step")
        rows = rows if until is None else rows[rows.step <= until]
        if layers:
            start, end = int(layers.rstrip("-")), 10**6 if layers.endswith("-") else int(layers)
            rows = rows[pd.to_numeric(rows.layer).between(start, end)]
        values = rows.groupby(["seed", "layer"]).value
        return (values.first() if first else values.last()).groupby("seed").mean()

    def loss(self, arm, steps, **options):
        return self.last(arm, steps, "loss", "primary", **options)

    def difference(self, arm, base, steps):
        return (self.loss(arm, steps) - self.loss(base, steps)).dropna()

    def expression(self, text, steps, until=None, domain="primary"):
        """Seed → value of a claim's linear combination at the last step, or at an earlier one; losses on a domain."""
        total = 0.0
        for sign, factor, quantity, arm, options in TERM.findall(text):
            if not (factor or quantity):
                continue
            term = float(factor or 1) * (-1 if sign == "-" else 1)
            if quantity:
                layers = re.search(r"layer=([\d-]+)", options)
                where = domain if quantity in ("loss", "own_loss") else ""
                first = "step=first" in options
                term = term * self.last(arm, steps, quantity, where, layers[1] if layers else "", first, until)
            total = total + term
        return total.dropna()

    def rates(self, arm, rate, steps, seeds):
        """Mean loss of an arm's sweep runs at one learning rate."""
        runs = self.all
        chosen = (runs.variant == arm) & np.isclose(runs.learning_rate, rate) & (runs.steps == steps)
        chosen &= runs.seed.isin(seeds) & (runs.quantity == "loss") & (runs.domain == "primary") & (runs.step == steps)
        return runs[chosen].value.mean()

    def row_losses(self, arm, steps, seed):
        """(loss of every held-out row, its domain)."""
        return self._losses[arm, steps, seed]


def interval(values):
    """(mean, low, high, p, sd) of a one-sample t test; all but the mean are NaN for one value."""
    values = np.asarray(values, float)
    if len(values) == 1:
        return values[0], np.nan, np.nan, np.nan, np.nan
    mean, sd, n = values.mean(), values.std(ddof=1), len(values)
    if sd == 0:
        return mean, mean, mean, float(mean == 0), 0.0
    half = scipy.stats.t.ppf(0.975, n - 1) * sd / np.sqrt(n)
    return mean, mean - half, mean + half, 2 * scipy.stats.t.sf(abs(mean) * np.sqrt(n) / sd, n - 1), sd


def share(values, wholes):
    """(ratio of the means, its interval, whose ends are where the t statistic of values - r·wholes crosses the
    quantile)."""
    values, wholes = np.asarray(values), np.asarray(wholes)
    ratio, critical = values.mean() / wholes.mean(), scipy.stats.t.ppf(0.975, len(values) - 1)
    if abs(scipy.stats.ttest_1samp(wholes, 0).statistic) <= critical:
        return ratio, None
    if np.allclose(values, ratio * wholes, rtol=1e-9):  # a constant share
        return ratio, [ratio, ratio]

    def excess(r):
        return abs(scipy.stats.ttest_1samp(values - r * wholes, 0).statistic) - critical

    return ratio, [scipy.optimize.brentq(excess, ratio, ratio + side) for side in (-100, 100)]


def power(effect, n):
    """Power of a two-sided t test of n values, for an effect in standard deviations."""
    chi = np.sqrt(scipy.stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, n - 1) / (n - 1))
    bound, shift = scipy.stats.t.ppf(0.975, n - 1) * chi, effect * np.sqrt(n)
    return float(np.mean(scipy.stats.norm.sf(bound - shift) + scipy.stats.norm.cdf(-bound - shift)))


@functools.cache
def detectable(n):
    """Effect in standard deviations that n values detect with 80 % power; infinite for one value."""
    return np.inf if n < 2 else scipy.optimize.brentq(lambda effect: power(effect, n) - 0.8, 1e-6, 50.0)


def holm(p):
    """Holm's adjusted p-values."""
    p = pd.Series(list(p)).sort_values(kind="stable")
    return (p * np.arange(len(p), 0, -1)).clip(upper=1).cummax().sort_index().to_numpy()


def pooled(losses, base):
    """Arm → (mean, low, high) in the model arm + seed; ``losses``: arm → series over seeds. Empty without a degree of
    freedom for the residual variance."""
    table = pd.concat(losses, names=["arm", "seed"]).rename("loss").reset_index()
    design = pd.get_dummies(table[["arm", "seed"]].astype(str), dtype=float)
    design = design.drop(columns=f"arm_{base}")
    degrees = len(table) - design.shape[1]
    if degrees < 1:
        return {}
    q, r = np.linalg.qr(design.to_numpy())
    fit = scipy.linalg.solve_triangular(r, q.T @ table.loss)
    variance = ((table.loss - design.to_numpy() @ fit) ** 2).sum() / degrees
    error = np.sqrt(variance * np.diag(scipy.linalg.inv(r.T @ r)))
    half = scipy.stats.t.ppf(0.975, degrees) * error
    found = dict(zip(design.columns, zip(fit, fit - half, fit + half, strict=True), strict=True))
    return {name.removeprefix("arm_"): found[name] for name in design.columns if name.startswith("arm_")}


def bootstrap(runs, arm, base, steps, primary, draws=2_000):
    """95 % percentile interval over rows of each primary domain and over seeds (with fewer than three seeds: rows
    only)."""
    differences = []
    seeds = sorted(set(runs.seeds(arm, steps)) & set(runs.seeds(base, steps)))
    domains = np.empty(0)
    for seed in seeds:
        (ours, domains), (theirs, _) = (runs.row_losses(name, steps, seed) for name in (arm, base))
        differences.append(ours - theirs)
    n = len(seeds)
    weights = _weights(n, draws, 0) if n > 2 else np.full((draws, n), 1 / n)
    over_seeds, means = weights @ np.asarray(differences), []
    for number, domain in enumerate(primary, start=1):
        values = over_seeds[:, domains == domain]
        means.append((values * _weights(values.shape[1], draws, number)).sum(1))
    return np.quantile(np.mean(means, 0), [0.025, 0.975])


@functools.cache
def _weights(n, draws, seed):
    """Weights of n values, drawn with replacement, in each of some draws: [draws, n]."""
    return np.random.default_rng((7, seed)).multinomial(n, np.full(n, 1 / n), draws) / n


def share_of_steps(runs, arm, base, steps):
    """Share of the steps after which the arm reaches the baseline's last loss, per seed; [] without a curve."""
    shares = []
    curves = runs.rows(arm, steps, "loss", "primary").sort_values("step")
    for seed, target in runs.loss(base, steps).items():
        curve = curves[curves.seed == seed]
        at, loss = curve.step.to_numpy(float), curve.value.to_numpy()
        if len(at) < 2:
            continue
        if loss[0] <= target:
            shares.append(at[0] / steps)
            continue
        reached = np.flatnonzero(loss[1:] <= target)
        if not len(reached):
            shares.append(np.inf)
            continue
        i = reached[0]
        shares.append(np.interp(target, [loss[i + 1], loss[i]], [at[i + 1], at[i]]) / steps)
    return shares


def median_interval(values):
    """(median, low, high, coverage) from order statistics: the narrowest interval with 95 %, or the whole range."""
    values, n, k = np.sort(values), len(values), 1
    while k < n // 2 and 1 - 2 * scipy.stats.binom.cdf(k, n, 0.5) >= 0.95:
        k += 1
    return np.median(values), values[k - 1], values[-k], 1 - 2 * scipy.stats.binom.cdf(k - 1, n, 0.5)


def zero(tokens, values):
    """First token count at which values fall to zero, interpolated in the logarithm of tokens; infinite if they never
    do."""
    if values[0] <= 0:
        return 0.0
    for (t, v), (after, w) in itertools.pairwise(zip(np.log(tokens), values, strict=True)):
        if v > 0 >= w:
            return float(np.exp(t + v / (v - w) * (after - t)))
    return np.inf
