"""Every number in the committed reports is that of results.csv, computed anew by :mod:`tests.recomputation`."""

import itertools
import json
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr

from moe.lab.suite import load_suite
from tests import recomputation as again

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results"
FOLDERS = [path.parent for path in sorted(RESULTS.rglob("report.md"))]
CLAIMS = {c["number"]: c for c in tomllib.loads((ROOT / "configs/ablations/claims.toml").read_text())["claim"]}
NUMBER = re.compile(r"[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?|inf")

of_every_report = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(RESULTS)))


def read(folder):
    """(runs, section title → text)."""
    title, *sections = re.split(r"\n## ", (folder / "report.md").read_text())
    return again.Runs(folder), {"": title} | dict(section.split("\n", 1) for section in sections)


def tables(text):
    """Header and rows of each Markdown table, as lists of cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.strip().splitlines()]
        found.append((rows[0], rows[2:]))
    return found


def check(where, cell, *values):
    """The numbers of a cell, in order, are these (value, format) pairs; csv has seven digits of a value."""
    printed = NUMBER.findall(cell.replace("> 1", "inf").replace("beyond the longest horizon", "inf"))
    assert len(printed) == len(values), f"{where}: {cell!r} has not {len(values)} numbers"
    for text, (value, form) in zip(printed, values, strict=True):
        slack = 2e-6 * max(1.0, abs(value)) if form.endswith("f") else 1e-3 * abs(value)
        allowed = {format(v, form) for v in ((value - slack, value, value + slack) if form != "d" else (value,))}
        assert text in allowed, f"{where}: {cell!r}, {value}"


def effect(where, cell, values):
    """A cell "mean [low, high], n = N"."""
    mean, low, high, _, _ = again.interval(values)
    ends = [(low, "+.4f"), (high, "+.4f")] if len(values) > 1 else []
    check(where, cell.removesuffix(": no interval"), (mean, "+.4f"), *ends, (len(values), "d"))


def mean_sd(where, cell, values):
    """Cells "mean ± sd", separated by slashes: one per series of values."""
    pairs = [(v.mean(), v.std(ddof=1)) if len(v) > 1 else (v.mean(),) for v in values]
    check(where, cell, *[(value, ".4f") for pair in pairs for value in pair])


@of_every_report
def test_comparisons(folder):
    runs, sections = read(folder)
    checked = 0
    for title, text in sections.items():
        for steps, block in re.findall(r"\*\*([\d,]+) steps, [\d.]+ million tokens\*\*\n\n((?:\|.*\n?)+)", text):
            (header, rows), steps = tables(block)[0], int(steps.replace(",", ""))
            base, arms = rows[0][0], [row[0] for row in rows[1:]]
            assert f"less {base} [95 %]" in header
            differences = {arm: runs.difference(arm, base, steps) for arm in arms}
            several = [arm for arm in arms if len(differences[arm]) > 1]
            p = {arm: again.interval(differences[arm])[3] for arm in several}
            adjusted = dict(zip(several, again.holm(p.values()), strict=True))
            losses = {arm: runs.loss(arm, steps) for arm in [base, *arms]}
            pooled = again.pooled(losses, base) if several else {}
            for row in rows:
                where, arm, loss = f"{title}, {steps} steps, {row[0]}", row[0], losses[row[0]]
                spread = [(loss.std(ddof=1), ".4f")] if len(loss) > 1 else []
                check(where, row[1], (loss.mean(), ".4f"), *spread, (len(loss), "d"))
                if arm == base:
                    continue
                _comparison(where, row[2:], runs, arm, base, steps, adjusted.get(arm), pooled.get(arm))
                checked += 1
    assert checked


def _comparison(where, cells, runs, arm, base, steps, adjusted, pooled):
    differences = runs.difference(arm, base, steps)
    n = len(differences)
    if n > 1:
        mean, low, high, p, sd = again.interval(differences)
        smallest = (again.detectable(n) * sd, ".4f")
        check(where, cells[0], (mean, "+.4f"), (low, "+.4f"), (high, "+.4f"), (n, "d"), smallest)
        check(where, cells[1], (p, ".2g"))
        check(where, cells[2], (adjusted, ".2g"))
    else:
        check(where, cells[0].split(":")[0], (differences.iloc[0], "+.4f"), (1, "d"))
        assert cells[1:3] == ["–", "–"]
    check(where, cells[3], *[(value, "+.4f") for value in pooled or ()])
    # Another generator: the ends differ by Monte Carlo error, of standard deviation 0.02 widths (2,000 draws).
    printed = np.asarray([float(x) for x in NUMBER.findall(cells[4])])
    ours = again.bootstrap(runs, arm, base, steps)
    assert len(printed) == 2, where
    assert np.abs(printed - ours).max() < 0.1 * (ours[1] - ours[0]), f"{where}: {cells[4]!r}, {ours}"
    if shares := again.share_of_steps(runs, arm, base, steps):
        middle, low, high, coverage = again.median_interval(shares)
        ends = [(low, ".2f"), (high, ".2f"), (100 * coverage, ".0f")] if n > 1 else []
        capped = [(math.inf if value > 1 else value, form) for value, form in [(middle, ".2f"), *ends][:3]]
        check(where, cells[5], *capped, *ends[2:])
    else:
        assert cells[5] == "–"


@of_every_report
def test_headline(folder):
    """Sentences on each arm: effect, verdict, and where it gets ahead."""
    runs, sections = read(folder)
    tokens_per_step = int(re.search(r"([\d,]+) tokens a step", "".join(sections.values()))[1].replace(",", ""))
    lines = re.findall(r"^- ([\w.]+)( after [\d,]+ steps)? (is .*)", sections[""], re.MULTILINE)
    longest = int(re.search(r"\(([\d,]+) steps\):", sections[""])[1].replace(",", ""))
    for arm, after, text in lines:
        side, base, numbers = re.match(r"is (better than|worse than|not told apart from) ([\w.]+): (.*)", text).groups()
        steps = int(NUMBER.search(after)[0].replace(",", "")) if after else longest
        differences = runs.difference(arm, base, steps)
        n, (mean, low, high, p, sd) = len(differences), again.interval(differences)
        assert side == ("better than" if high < 0 else "worse than" if low > 0 else "not told apart from")
        own, _, ahead = numbers.partition(" Its mean loss ")
        smallest = (again.detectable(n) * sd, ".4f")
        check(arm, own, (mean, "+.4f"), (low, "+.4f"), (high, "+.4f"), (n, "d"), (p, ".2g"), smallest)
        if "from about" in ahead:
            horizons = runs.horizons(arm, base)
            tokens = [steps * tokens_per_step for steps in horizons]
            effects = [again.interval(runs.difference(arm, base, steps))[:3] for steps in horizons]
            roots = [again.zero(tokens, column) / 1e6 for column in zip(*effects, strict=True)]
            check(arm, ahead, *[(root, ".2f") for root in roots])


def _verdict(rule, margin, values):
    """Verdict of an interval under a rule of claims.toml that decides."""
    _, low, high, _, _ = again.interval(values)
    if rule == "above":
        return "supported" if low > 0 else "contradicted" if high < 0 else "undecided"
    if rule == "within":
        inside, outside = -margin < low and high < margin, low > margin or high < -margin
        return "supported" if inside else "contradicted" if outside else "undecided"
    bound = margin if rule == "not_above" else 0
    return "supported" if high < bound else "contradicted" if low > bound else "undecided"


def claim_parts(text, runs_of):
    """Check the table of parts; (claim → verdicts of its parts, claim → steps, standard deviations of losses)."""
    verdicts, horizons, spreads, deciding = {}, {}, [], []
    (_, rows) = next(table for table in tables(text) if table[0][1] == "quantity")
    for row in rows:
        claim = CLAIMS[int(row[0])]
        part = next(part for part in claim["part"] if row[1].startswith(part["what"]))
        steps = int(re.search(r"at ([\d,]+) steps", row[3])[1].replace(",", ""))
        runs, where, ours = runs_of(claim["suite"]), " ".join(row[:2]), row[3].split(" at ")[0]
        horizons[row[0]] = steps
        if part["rule"] == "less_variance":
            first, second = (runs.expression(term, steps) for term in part["value"].split(" - "))
            p = pearsonr(first + second, first - second).pvalue
            check(where, ours, (first.var(ddof=1) / second.var(ddof=1), ".3g"), (len(first), "d"))
            verdict = "undecided" if p > 0.05 else "supported" if first.var() < second.var() else "contradicted"
        else:
            values = runs.expression(part["value"], steps)
            sd, p = again.interval(values)[4], again.interval(values)[3]
            effect(where, ours, values)
            check(where, row[7], *[(again.detectable(len(values)) * sd, ".4f")] * (len(values) > 1))
            if part["value"].startswith("loss[") and sd > 0:
                spreads.append(sd)
            if row[8] != "–":
                enough(where, row[8], part["published"] / sd)
            verdict = "" if part["rule"] == "shown" else _verdict(part["rule"], part.get("margin", 0), values)
        check(where, row[4], *[(p, ".2g")] * (not math.isnan(p)))
        assert row[2].endswith(f": {verdict}") if verdict else row[2] == "shown only"
        verdicts.setdefault(row[0], []).append(verdict)
        if verdict and not math.isnan(p):
            deciding.append((where, row[5], p))
    for (where, cell, _), p in zip(deciding, again.holm([p for *_, p in deciding]), strict=True):
        check(where, cell, (p, ".2g"))
    return verdicts, horizons, spreads


def enough(where, cell, effect):
    """The cell is the number of seeds from which an effect, in standard deviations, is found with 80 % power."""
    if cell.startswith("more than"):
        assert again.power(abs(effect), 1000) < 0.8, where
        return
    n = int(cell)
    before = n - 10 if n > 50 else n - 1
    assert again.power(abs(effect), n) > 0.7995, where
    assert before < 2 or again.power(abs(effect), before) < 0.8005, where


@of_every_report
def test_claims_of_a_suite(folder):
    runs, sections = read(folder)
    if "| quantity |" not in sections.get("Claims", ""):
        pytest.skip("no claim of this suite has runs")
    claim_parts(sections["Claims"], lambda suite: runs)


def test_all_claims():
    """Every part, its p after Holm over all suites, the verdicts, what a claim lacks, and the counts."""
    text = (RESULTS / "claims.md").read_text()
    verdicts, horizons, spreads = claim_parts(text, lambda suite: again.Runs(RESULTS / suite))
    spread, counts, complete = float(np.median(spreads)), {}, 0
    for number, _, verdict, lacks in tables(text)[0][1]:
        claim, parts = CLAIMS[int(number)], [v for v in verdicts.get(number, []) if v]
        own = "contradicted" if "contradicted" in parts else "undecided" if "undecided" in parts else "supported"
        if number not in horizons:
            own = "not tested"
        elif horizons[number] < claim.get("min_steps", 0):
            own = "below the crossing"
        assert verdict == f"**{own}**", number
        counts[own] = counts.get(own, 0) + 1
        complete += number in horizons and bool(re.fullmatch(r"nothing|[^;]*seeds would find effects [^;]*", lacks))
        if find := re.search(r"which find ([\d.]+) nats", lacks):
            check(number, find[1], (again.detectable(5) * spread, ".3f"))
        if find := re.search(r"the published ([\d.]+) needs (.*) seeds", lacks):
            published = [abs(p["published"]) for p in claim["part"] if "loss[" in p["value"] and "published" in p]
            enough(number, find[2], min(published) / spread)
    for verdict, count in re.findall(r"(\w[\w ]+): (\d+)", text.split("\n\n")[1]):
        assert counts.get(verdict, 0) == int(count), verdict
    assert f"{complete} of {len(CLAIMS)} meet all criteria" in text


@of_every_report
def test_learning_rates(folder):
    runs, sections = read(folder)
    text = sections["Learning rates"]
    if "**Not tuned:**" in text:
        assert runs.all.groupby("variant").learning_rate.nunique().max() == 1
        return
    sweep = re.search(r"reserved seeds (\d+) for ([\d,]+) steps(?:.*?\(seed (\d+)\))?", text)
    reserved, horizon, checked = (int(number.replace(",", "")) if number else -1 for number in sweep.groups())
    for arm, rate, tuned, tried in tables(text)[0][1]:
        losses = {}
        for lr, loss, steps in re.findall(r"([\d.]+): ([\d.]+) \(([\d,]+)\)", tried):
            steps = int(steps.replace(",", ""))
            losses[steps, float(lr)] = runs.rates(arm, float(lr), steps, reserved if steps == horizon else checked)
            check(f"{arm}, {lr}", loss, (losses[steps, float(lr)], ".4f"))
        if "not tuned" not in tuned:
            longest = max(steps for steps, _ in losses)
            at_longest = {lr: loss for (steps, lr), loss in losses.items() if steps == longest}
            assert float(rate) == min(at_longest, key=at_longest.__getitem__)


@of_every_report
def test_cost(folder):
    runs, sections = read(folder)
    suite = load_suite(str(next(ROOT.glob(f"configs/ablations/{sections[''].split()[1]}.py"))), "laptop")
    for arm, _, total, active, steps, model, executed, _, dropped in tables(sections["Cost"])[0][1]:
        steps = int(steps.replace(",", ""))
        assert steps == runs.fullest(arm)
        flops = runs.last(arm, steps, "flops").iloc[0]
        check(arm, total, (runs.last(arm, steps, "total_parameters").iloc[0] / 1e6, ".2f"))
        check(arm, active, (runs.last(arm, steps, "active_parameters").iloc[0] / 1e6, ".2f"))
        check(arm, model, (flops, ".3g"))
        share = runs.rows(arm, steps, "train_fraction_tokens_dropped").value.mean()
        share = 0.0 if math.isnan(share) else share
        check(arm, dropped, (100 * share, ".2f"))
        config = suite.config(arm, steps=steps)
        matrices = 3 if config.model.activation in ("swiglu", "geglu") else 2
        layers = runs.per_layer(arm, steps, "max_violation").shape[1]
        hidden = config.model.moe.experts_per_token * config.model.moe.d_ff
        tokens = steps * config.train.batch_size * config.data.sequence_length
        saved = 6 * tokens * layers * matrices * config.model.d_model * hidden * share
        check(arm, executed, (flops - saved, ".3g"))


@of_every_report
def test_domains_routing_and_probes(folder):
    runs, sections = read(folder)
    header, rows = tables(sections["Held-out loss per domain"])[0]
    for arm, steps, *cells in rows:
        assert int(steps.replace(",", "")) == runs.fullest(arm)
        for domain, cell in zip(header[2:], cells, strict=True):
            mean_sd(f"{arm}, {domain}", cell, [runs.last(arm, runs.fullest(arm), "loss", domain)])
    for arm, _, n, *cells in tables(sections["Routing at the last step"])[0][1]:
        names = ("max_violation", "router_entropy", "dead_experts", "train_fraction_tokens_dropped")
        for name, cell in zip(names, cells, strict=True):
            values = runs.per_layer(arm, runs.fullest(arm), name)
            assert len(values) == int(n)
            check(f"{arm}, {name}", cell, *[(mean, ".2f") for mean in values.mean()])
    for arm, quantity, n, cell in tables(sections.get("Probes of the trained models", "| a |\n|---|\n"))[0][1]:
        values = runs.per_layer(arm, runs.data[runs.data.quantity == quantity].steps.max(), quantity)
        assert len(values) == int(n)
        mean_sd(f"{arm}, {quantity}", cell, [values[layer] for layer in values])


@of_every_report
def test_law_and_runs(folder):
    runs, sections = read(folder)
    source = sections["Where the numbers come from"]
    seconds = [json.loads(path.read_text())["seconds"] for path in (folder / "records").glob("*.json")]
    key = ["variant", "steps", "learning_rate", "seed"]
    counts = [(len(seconds), "d"), (runs.data.groupby(key).ngroups, "d"), (sum(seconds) / 3600, ".1f")]
    assert len(seconds) == runs.all.groupby(key).ngroups
    check("runs", re.search(r"Runs: (.*)\.", source)[1], *counts)
    if "log L =" not in sections.get("Law of experts and tokens", ""):
        return
    text, rows = sections["Law of experts and tokens"], tables(sections["Law of experts and tokens"])[0][1]
    tokens = int(re.search(r"([\d,]+) tokens a step", source)[1].replace(",", ""))
    points = {
        (int(arm.removeprefix("experts_")), steps * tokens): runs.loss(arm, steps).mean()
        for arm in runs.data.variant.unique()
        for steps in runs.horizons(arm)
    }
    fit, errors, sd, residuals = again.law(points)
    for name, value, error in zip("dabc", fit, errors, strict=True):
        check(name, re.search(rf" {name} = ([^,(]*)", text)[1], (value, ".4g"), (error, ".2g"))
    check("law", re.search(r"residual standard deviation ([\d.]+\d)", text)[1], (sd, ".4f"))
    printed = {(int(row[0]), row[1]): row for row in rows}
    for ((experts, seen), loss), residual in zip(points.items(), residuals, strict=True):
        row = printed[experts, f"{seen / 1e6:.2g}M"]
        check("law", " ".join(row[2:]), (loss, ".4f"), (loss / math.exp(residual), ".4f"), (residual, "+.4f"))


def test_table_of_specialisation_in_the_readme():
    """Means of specialisation.csv, and the interval of lexical class less domain."""
    data = pd.read_csv(RESULTS / "switch_vs_mixtral/specialisation.csv", dtype={"layer": str})
    means = data.groupby(["layer", "router", "label"]).explained.mean()
    (_, rows) = next(table for table in tables((RESULTS / "README.md").read_text()) if table[0][0] == "layer")
    for layer, *cells in rows[:-1]:
        pairs = itertools.product(("lexical_matched", "domain_matched", "token"), ("trained", "untrained"))
        for cell, (label, router) in zip(cells[:-1], pairs, strict=True):
            check(f"layer {layer}, {label}", cell, (means[layer, router, label], ".3f"))
        trained = data[(data.router == "trained") & (data.layer == layer)].pivot_table("explained", "seed", "label")
        mean, low, high, _, _ = again.interval(trained.lexical_matched - trained.domain_matched)
        check(f"layer {layer}", cells[-1], (mean, "+.3f"), (low, "+.3f"), (high, "+.3f"))
    for cell, label in ((rows[-1][1], "lexical_matched"), (rows[-1][3], "domain_matched"), (rows[-1][5], "token")):
        check(label, cell, (data[(data.router == "hash") & (data.label == label)].explained.mean(), ".3f"))
