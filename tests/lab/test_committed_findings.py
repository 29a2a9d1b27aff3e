"""Every interval of the hand-written pages follows from the records: a comment behind it says from which value.

``0.041 [0.017, 0.065]<!-- switch_vs_mixtral: loss[switch] - loss[mixtral] -->`` names suite and value as claims do;
``@4000`` behind it an earlier evaluation; ``claim 26`` and ``claim 42.2`` the first and the second part of a claim;
``minus`` in front its negative; ``A + B`` the seeds of two suites, ``A less B`` an arm in one minus the same arm in the
other; ``early/README.md`` a page that is recomputed itself. A number without an interval is checked as a mean.
"""

import functools
import re
from pathlib import Path

import pandas as pd
import pytest

from tests import recomputation as again
from tests.lab.test_committed_results import claims_of, read
from tests.lab_helpers import shipped_suite, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"
PAGES = (ROOT / "README.md", RESULTS / "README.md")
COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
NUMBER = re.compile(r"[+−-]?\d+\.\d+|(?<![\w.,])[+−-]?\d+(?![\w.,]*\d)")
INTERVAL = re.compile(r"\[([+−-]?\d+\.\d+),\s+([+−-]?\d+\.\d+)\]")


@functools.cache
def runs_of(name):
    suite = shipped_suite(name)
    return read(RESULTS / name, suite), suite.longest


@functools.cache
def claims():
    return claims_of(ROOT / "configs/ablations/claims.toml")


def recomputed(source):
    """Value per seed that a comment names."""
    source, sign = source.removeprefix("minus "), -1 if source.startswith("minus ") else 1
    if match := re.fullmatch(r"claim (\d+)(?:\.(\d+))?", source):
        claim = claims()[int(match[1])]
        name, value = claim["suite"], claim["part"][int(match[2] or 1) - 1]["value"]
        until = None
    else:
        name, _, value = source.partition(": ")
        value, _, until = value.partition(" @")
    found = [
        runs.expression(value, steps, until=int(until) if until else None)
        for runs, steps in map(runs_of, re.split(r" \+ | less ", name))
    ]
    return sign * ((found[0] - found[1]).dropna() if " less " in name else pd.concat(found))


def rounds_to(text, value):
    """Whether a value, of which the records keep seven digits, rounds to a printed number."""
    decimals = len(text.partition(".")[2])
    printed = float(text.replace("−", "-"))
    return any(printed == round(value + slack, decimals) for slack in (0.0, 2e-6, -2e-6))


def printed_before(text, end):
    """(mean, low, high) as they are printed in front of a comment; (mean,) without an interval."""
    before = text[max(end - 200, 0) : end].rstrip()
    interval = re.search(INTERVAL.pattern + r"$", before)
    numbers = NUMBER.findall(before[: interval.start()] if interval else before)
    return (numbers[-1], *interval.groups()) if interval else (numbers[-1],)


def effects_of(path):
    """(mean, low, high) of every effect on a page, and of its negative."""
    found = re.findall(r"([+-]\d\.\d{4}) \[([+-]\d\.\d{4}), ([+-]\d\.\d{4})\]", path.read_text())
    for mean, low, high in (map(float, numbers) for numbers in found):
        yield mean, low, high
        yield -mean, -high, -low


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs/concepts.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers_with_a_source(page):
    text, wrong = page.read_text(), []
    comments = [*COMMENT.finditer(text.partition("## Losses by seed")[0])]
    assert comments
    for comment in comments:
        source = " ".join(comment[1].split())
        printed = printed_before(text, comment.start())
        candidates = (
            effects_of(RESULTS / source) if source.endswith(".md") else [again.interval(recomputed(source))[:3]]
        )
        if not any(all(map(rounds_to, printed, values)) for values in candidates):
            wrong.append((printed, source, *([] if source.endswith(".md") else candidates)))
    assert not wrong, f"{page.name}: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_interval_names_its_source(page):
    text = page.read_text().partition("## Losses by seed")[0]
    missing = [m[0] for m in INTERVAL.finditer(text) if not re.match(r"\s*<!--", text[m.end() :])]
    assert not missing, f"{page.name}: write the value behind {missing}"


def test_the_decided_claims_at_switchs_scale_are_those_of_the_table():
    rows = [
        row for _, rows in tables((RESULTS / "claims.md").read_text()) for row in rows if row[0] in "49 50 51 52 53"
    ]
    decided = [row[0] for row in rows if row[2].strip("*") in ("supported", "contradicted")]
    text = " ".join((RESULTS / "README.md").read_text().split())
    assert f"(49 to 53; {' and '.join(decided)} are decided)" in text
    assert text.index("claim 52") < text.index("claim 26") < text.index("claim 42.2")


def test_no_claim_says_that_something_is_free_whose_interval_excludes_zero():
    """Equivalence within a bound is a cost of at most the bound: claim 73 is for it at +0.0092 [+0.0001, +0.0184]."""
    costly = set()
    for number, claim in claims().items():
        for place, part in enumerate(claim["part"], 1):
            if part["rule"] in ("within", "not_above") and (RESULTS / claim["suite"] / "records.parquet").exists():
                values = recomputed(f"claim {number}.{place}")
                if len(values) > 1 and again.interval(values)[1] > 0:
                    costly.add(number)
                    sentence = claim.get("wording") or claim["text"]
                    assert not re.search(r"nothing|no cost|no worse|lossless", sentence), f"claim {number}: {sentence}"
    assert 73 in costly


def test_losses_by_seed():
    """Both columns of every row, by the suites and the arm that its comment names."""
    text = (RESULTS / "README.md").read_text().partition("## Losses by seed")[2].partition("\n## ")[0]
    (_, rows), checked = tables(text)[0], 0
    for label, *cells in rows:
        names, _, arm = COMMENT.search(label)[1].partition(": ")
        for cell, quantity, domain in zip(cells, ("loss", "last_tenth_loss"), ("primary", ""), strict=True):
            values = [
                value
                for name in names.split(", ")
                for value in runs_of(name)[0].last(arm, runs_of(name)[1], quantity, domain).sort_index()
            ]
            printed = cell.split(", ")
            assert len(printed) == len(values), f"{label}, {quantity}"
            for shown, value in zip(printed, values, strict=True):
                assert rounds_to(shown, value), f"{label}, {quantity}: {shown}, {value}"
        checked += 1
    assert checked == len(rows)
