"""Every number in the committed reports follows from the records, as recomputed by :mod:`tests.recomputation`.

The reports are those under docs/results and one of random records, so that the computation is tested whatever has been
run.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from moe.lab.claims.registration import Claim, Part, Primary, Registered
from moe.lab.report import answer, claims_page, page
from moe.lab.step_seconds import StepSeconds
from moe.lab.suite import Comparison, Sweep, Variant
from tests import recomputation as again
from tests.lab_helpers import CLAIMS, record, shipped_suite, suite_of, table, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"
REPORTS = [path.parent for path in sorted(RESULTS.rglob("report.md"))]
NUMBER = re.compile(r"[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?|inf")
PRIMARY = ("literature", "python")


def claims_of(path):
    return {claim["number"]: claim for claim in tomllib.loads(path.read_text())["claim"]}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder of the report, its suite, claims): five arms of six seeds, a sweep, drops, probes."""
    rng, runs, steps = np.random.default_rng(3), [], 80
    free = {"model.moe.gate": "switch", "model.moe.dispatch": "dropless"}
    arms = {
        "dense": Variant({"model.moe.gate": "none"}),
        **{name: Variant(fields, rate_from="dense") for name, fields in {
            "free": free, "drop": {"model.moe.gate": "switch"}, "top2": free | {"model.moe.gate": "mixtral"}
        }.items()},
    }  # fmt: skip
    arms["top2"] = dataclasses.replace(arms["top2"], probes=("specialisation",))
    suite = suite_of(
        arms, {"all": Comparison("dense", ("free", "drop", "top2"), ("steps",), whole="top2")},
        seeds=(1, 2, 3, 4, 5, 6), horizons=(steps,), sweep=Sweep((1e-3, 3e-3, 9e-3), (7, 8)),
        dropping_differs="drawn at random",
        domain_tokens={"literature": 10**6, "python": 10**6}, experts={"dense": 1, "free": 8, "drop": 16, "top2": 64},
    )  # fmt: skip
    registered = Registered(
        tuple(
            Claim(n, "test", f"claim {n}", "a paper", (Part(f"part {n}", *part),), 10, "", family)
            for n, (*part, family) in enumerate((
                ("below", "loss[free] - loss[dense]", 0.0, -0.1, "primary"),
                ("above", "0.5 loss[drop] - 0.5 loss[free]", 0.0, None, "primary"),
                ("within", "loss[top2] - loss[free]", 0.1, None, "primary"),
                ("not_above", "own_loss[drop] - loss[drop]", 0.05, 0.2, ""),
                ("shown", "load[drop, layer=1] - last_tenth_loss[free]", 0.0, None, ""),
                ("less_variance", "loss[free] - loss[dense]", 0.0, None, ""),
                ("below", "loss[free] - loss[dense]", 0.0, None, "replication"),
                ("above", "0.5 loss[drop] - 0.5 loss[free]", 0.0, None, "replication"),
            ), start=1)
        ),
        Primary("which?", (1, 2, 3), 0.02, 0.05, "none"),
        "d1635",
    )  # fmt: skip
    hashes = {str(claim.number): claim.hash for claim in registered.claims}
    for arm, mean in (("dense", 3.5), ("free", 3.4), ("drop", 3.45), ("top2", 3.38)):
        for seed in (*suite.seeds, *((7, 8) if arm == "dense" else ())):
            for rate in (1e-3, 3e-3, 9e-3) if seed > 6 else (3e-3,):
                losses = mean + abs(rate - 3e-3) * 50 + rng.normal(0, 0.03) + rng.normal(0, 0.1, (8, 2))
                runs.append(_drawn_run(rng, arm, seed, rate, losses.round(6), steps, hashes))
    folder = tmp_path_factory.mktemp("drawn")
    found = table(suite, runs)
    page.write(folder / "test", {"test": found}, suite, registered, "COMMAND")
    claims_page.write_page(folder, registered, {"test": found})
    seconds = StepSeconds({arm: (0.1, 0.12, 0.2) for arm in suite.variants}, 5, "1 x cpu", "abc")
    answer.write_page(folder, found, registered, seconds, [found])
    claims = {
        claim.number: {"part": [dict(vars(part)) for part in claim.parts], "family": claim.family}
        for claim in registered.claims
    }
    return folder / "test", suite, claims


def _drawn_run(rng, arm, seed, rate, losses, steps, hashes):
    means = dict(zip(PRIMARY, losses.mean(0), strict=True))
    rows = [(step, "loss", name, "", mean + steps / step - 1) for step in (20, 50, 80) for name, mean in means.items()]
    rows += [(step, "loss", "primary", "", losses.mean() + steps / step - 1) for step in (20, 50, 80)]
    rows += [(steps, "own_loss", name, "", mean + 0.01) for name, mean in means.items()]
    rows += [(steps, "own_loss", "primary", "", losses.mean() + rng.uniform(0, 0.02))]
    rows += [(steps, "last_tenth_loss", "", "", losses.mean() - 0.1 + rng.normal(0, 0.01))]
    for layer in ("0", "1") if arm != "dense" else ():
        rows += [(steps, name, "", layer, rng.uniform(0, 2)) for name in ("max_violation", "router_entropy", "load")]
        rows += [(steps, "dead_experts", "", layer, float(seed % 2))]
        dropped = [(step, "train_fraction_tokens_dropped", "", layer, rng.uniform(0, 0.2)) for step in (40, 80)]
        rows += dropped if arm == "drop" else [(*row[:4], 0.0) for row in dropped]
    return record(
        arm, seed, 0.0, steps, rate, rows=rows, row_domains=list(PRIMARY) * 8, row_losses=losses.ravel().tolist(),
        claims=hashes, probes=_drawn_probes(rng) if arm == "top2" else {},
    )  # fmt: skip


def _drawn_probes(rng):
    names = ("explained_token", "untrained_explained_token", "explained_lexical_matched")
    found = {f"specialisation/{name}@{layer}": rng.uniform() for name in names for layer in (0, 1)}
    masks = ("full", "0.0625", "0.125")
    return found | {f"mask_top/loss_{share}": rng.uniform(3, 4) for share in masks}


@pytest.fixture(scope="module", params=["drawn", *REPORTS], ids=lambda folder: getattr(folder, "name", folder))
def report(request, drawn):
    """(runs, section title → text, suite, claims) of a report."""
    if request.param == "drawn":
        folder, suite, claims = drawn
    else:
        folder, claims = request.param, claims_of(ROOT / "configs/ablations/claims.toml")
        suite = shipped_suite(folder.name)
    return read(folder, suite), sections_of(folder / "report.md"), suite, claims


def read(folder, suite):
    rates = {}
    text = sections_of(folder / "report.md")["Learning rates"]
    for arm, steps, rate, *_ in tables(text)[0][1] if "**Not tuned:**" not in text else ():
        rates[arm, int(steps.replace(",", ""))] = float(rate)
    return _runs(folder / "records.parquet", frozenset(suite.reserved_seeds), tuple(rates.items()))


@functools.lru_cache(maxsize=4)
def _runs(path, reserved, rates):
    return again.read_records(path, reserved, dict(rates))


def sections_of(path):
    title, *sections = re.split(r"\n## ", path.read_text())
    return {"": title} | dict(section.split("\n", 1) for section in sections)


def check(where, cell, *values):
    """Check that a cell's numbers, in order, are these (value, format) pairs; the CSV keeps seven digits of a value."""
    printed = NUMBER.findall(cell.replace("> 1", "inf").replace("beyond the longest horizon", "inf"))
    assert len(printed) == len(values), f"{where}: {cell!r} has not {len(values)} numbers"
    for text, (value, form) in zip(printed, values, strict=True):
        slack = 2e-6 * max(1.0, abs(value)) if form.endswith("f") else 1e-3 * abs(value)
        allowed = {format(v, form) for v in ((value - slack, value, value + slack) if form != "d" else (value,))}
        assert text in allowed, f"{where}: {cell!r}, {value}"


def effect(where, cell, values):
    """Check a cell "mean [low, high], n = N"."""
    mean, low, high, _, _ = again.interval(values)
    ends = [(low, "+.4f"), (high, "+.4f")] if len(values) > 1 else []
    check(where, cell.removesuffix(": no interval"), (mean, "+.4f"), *ends, (len(values), "d"))


def mean_sd(where, cell, values):
    """Check a cell of "mean ± sd" separated by slashes, one for each series of values."""
    pairs = [(v.mean(), v.std(ddof=1)) if len(v) > 1 else (v.mean(),) for v in values]
    check(where, cell, *[(value, ".4f") for pair in pairs for value in pair])


def interval_cell(where, cell, values):
    """Check a cell "mean [low, high]"."""
    mean, low, high, _, _ = again.interval(values)
    check(where, cell, (mean, "+.4f"), *([(low, "+.4f"), (high, "+.4f")] if len(values) > 1 else []))


def share_cell(where, cell, values, wholes):
    """Check a cell "share [low, high], n = N" of differences by seed, over the seeds that both have."""
    both = pd.concat([values, wholes], axis=1, join="inner").dropna().to_numpy()
    if not len(both):
        assert cell == "–", where
        return
    if not both[:, 0].any():  # the baseline
        assert cell == "0%", where
        return
    ratio, ends = again.share(*both.T) if len(both) > 1 else (both[0, 0] / both[0, 1], None)
    assert ends or "without bounds" in cell, f"{where}: {cell!r}"
    check(where, cell, *[(100 * value, ".0f") for value in (ratio, *(ends or ()))], (len(both), "d"))


def test_comparisons(report):
    runs, sections, suite, _ = report
    checked, primary = 0, suite.primary_domains or PRIMARY
    for title, text in sections.items():
        for steps, block in re.findall(
            r"\*\*([\d,]+) steps, [\d.]+ million tokens\*\*\n\n(?:[^|].*\n\n)*((?:\|.*\n?)+)", text
        ):
            (header, rows), steps = tables(block)[0], int(steps.replace(",", ""))
            base, arms = rows[0][0], [row[0] for row in rows[1:]]
            assert f"difference from {base} [95 %]" in header
            whole = re.fullmatch(r"share of (\w+)'s gain \[95 %\]", header[-1])
            assert bool(whole) == (base == "dense" and title in ("All", "From dense to dense × 8"))
            differences = {arm: runs.difference(arm, base, steps) for arm in arms}
            several = [arm for arm in arms if len(differences[arm]) > 1]
            p = {arm: again.interval(differences[arm])[3] for arm in several}
            adjusted = dict(zip(several, again.holm(p.values()), strict=True))
            losses = {arm: runs.loss(arm, steps) for arm in [base, *arms]}
            pooled = again.pooled(losses, base)
            for row in rows:
                where, arm, loss = f"{title}, {steps} steps, {row[0]}", row[0], losses[row[0]]
                spread = [(loss.std(ddof=1), ".4f")] if len(loss) > 1 else []
                check(where, row[1], (loss.mean(), ".4f"), *spread, (len(loss), "d"))
                if arm != base:
                    found = again.bootstrap(runs, arm, base, steps, primary)
                    _comparison(where, row[2:], runs, (arm, base, steps), adjusted.get(arm), pooled.get(arm), found)
                    if whole:
                        share_cell(where, row[-1], losses[arm] - losses[base], losses[whole[1]] - losses[base])
                    checked += 1
    assert checked or len(runs.data.variant.unique()) == 1


def _comparison(where, cells, runs, point, adjusted, pooled, bootstrap):
    arm, base, steps = point
    differences = runs.difference(*point)
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
    # From another generator: the ends differ by Monte Carlo error, of standard deviation 0.02 widths (2,000 draws).
    printed = np.asarray([float(x) for x in NUMBER.findall(cells[4])])
    assert len(printed) == 2, where
    assert np.abs(printed - bootstrap).max() <= 0.1 * (bootstrap[1] - bootstrap[0]), (
        f"{where}: {cells[4]!r}, {bootstrap}"
    )
    for cell, quantity, domain in ((cells[5], "last_tenth_loss", ""), (cells[6], "own_loss", "primary")):
        ours, theirs = (runs.last(name, steps, quantity, domain) for name in (arm, base))
        interval_cell(f"{where}, {quantity}", cell, (ours - theirs).dropna())
    if shares := again.share_of_steps(runs, arm, base, steps):
        middle, low, high, coverage = again.median_interval(shares)
        ends = [(low, ".2f"), (high, ".2f"), (100 * coverage, ".0f")] if n > 1 else []
        capped = [(math.inf if value > 1 else value, form) for value, form in [(middle, ".2f"), *ends][:3]]
        check(where, cells[7], *capped, *ends[2:])
    else:
        assert cells[7] == "–"


def test_pictures(drawn):
    folder, _, _ = drawn
    shown = re.findall(r"!\[.*\]\((.*)\)", (folder / "report.md").read_text())
    assert set(shown) == {
        f"{name}.png" for name in ("effects", "losses", "curves", "sweep", "routing", "specialisation_top2", "masked")
    }
    assert all((folder / name).stat().st_size > 1000 for name in shown)


def test_headline(report):
    """Each arm's sentence states the effect of its paired differences, and its side."""
    runs, sections, _, _ = report
    lines = re.findall(r"^- ([\w.]+) (is .*)", sections[""], re.MULTILINE)
    for arm, text in lines:
        pattern = r"is (better than|worse than|not significantly different from) ([\w.]+): (.*)"
        side, base, numbers = re.match(pattern, text).groups()
        differences = runs.difference(arm, base, max(runs.horizons(arm, base)))
        n, (mean, low, high, p, sd) = len(differences), again.interval(differences)
        assert side == ("better than" if high < 0 else "worse than" if low > 0 else "not significantly different from")
        smallest = (again.detectable(n) * sd, ".4f")
        check(arm, numbers, (mean, "+.4f"), (low, "+.4f"), (high, "+.4f"), (n, "d"), (p, ".2g"), smallest)


def against(values, bound):
    """Two-sided p-value of the hypothesis that the mean is at the bound."""
    return 1.0 if len(values) < 2 else stats.ttest_1samp(values, bound).pvalue


def test_claims(report):
    """The parts of a suite's claims: effect, side, p, bound, replication."""
    runs, sections, _, claims = report
    if "| quantity |" not in sections.get("Claims", ""):
        pytest.skip("no claim of this suite has runs")
    (_, rows) = next(found for found in tables(sections["Claims"]) if found[0][1] == "quantity")
    for row in rows:
        claim = claims[int(row[0])]
        part = next(part for part in claim["part"] if row[1].startswith(part["what"]))
        steps = int(re.search(r"at ([\d,]+) steps", row[3])[1].replace(",", ""))
        where, ours = " ".join(row[:2]), row[3].split(" at ")[0]
        if part["rule"] == "less_variance":
            first, second = (runs.expression(term, steps) for term in part["value"].split(" - "))
            first, second = first.align(second, join="inner")  # one arm may have more seeds
            p = stats.pearsonr(first + second, first - second).pvalue
            check(where, ours, (first.var(ddof=1) / second.var(ddof=1), ".3g"), (len(first), "d"))
            check(where, row[4], (p, ".2g"))
            continue
        values = runs.expression(part["value"], steps)
        mean, low, high, p, sd = again.interval(values)
        effect(where, ours, values)
        margin = part.get("margin") or 0.0
        inside = {
            "below": high < 0, "above": low > 0, "not_above": high < margin, "within": -margin < low and high < margin
        }.get(part["rule"])  # fmt: skip
        outside = {
            "below": low > 0, "above": high < 0, "not_above": low > margin, "within": low > margin or high < -margin
        }.get(part["rule"])  # fmt: skip
        if part["rule"] != "shown" and row[1].endswith("(the arms are the same runs)"):
            assert (values == 0).all()
            assert row[2].endswith(": open"), where
            check(where, row[4], (1.0, ".2g"))
            continue
        if part["rule"] != "shown":
            side = "on its side" if inside else "on the other side" if outside else "open"
            assert row[2].endswith(f": {side}"), where
            bounds = {"not_above": margin, "within": math.copysign(margin, mean)}
            p = against(values, bounds.get(part["rule"], 0.0))
            if side == "open" and len(values) > 1:
                check(where, row[6], (max(abs(low), abs(high)), ".4f"))
        check(where, row[4], *([(p, ".2g")] if len(values) > 1 else []))
        check(where, row[9], *([(again.detectable(len(values)) * sd, ".4f")] if len(values) > 1 else []))
        if part.get("differs"):
            assert row[7].endswith(f"({part['differs']})")
            assert row[8] == "–", where
        elif part.get("published") is not None and len(values) > 1:
            assert row[8] == ("contains it" if low <= part["published"] <= high else "excludes it"), where


@pytest.mark.parametrize("folder", ["drawn", *([RESULTS] if (RESULTS / "claims.md").exists() else [])])
def test_verdicts(folder, drawn):
    """Verdicts on both pages agree with Holm's p over the whole family, and their counts are right."""
    _, _, claims = drawn
    folder = drawn[0].parent if folder == "drawn" else folder
    if folder == RESULTS:
        claims = claims_of(ROOT / "configs/ablations/claims.toml")
    families = {n: claim["family"] for n, claim in claims.items() if claim.get("family")}
    primary = [number for number, family in families.items() if family == "primary"]
    text = (folder / "claims.md").read_text()
    found = tables(text)
    verdicts = {int(row[0]): row[2].strip("*") for row in found[0][1]}
    rows = next((rows for header, rows in found if header[1] == "quantity"), [])
    raw = {int(row[0]): float(row[4]) for row in rows if int(row[0]) in families and row[4] != "–"}
    tested = {number for number in raw if verdicts[number] not in ("not tested", "too few steps")}
    adjusted = {}
    for name in set(families.values()):
        members = [number for number, family in families.items() if family == name]
        adjusted |= zip(members, again.holm([raw[n] if n in tested else 1.0 for n in members]), strict=True)
    sides = {int(row[0]): row[2] for row in rows}
    for row in rows:
        if (number := int(row[0])) in families and row[5] != "–":
            assert float(row[5]) == pytest.approx(adjusted[number], rel=0.06)  # from the printed p
    for number, verdict in verdicts.items():
        if verdict in ("supported", "contradicted"):
            assert number in families
            assert adjusted[number] < 0.051
            assert ("on its side" in sides[number]) == (verdict == "supported")
        elif number not in families:
            assert verdict.startswith("exploratory") or verdict in ("not tested", "too few steps")
    counts = dict(re.findall(r"([a-z][a-z :]+): (\d+)", text.split("\n\n")[1]))
    for verdict, count in counts.items():
        assert list(verdicts.values()).count(verdict) == int(count)
    answer_text = (folder / "switch_or_mixtral.md").read_text()
    shown = tables(answer_text)[0][1]
    assert [row[3].strip("*") for row in shown] == [verdicts[number] for number in primary]
    again_shown = tables(answer_text.partition("## Other seeds")[2])[0][1]
    members = [number for number, family in families.items() if family == "replication"]
    assert [row[3].strip("*") for row in again_shown] == [verdicts[number] for number in members]
    if not any("interim" in row[6] for row in again_shown):
        value = {number: claims[number]["part"][0]["value"] for number in families}
        decided = [n for n in primary if verdicts[n] in ("supported", "contradicted")]
        pairs = [(n, m) for n in decided for m in members if value[n] == value[m]]
        agree = sum(verdicts[n] == verdicts[m] for n, m in pairs)
        text = f"of the {len(pairs)} that were decided on the first seeds, {agree} have the same verdict"
        assert text in answer_text


@pytest.mark.parametrize("which", ["drawn", "committed"])
def test_contrasts_over_training(which, drawn):
    """Every cell follows from the evaluations of the runs after 1, 1/2, 1/4, … of their steps."""
    folder, suite, claims = drawn
    path, longest = folder.parent / "switch_or_mixtral.md", 80
    if which == "committed":
        path, longest = RESULTS / "switch_or_mixtral.md", 8000
        suite = shipped_suite("switch_vs_mixtral")
        claims, folder = claims_of(ROOT / "configs/ablations/claims.toml"), RESULTS / suite.name
    runs = read(folder, suite)
    values = {c["part"][0]["what"]: c["part"][0]["value"] for c in claims.values() if c.get("family") == "primary"}
    (_, *columns), rows = tables(path.read_text().partition("## Over training")[2])[0]
    assert len(rows) == len(values)
    parameters = suite.costs(next(iter(suite.variants)))["active_parameters"]
    for what, *cells in rows:
        for title, cell in zip(columns, cells, strict=True):
            step = round(float(title.split()[0]) * parameters / suite.tokens_per_step / longest * 16) * longest // 16
            found = runs.expression(values[what], longest, until=step)
            interval_cell(what, cell.partition(", n =")[0], found)
            assert cell.endswith(f"n = {len(found)}")


@pytest.mark.parametrize("which", ["drawn", "committed"])
def test_arms_of_the_answer(which, drawn):
    """Losses of each arm by every way of measuring them, its dropped assignments and its step time."""
    folder, suite, _ = drawn
    path, steps, seconds = folder.parent / "switch_or_mixtral.md", 80, dict.fromkeys(suite.variants, (0.1, 0.12, 0.2))
    if which == "committed":
        path, steps = RESULTS / "switch_or_mixtral.md", 8000
        suite = shipped_suite("switch_vs_mixtral")
        folder = RESULTS / suite.name
        seconds = json.loads((folder / "step_seconds.json").read_text())["arms"]
    runs = read(folder, suite)
    scale, arm = (
        (runs, "top2")
        if which == "drawn"
        else (_runs(RESULTS / "controls/records.parquet", frozenset(), ()), "dense_x8")
    )
    whole = scale.loss(arm, steps) - scale.loss("dense", steps)
    for arm, _, loss, own, last, *others in tables(path.read_text().partition("## Arms")[2])[0][1]:
        unseen, (bits, dropped, share, milliseconds) = others[: len(suite.unseen)], others[len(suite.unseen) :]
        if suite.token_bytes:
            domains = {d: runs.last(arm, steps, "loss", d).mean() / suite.token_bytes[d] for d in suite.primary_domains}
            check(arm, bits, (sum(domains.values()) / len(domains) / math.log(2), ".4f"))
        share_cell(f"{arm}, share", share, runs.loss(arm, steps) - scale.loss("dense", steps), whole)
        for cell, values in (
            (loss, runs.loss(arm, steps)),
            (own, runs.last(arm, steps, "own_loss", "primary")),
            (last, runs.last(arm, steps, "last_tenth_loss")),
            *zip(unseen, (runs.last(arm, steps, "loss", name) for name in suite.unseen), strict=True),
        ):
            further = [(len(values), "d")] if cell is loss else []
            check(arm, cell, (values.mean(), ".4f"), (values.std(ddof=1), ".4f"), *further)
        rate = runs.rows(arm, steps, "train_fraction_tokens_dropped").value.mean()
        check(arm, dropped, (0.0 if math.isnan(rate) else 100 * rate, ".1f"))
        check(arm, milliseconds, *([(1000 * seconds[arm][1], ".0f")] if arm in seconds else []))


def test_contrasts_of_the_committed_answer_elsewhere():
    """Every row of these sections follows from the value that it prints, or that its contrast was registered with."""
    page, runs = sections_of(RESULTS / "switch_or_mixtral.md"), {}
    for name in ("switch_vs_mixtral", "replication", "initial_scale"):
        suite = shipped_suite(name)
        runs[name] = read(RESULTS / name, suite)
    first, other, scales = runs.values()
    for what, *cells, value in tables(page["One factor at a time"])[0][1]:
        found = [table_.expression(value.strip("`"), 8000) for table_ in (first, other)]
        for cell, values in zip(cells, [*found, pd.concat(found)], strict=True):
            if len(values):
                effect(what, cell, values)
            else:
                assert cell == "–"
    for what, cell, value in tables(page["Initial scale"])[0][1]:
        effect(what, cell, scales.expression(value.strip("`"), 8000))
    registered = claims_of(ROOT / "configs/ablations/claims.toml").values()
    values = {c["part"][0]["what"]: c["part"][0]["value"] for c in registered if c.get("family") == "primary"}
    for what, *by_domain, mean, share in tables(page["Unseen text"])[0][1]:
        found = [first.expression(values[what], 8000, domain=name) for name in ("unseen_book", "unseen_package")]
        for cell, each in zip([*by_domain, mean], [*found, sum(found) / 2], strict=True):
            effect(what, cell, each)
        ratio, ends = again.share(sum(found) / 2, first.expression(values[what], 8000))
        assert ends or "without bounds" in share
        check(what, share, *[(100 * number, ".0f") for number in (ratio, *(ends or ()))])
    seconds = json.loads((RESULTS / "switch_vs_mixtral/step_seconds.json").read_text())["arms"]
    for arm, mark, share, tokens, time in tables(page["Speed-up"])[0][1]:
        shares = again.share_of_steps(first, arm, mark, 8000)
        middle, low, high, _ = again.median_interval(shares)
        ends = [(math.inf if value > 1 else value, ".2f") for value in (middle, low, high)]
        check(arm, share, *ends, (len(shares), "d"))
        check(arm, tokens, (1 / middle, ".2f"))
        check(arm, time, (seconds[mark][1] / seconds[arm][1] / middle, ".2f"))


def test_the_first_paragraph_of_the_committed_answer():
    """Its numbers are those of the sections below it, or of the records."""
    page = sections_of(RESULTS / "switch_or_mixtral.md")
    trend = re.search(r"Along the runs, (.*?) is (.*?) nats at ([\d, ]+) tokens", page[""])
    row = next(row for row in tables(page["Over training"])[0][1] if row[0] == trend[1])
    assert trend[2].split(", ") == [f"{float(cell.split()[0]):+.3f}" for cell in row[1:]]
    unseen = next(row for row in tables(page["Unseen text"])[0][1] if row[0] == trend[1])
    scale = {row[0]: row[1] for row in tables(page["Initial scale"])[0][1]}
    found = re.findall(r"([+-]\d\.\d{3}) \[([+-]\d\.\d{3}), ([+-]\d\.\d{3})\]", page[""])
    sources = (unseen[3], scale["loss, 0.1 − 1.0, Switch's arm"],
               scale["loss, Mixtral's arm at 1.0 − Switch's at its paper's 0.1"])  # fmt: skip
    for printed, source in zip(found, sources, strict=True):
        for text, exact in zip(printed, NUMBER.findall(source), strict=False):
            assert abs(float(text) - float(exact)) < 0.00056  # rounded from the value, not from its four digits


@pytest.mark.parametrize("folder", REPORTS, ids=lambda folder: folder.name)
def test_the_page_of_claims_has_the_rows_of_every_report(folder):
    """The numbers of these rows are recomputed by the tests above."""
    page = (RESULTS / "claims.md").read_text()
    for row in re.findall(r"^\| \d+ \|.*n = .*$", sections_of(folder / "report.md").get("Claims", ""), re.MULTILINE):
        assert row in page


def test_effects_of_the_committed_answer():
    text, claims = (RESULTS / "switch_or_mixtral.md").read_text(), claims_of(ROOT / "configs/ablations/claims.toml")
    before = {}
    for family, name, shown in (
        ("primary", "switch_vs_mixtral", text),
        ("replication", "replication", text.partition("## Other seeds")[2]),
    ):
        suite = shipped_suite(name)
        runs = read(RESULTS / suite.name, suite)
        parts = [claim["part"][0] for claim in claims.values() if claim.get("family") == family]
        for part, row in zip(parts, tables(shown)[0][1], strict=True):
            assert row[0] == part["what"]
            values = runs.expression(part["value"], 8000)
            effect(part["what"], row[1], values)
            _, low, high, *_ = again.interval(values)
            check(part["what"], row[4], (max(abs(low), abs(high)), ".4f"))
            if family == "replication":
                effect(part["what"], row[5], pd.concat([before[part["value"]], values]))
            before[part["value"]] = values


def test_paper_tables():
    """Every row whose suite has records follows from its formula in paper_tables.toml."""
    entries = tomllib.loads((ROOT / "configs/ablations/paper_tables.toml").read_text())["table"]
    shown, checked = tables((RESULTS / "paper_tables.md").read_text()), 0
    for entry, (_, rows) in zip(entries, shown, strict=True):
        if not (RESULTS / entry["suite"]).is_dir():
            continue
        names = {row.get("suite", entry["suite"]) for row in entry["row"]}
        suites = [shipped_suite(name) for name in names]
        by_suite = {suite.name: read(RESULTS / suite.name, suite) for suite in suites}
        for row, (what, published, ours, comparison) in zip(entry["row"], rows, strict=True):
            assert published == (f"{row['published']:+.3f}" if "published" in row else "–")
            if comparison.startswith("no "):
                continue
            found = by_suite[row.get("suite", entry["suite"])].expression(row["value"], 8000)
            numbers, _, steps = ours.partition(" at ")
            assert steps == "8,000 steps"
            effect(what, numbers, found)
            _, low, high, *_ = again.interval(found)
            if "published" in row:
                assert comparison.endswith("contains the paper's") == (low <= row["published"] <= high), what
            assert comparison.startswith("not significant") == (low <= 0 <= high), what
            checked += 1
    assert checked > 40


def test_learning_rates(report):
    runs, sections, suite, _ = report
    text = sections["Learning rates"]
    if "**Not tuned:**" in text:
        assert runs.all.groupby("variant").learning_rate.nunique().max() == 1
        return
    header, rows = tables(text)[0]
    rates = [float(rate) for rate in header[4:]]
    for arm, steps, chosen, tuned, *cells in rows:
        steps, source = int(steps.replace(",", "")), suite.variants[arm].rate_from or arm
        losses = {}
        for rate, cell in zip(rates, cells, strict=True):
            if cell != "not run":
                losses[rate] = runs.rates(source, rate, steps, suite.sweep.seeds)
                check(f"{arm}, {rate}", cell, (losses[rate], ".4f"))
        if losses:
            best = min(losses, key=losses.get)
            assert float(chosen) == best
            place = rates.index(best)
            neighbours = rates[max(place - 1, 0) : place] + rates[place + 1 : place + 2]
            assert tuned.startswith("tuned") == all(rate in losses for rate in neighbours)


def test_cost(report):
    runs, sections, suite, _ = report
    for arm, _, total, active, steps, model, executed, _, dropped in tables(sections["Cost"])[0][1]:
        steps = int(steps.replace(",", ""))
        assert steps == runs.fullest(arm)
        expected = suite.costs(arm, steps)
        check(arm, total, (expected["total_parameters"] / 1e6, ".2f"))
        check(arm, active, (expected["active_parameters"] / 1e6, ".2f"))
        check(arm, model, (expected["flops"], ".3g"))
        share = runs.rows(arm, steps, "train_fraction_tokens_dropped").value.mean()
        share = 0.0 if math.isnan(share) else share
        check(arm, dropped, (100 * share, ".1f"))
        config = suite.config(arm, steps=steps)
        matrices = 3 if config.model.activation in ("swiglu", "geglu") else 2
        layers = config.model.num_layers if config.model.moe.gate is not None else 0
        hidden = config.model.moe.experts_per_token * config.model.moe.d_ff
        tokens = steps * config.train.batch_size * config.data.sequence_length
        saved = 6 * tokens * layers * matrices * config.model.d_model * hidden * share
        check(arm, executed, (expected["flops"] - saved, ".3g"))


def test_domains_routing_and_probes(report):
    runs, sections, suite, _ = report
    header, rows = tables(sections["Held-out loss per domain"])[0]
    for arm, steps, *cells in rows:
        assert int(steps.replace(",", "")) == runs.fullest(arm)
        for domain, cell in zip(header[2:], cells, strict=True):
            mean_sd(f"{arm}, {domain}", cell, [runs.last(arm, runs.fullest(arm), "loss", domain)])
    header, rows = tables(sections.get("Effects per domain", "| a |\n|---|\n"))[0]
    for arm, steps, n, *cells in rows:
        for title, cell in zip(header[3:], cells, strict=True):
            domain, base = re.match(r"(\S+), difference from (\S+) \[", title).groups()
            ours, theirs = (runs.last(a, int(steps.replace(",", "")), "loss", domain) for a in (arm, base))
            assert len((ours - theirs).dropna()) == int(n)
            interval_cell(f"{arm}, {domain}", cell, (ours - theirs).dropna())
    for arm, _, n, *cells in tables(sections.get("Routing at the last step", "| a |\n|---|\n"))[0][1]:
        *cells, dropped = cells
        shares = runs.rows(arm, runs.fullest(arm), "train_fraction_tokens_dropped").groupby("layer").value.mean()
        check(arm, dropped, *[(100 * share, ".1f") for share in shares])
        for name, cell in zip(("max_violation", "router_entropy", "dead_experts"), cells, strict=True):
            values = runs.per_layer(arm, runs.fullest(arm), name)
            assert len(values) == int(n)
            moe = suite.config(arm).model.moe
            unit = math.log(moe.num_experts + moe.null_experts) if name == "router_entropy" else 1.0
            check(f"{arm}, {name}", cell, *[(mean / unit, ".2f") for mean in values.mean()])
    for arm, quantity, n, cell in tables(sections.get("Probes of the trained models", "| a |\n|---|\n"))[0][1]:
        values = runs.per_layer(arm, runs.data[runs.data.quantity == quantity].steps.max(), quantity)
        assert len(values) == int(n)
        mean_sd(f"{arm}, {quantity}", cell, [values[layer] for layer in values])


def _read(suite):
    """Tokens that the rows are cut from: T + 1 for T targets."""
    length = suite.base.data.sequence_length
    return suite.longest * suite.tokens_per_step * (length + 1) / length


def test_provenance(report):
    """Number of runs, hours, tokens per active parameter, epochs."""
    runs, sections, suite, _ = report
    source = sections["Where the numbers come from"]
    every = runs.all.groupby(["variant", "steps", "learning_rate", "seed"]).seconds.first()
    compared = runs.data.groupby(["variant", "steps", "learning_rate", "seed"]).ngroups
    counts = [(len(every), "d"), (compared, "d"), (every.sum() / 3600, ".1f")]
    check("runs", re.search(r"Runs: (.*)\.", source)[1], *counts)
    base = next(iter(suite.variants))
    tokens = suite.longest * suite.tokens_per_step
    text = re.search(r"- (.*) training tokens, (.*) per active parameter", source)
    check("tokens", text[1], (tokens / 1e6, ".3g"))
    check("tokens", text[2], (tokens / suite.costs(base)["active_parameters"], ".1f"))
    domains, read = suite.config(base).data.domains, _read(suite)
    for name, size in suite.domain_tokens.items():
        check(name, re.search(rf"{name} ([\d.]+\d)", source)[1], (read / len(domains) / size, ".2f"))


@pytest.mark.parametrize("name", ["claims", "paper_tables"])
def test_lengths_of_runs(name):
    """Tokens per active parameter and epochs of every suite with claims and records, on the pages over all suites."""
    text = re.search(r"Length of the runs.*", (RESULTS / f"{name}.md").read_text())[0]
    found = re.findall(
        r"([a-z_][\w, ]*): ([\d.]+)M training tokens, ([\d. to]+) per active parameter of a suite's first arm; "
        r"epochs: (.*?\d)\.(?: |$)",
        text,
    )
    assert found
    for suites, tokens, each, epochs in found:
        ratios = []
        for suite in map(shipped_suite, suites.split(", ")):
            seen = suite.longest * suite.tokens_per_step
            ratios.append(seen / suite.costs(next(iter(suite.variants)))["active_parameters"])
            check(suite.name, tokens, (seen / 1e6, ".3g"))
            check(suite.name, epochs, *((_read(suite) / 4 / size, ".2f") for size in suite.domain_tokens.values()))
        ends = sorted({f"{min(ratios):.1f}", f"{max(ratios):.1f}"}, key=float)
        assert each == " to ".join(ends)
    expected = {path.parent.name for path in RESULTS.glob("*/records.parquet")} & {claim.suite for claim in CLAIMS}
    if name == "claims":
        assert expected <= {suite for suites, *_ in found for suite in suites.split(", ")}


def test_law(report):
    """The coefficients are the fit at the printed floor, and other floors fit no better."""
    runs, sections, suite, _ = report
    text = sections.get("Law of experts and tokens", "")
    if "L∞ = " not in text:
        pytest.skip("no law was fitted")
    tokens = suite.longest * suite.tokens_per_step
    losses = {suite.experts[arm]: runs.loss(arm, suite.longest).mean() for arm in runs.data.variant.unique()}
    floor = float(re.search(r"L∞ = ([\d.]+\d)", text)[1])

    def fitted(bottom):
        x, y = np.log(list(losses)), np.asarray(list(losses.values()))
        slope, intercept = np.polyfit(x, np.log(y - bottom), 1)
        return slope, intercept, y - bottom - np.exp(intercept + slope * x)

    slope, intercept, residuals = fitted(floor)
    for name, value in (("d", intercept), ("b", slope)):
        assert float(re.search(rf" {name} = ([^ ]*)", text)[1]) == pytest.approx(value, rel=0.01)
    for row, residual in zip(tables(text)[0][1], residuals, strict=True):
        assert row[1] == f"{tokens / 1e6:.3g}M"
        check("law", row[2], (losses[int(row[0])], ".4f"))
        assert float(row[4]) == pytest.approx(residual, abs=2e-4)
    for other in (0.0, 0.9 * floor, min(1.02 * floor, 0.999 * min(losses.values()))):
        assert (residuals**2).sum() <= (fitted(other)[2] ** 2).sum() + 1e-9


# --- Earlier runs ----------------------------------------------------------------------------------------------------
EARLY = RESULTS / "early"


@pytest.fixture(scope="module")
def early():
    data = pd.read_parquet(EARLY / "results.parquet")
    runs = {name: again.Runs(data[data.suite == name]) for name in data.suite.unique()}
    return runs, [rows for _, rows in tables((EARLY / "README.md").read_text())]


def test_differences_of_earlier_runs(early):
    runs, (rows, *_) = early
    for suites, difference, steps, n, cell, p in rows:
        names = [name.strip("`") for name in suites.split(" − ")]
        steps = int(steps.replace(",", ""))
        arm, base = (
            runs[name].loss(a, steps) for name, a in zip((names * 2)[:2], difference.split(" − "), strict=True)
        )
        values = (arm - base).dropna()
        assert len(values) == int(n)
        interval_cell(difference, cell, values)
        check(difference, p, *([(again.interval(values)[3], ".2g")] if len(values) > 1 else []))


def test_quantities_of_the_claims_of_earlier_runs(early):
    runs, (_, rows, *_) = early
    for number, what, value, steps, n, cell, p, _ in rows:
        found = []
        arms = {arm for *_, arm, _ in again.TERM.findall(value.strip("`")) if arm}
        for suite in runs.values():
            if arms <= suite.arms:
                values = suite.expression(value.strip("`"), int(steps.replace(",", "")))
                found += [values] if len(values) == int(n) else []
        texts = {f"{again.interval(v)[0]:+.4f}" for v in found}
        assert cell.split(" ")[0] in texts, f"{number}, {what}"
        values = next(v for v in found if f"{again.interval(v)[0]:+.4f}" == cell.split(" ")[0])
        interval_cell(what, cell, values)
        check(what, p, *([(again.interval(values)[3], ".2g")] if len(values) > 1 else []))


def test_table_of_specialisation(early):
    """Means of specialisation.csv, and the interval of lexical class minus domain."""
    data = pd.read_csv(EARLY / "specialisation.csv", dtype={"layer": str})
    means = data.groupby(["layer", "router", "label"]).explained.mean()
    _, (_, _, rows) = early
    for layer, *cells in rows[:-1]:
        pairs = itertools.product(("lexical_matched", "domain_matched", "token"), ("trained", "untrained"))
        for cell, (label, router) in zip(cells[:-1], pairs, strict=True):
            check(f"layer {layer}, {label}", cell, (means[layer, router, label], ".3f"))
        trained = data[(data.router == "trained") & (data.layer == layer)].pivot_table("explained", "seed", "label")
        mean, low, high, _, _ = again.interval(trained.lexical_matched - trained.domain_matched)
        check(f"layer {layer}", cells[-1], (mean, "+.3f"), (low, "+.3f"), (high, "+.3f"))
    for cell, label in ((rows[-1][1], "lexical_matched"), (rows[-1][3], "domain_matched"), (rows[-1][5], "token")):
        check(label, cell, (data[(data.router == "hash") & (data.label == label)].explained.mean(), ".3f"))
