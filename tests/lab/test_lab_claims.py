"""Decisions about claims, and their page."""

import dataclasses
import math
from pathlib import Path

import pytest

from moe.config import ConfigError
from moe.lab import inference, records
from moe.lab.claims import decide
from moe.lab.claims.registration import Part, Primary, hashes_at_start, read_claims
from moe.lab.loading import with_seeds
from moe.lab.report import answer, claims_page, sections
from moe.lab.table import Table
from moe.programs import cli
from tests.helpers import fill_disk
from tests.lab_helpers import (
    CLAIMS,
    DENSE,
    REGISTERED,
    SWITCH,
    claim_of,
    keyed,
    record,
    shipped_suite,
    suite_of,
    table,
    table_of,
)

ROOT = Path(__file__).resolve().parents[2]


def assess(claim, found, primary=None):
    return decide.assess([claim], {"test": found} if found else {}, primary)[0]


@pytest.mark.parametrize(
    ("b", "verdict"),
    [
        ((4.9, 4.91, 4.89, 4.9, 4.9), decide.FOR),  # -0.1 ± 0.0088
        ((5.1, 5.11, 5.09, 5.1, 5.1), decide.AGAINST),
        ((4.9, 5.12, 4.95, 4.9, 5.1), decide.OPEN),  # -0.006 ± 0.134
        ((4.9, 4.91, 4.89, 4.9), decide.TRIAL),  # four seeds, however clear the effect
        ((4.0,), decide.TRIAL),
    ],
)
def test_an_exploratory_claim_has_an_interval_and_no_verdict(b, verdict):
    finding = assess(claim_of(), table_of(b))
    assert (finding.verdict, finding.post_hoc) == (verdict, False)


def test_primary_claims_are_decided_after_holm_over_the_whole_family():
    """p of -0.1, -0.11, -0.09: t = -0.1 / (0.01 / √3) = -17.3, two degrees of freedom, p = 0.0033."""
    first, second = claim_of(family="primary"), dataclasses.replace(claim_of(family="primary"), number=2, suite="other")
    five = [first, *(dataclasses.replace(second, number=n) for n in range(2, 6))]
    found = table_of((4.9, 4.89, 4.91), claim=first)
    alone, *others = decide.assess(five, {"test": found}, PRIMARY)
    assert alone.outcomes[0].p == pytest.approx(0.0033, abs=5e-5)
    assert (alone.verdict, alone.adjusted) == (decide.SUPPORTED, pytest.approx(5 * alone.outcomes[0].p))
    assert {other.verdict for other in others} == {decide.NOT_TESTED}
    # -0.1 ± 0.099 of three seeds, p = 0.049: alone the claim is supported, in a family of five it is undecided.
    wide = table_of((4.9, 4.86, 4.94), claim=first)
    (single,), family = decide.assess([first], {"test": wide}, PRIMARY), decide.assess(five, {"test": wide}, PRIMARY)
    assert (single.verdict, family[0].verdict) == (decide.SUPPORTED, decide.UNDECIDED)
    # Two of the three registered seeds decide nothing yet.
    interim = decide.assess([first], {"test": table_of((4.9, 4.9001), claim=first)}, PRIMARY)[0]
    assert interim.verdict == decide.UNDECIDED
    assert "interim, 2 of the 3 registered seeds" in interim.lacks


def test_fewer_seeds_than_were_registered_decide_nothing():
    """Ten differences of about -0.1: a report on only some of the registered seeds is interim."""
    claim = claim_of(family="primary")
    hashes = {"1": claim.hash}
    for fixed in (False, True):
        suite = suite_of({"a": DENSE, "b": SWITCH}, seeds=tuple(range(5, 15)), horizons=(20,), fixed_seeds=fixed)
        runs = [
            record(name, seed, loss + 0.001 * seed * (name == "b"), claims=hashes)
            for name, loss in (("a", 5.0), ("b", 4.9))
            for seed in range(5, 20)
        ]
        few, many = with_seeds(suite, range(5, 10)), with_seeds(suite, range(5, 15))
        own = [run for run in runs if run.seed < 10]
        for asked in (few, with_seeds(few, range(5, 8))):
            found = assess(claim, table(asked, [run for run in own if run.seed in asked.seeds]), PRIMARY)
            assert found.verdict == decide.UNDECIDED
            assert f"interim, {len(asked.seeds)} of the 10 registered seeds" in found.lacks
        assert assess(claim, table(many, runs), PRIMARY).verdict == decide.SUPPORTED
        # Five of these ten seeds were not registered and do not count.
        others = [run for run in runs if run.seed >= 10]
        found = assess(claim, table(with_seeds(suite, range(10, 20)), others), PRIMARY)
        assert (found.verdict, found.outcomes[0].effect.n) == (decide.UNDECIDED, 5)
        assert "interim, 5 of the 10 registered seeds" in found.lacks
        # Nor do they count in addition to the ten registered ones.
        more = assess(claim, table(with_seeds(suite, range(5, 20)), runs), PRIMARY)
        assert (more.verdict, more.outcomes[0].effect.n) == (decide.SUPPORTED, 10)
    page = claims_page.claims_section([claim], {"test": table(few, [])}, None)
    assert "needs 10 seeds of each arm" in page


PRIMARY = Primary("which?", (1, 2, 3, 4, 5), smallest=0.02, equivalence=0.02, pilot="none")


def test_replications_are_a_separate_family():
    """p = 0.0033 in each, adjusted over the one claim of the first family and over the two of the second."""
    first = claim_of(family="primary")
    again = [dataclasses.replace(claim_of(family="replication"), number=n) for n in (2, 3)]
    found = {"test": table_of((4.9, 4.89, 4.91), claim=first)}
    findings = decide.assess([first, *again], found, PRIMARY)
    assert [f.adjusted / f.outcomes[0].p for f in findings] == pytest.approx([1, 2, 2])
    assert {f.verdict for f in findings} == {decide.SUPPORTED}
    _, text, shown = answer._on_other_seeds(findings[:1], findings[1:], found)
    assert "of the 2 that were decided on the first seeds, 2 have the same verdict." in text
    # The same three differences twice: -0.1 ± t(0.975, 5)·0.0089443/√6 = 2.5706·0.0036515.
    assert shown.count("| -0.1000 [-0.1094, -0.0906], n = 6 |") == 2
    assert answer._on_other_seeds(findings[:1], decide.assess(again, {}, PRIMARY), {}) == []
    found = {"test": table_of((4.9, 4.89), claim=first)}
    few = decide.assess([first, *again], found, PRIMARY)
    assert "alone: some runs are still to be made." in answer._on_other_seeds(few[:1], few[1:], found)[1]


def test_a_claim_on_arms_with_the_same_runs_stays_open():
    suite = suite_of({"a": DENSE, "b": DENSE}, horizons=(20,))
    finding = assess(claim_of("within", margin=0.1), table(suite, [record("a", seed, 5.0) for seed in range(5)]))
    assert (finding.verdict, finding.outcomes[0].note) == (decide.OPEN, "the arms are the same runs")


def test_too_few_steps_are_no_evidence():
    claim = claim_of(min_steps=100)
    finding = assess(claim, table_of((5.1, 5.11, 5.09), claim=claim))
    assert finding.verdict == decide.TOO_SHORT
    assert "20 steps; the claim needs at least 100" in finding.lacks


def test_a_claim_edited_after_its_runs_is_post_hoc():
    edited = dataclasses.replace(claim_of(), text="b beats a, really | <b>")
    found = table_of((4.9, 4.91, 4.89))
    assert assess(edited, found).post_hoc
    text = claims_page.claims_section([edited], {"test": found}, None)
    assert "**post hoc: the claim was edited after its runs started**" in text
    assert r"b beats a, really \| &lt;b&gt; |" in text
    (finding,) = decide.assess([dataclasses.replace(edited, family="primary")], {"test": found}, PRIMARY)
    assert "**post hoc: the claim was edited after its runs started**" in answer._contrasts([finding])


def test_labels_and_plans_are_not_part_of_what_is_tested():
    claim = claim_of("within", margin=0.1, published=-0.1)
    planned, other = (
        dataclasses.replace(claim, parts=(dataclasses.replace(claim.parts[0], **change),))
        for change in ({"spread": 0.02, "differs": "128 experts"}, {"margin": 0.2})
    )
    reworded = dataclasses.replace(planned, wording="b at half width beats a")
    assert reworded.hash == planned.hash == claim.hash != other.hash
    text = claims_page.claims_section([reworded], {"test": table_of((4.9, 4.91, 4.89))}, None)
    assert "| 1 | b at half width beats a |" in text
    assert "registered as: b beats a" in text
    assert "| -0.100 (128 experts) | – |" in text


def test_runs_of_several_claims_are_found_by_their_hash():
    """Two suites name one arm a and base: the page lists its runs once, with how far these seeds lie from all of them.

    Losses of a: 5.0, 5.0, 5.0 on seeds 0 to 2, whose mean is 0.075 below that of all four seeds, 5.075.
    """
    runs = [record("a", seed, loss) for seed, loss in enumerate((5.0, 5.0, 5.0, 5.3))]
    first = suite_of({"a": DENSE, "b": SWITCH}, horizons=(20,))
    second = dataclasses.replace(first, name="other", variants={"base": DENSE, "b": SWITCH})
    b = [record("b", seed, 4.9) for seed in (0, 1, 2)]
    known = keyed(first, [*runs, *b])
    other = dataclasses.replace(claim_of(value="loss[b] - loss[base]"), number=2, suite="other")
    text = claims_page.claims_section(
        [claim_of(), other], {"test": Table(first, known), "other": Table(second, known)}, None
    )
    assert "| test/a, other/base | 0 to 2 | 1, 2 | -0.0750 of 4 |" in text
    assert "| test/b, other/b | 0 to 2 | 1, 2 | – |" in text


def test_a_run_keeps_the_claims_of_its_first_start(tmp_path):
    claim = claim_of()
    first = hashes_at_start(tmp_path / "run.claims.json", [claim])
    again = hashes_at_start(tmp_path / "run.claims.json", [dataclasses.replace(claim, text="other")])
    assert first == again == {str(claim.number): claim.hash}


def test_an_open_equivalence_names_the_margin_that_its_seeds_would_show():
    """-0.01 ± 0.01 of three seeds: (t(0.975) + t(0.9)) · 0.01 / √3 = (4.303 + 1.886) · 0.00577 = 0.0357."""
    part = Part("difference", "within", "loss[b] - loss[a]", 0.02)
    finding = assess(dataclasses.replace(claim_of(), parts=(part,)), table_of((4.98, 4.99, 5.0)), PRIMARY)
    assert finding.outcomes[0].side == decide.UNDECIDED
    assert "low power: can show equivalence only within ±0.036; the margin is ±0.020" in finding.lacks


def test_an_equivalence_that_its_seeds_could_not_show_is_marked_as_registered():
    """With a spread of 0.01, three seeds show ±0.0357 (above): too few for a margin of 0.02, enough for one of 0.04."""
    for margin, marked in ((0.02, True), (0.04, False)):
        part = Part("difference", "within", "loss[b] - loss[a]", margin, spread=0.01)
        finding = assess(dataclasses.replace(claim_of(), parts=(part,)), table_of((4.98, 4.99, 5.0)))
        caveat = (
            "registered with too few seeds: at the spread expected then, 0.01, 3 show equivalence only within ±0.036; "
            f"the margin is ±{margin:.3f}"
        )
        assert (caveat in finding.lacks) == marked


def test_claims_of_equivalence_can_be_decided_by_their_seeds():
    """From number 49 on they state a spread; claims 25 and 39 had too few."""
    planned = [(claim, part) for claim in CLAIMS for part in claim.parts if part.rule == "within" and claim.number > 48]
    assert planned
    for claim, part in planned:
        suite = shipped_suite(claim.suite)
        assert inference.smallest_margin(part.spread, len(suite.seeds)) <= part.margin, claim.number


def test_a_claim_without_its_runs_or_its_premise_is_not_tested():
    assert assess(claim_of(), None).verdict == decide.NOT_TESTED
    suite = suite_of({"a": DENSE, "b": SWITCH}, horizons=(20,))
    finding = assess(claim_of(), table(suite, [record("a", 0, 5.0)]))
    assert (finding.verdict, finding.note) == (decide.NOT_TESTED, "no runs of b")
    needs_gain = claim_of(requires="loss[a] - loss[b]")
    finding = assess(needs_gain, table_of((4.9, 4.91, 4.89), claim=needs_gain))
    assert (finding.verdict, finding.note) == (decide.NOT_TESTED, "loss[a] - loss[b] is not below zero")
    needs_loss = claim_of(requires="loss[b] - loss[a]")  # -0.01 ± 0.29: a premise must be shown
    finding = assess(needs_loss, table_of((4.9, 5.12, 4.95), claim=needs_loss))
    assert (finding.verdict, finding.note) == (decide.NOT_TESTED, "loss[b] - loss[a] is not below zero")


def test_arms_that_drop_different_shares_are_not_comparable_unless_the_suite_says_why():
    rows = [(20, "loss", "primary", "", 5.0), (20, "train_fraction_tokens_dropped", "", "0", 0.08)]
    runs = [record("a", seed, 5.0) for seed in (0, 1, 2)] + [record("b", seed, 5.0, rows=rows) for seed in (0, 1, 2)]
    for why, told in (("", True), ("dropping is the factor", False)):
        suite = suite_of({"a": DENSE, "b": SWITCH}, horizons=(20,), dropping_differs=why)
        lacks = assess(claim_of(), table(suite, runs)).lacks
        assert (
            any("not comparable: the arms drop different shares in training (b 8.0%, a 0.0%)" in x for x in lacks)
            == told
        )


def test_sides_of_differences_are_decided_at_the_margin():
    # Interval of (0, 0.001, 0.002): 0.001 ± 0.0025.
    small, large = inference.effect([0.0, 0.001, 0.002]), inference.effect([0.1, 0.101, 0.102])
    opposite = inference.effect([-0.1, -0.101, -0.102])
    for rule in ("not_above", "within"):
        for margin, effect, side in (
            (0.02, small, decide.SUPPORTED),
            (0.02, large, decide.CONTRADICTED),
            (0.002, small, decide.UNDECIDED),
        ):
            found, p = decide.side_of(rule, margin, effect)
            assert (found, p < 0.05) == (side, side != decide.UNDECIDED)
    assert decide.side_of("not_above", 0.02, opposite)[0] == decide.SUPPORTED
    assert decide.side_of("within", 0.02, opposite)[0] == decide.CONTRADICTED
    # (0.001 - 0.02) / (0.001 / √3) = -32.9 with two degrees of freedom: p = 0.00092
    assert decide.side_of("within", 0.02, small)[1] == pytest.approx(0.00092, abs=1e-5)


def test_diverged_runs_are_outcomes():
    # Six seeds on which b diverges and a does not: sign test p = 2/64.
    worse = assess(claim_of(), table_of((math.inf,) * 6, (5.0,) * 6))
    assert worse.verdict == decide.AGAINST
    assert worse.outcomes[0].effect.p == pytest.approx(2 / 64)
    assert "6 of 6 pairs have a diverged run" in worse.outcomes[0].note
    # Diverging is the higher loss.
    higher = claim_of("above")
    assert assess(higher, table_of((math.inf,) * 6, (5.0,) * 6, claim=higher)).verdict == decide.FOR
    # Two of five seeds diverge: no verdict, and both still count.
    some = assess(claim_of(), table_of((math.inf, math.inf, 4.9, 4.9, 4.9)))
    assert (some.verdict, some.outcomes[0].effect.n) == (decide.OPEN, 5)
    # Above zero in all seeds, but within the margin of "not above" in five of six: the sign is taken at the margin.
    claim = claim_of("not_above", margin=0.05)
    found = assess(claim, table_of((5.01,) * 5 + (math.inf,), (5.0,) * 6, claim=claim))
    assert "5 lower, 1 higher" in found.outcomes[0].note


def test_diverged_runs_are_censored_and_infinite_at_their_own_capacity():
    """Two of five runs of b end below a's loss; the three others diverge, without a held-out loss."""

    def finished(name, seed, loss):
        last = [(20, quantity, records.PRIMARY, "", loss) for quantity in ("loss", "own_loss")]
        return record(name, seed, loss, rows=[(10, "loss", records.PRIMARY, "", loss + 0.5), *last])

    runs = [finished("a", seed, 4.0) for seed in range(5)] + [finished("b", seed, 3.6) for seed in range(2)]
    runs += [record("b", seed, 0.0, status=records.DIVERGED, rows=[]) for seed in range(2, 5)]
    found = table(suite_of({"a": DENSE, "b": SWITCH}, seeds=range(5), horizons=(20,)), runs)
    assert sections._steps_to_loss(found, "b", "a", 20).startswith("> 1")
    assert len(found.values(20, "own_loss[b] - own_loss[a]")) == 5


def test_less_variance_is_tested_on_pairs():
    # The pairs of test_pitman_morgan_by_hand: p = 0.2, no verdict.
    claim = claim_of("less_variance")
    finding = assess(claim, table_of((5.0, 5.0, 7.0, 3.0), (6.0, 4.0, 5.0, 5.0), claim=claim))
    assert finding.outcomes[0].effect.mean == pytest.approx(4.0)  # b varies more
    assert finding.outcomes[0].side == decide.UNDECIDED
    more = assess(claim, table_of((5.0, 5.0, 7.0, 3.0), (6.0, 4.0, 5.0, 5.0, 9.0), claim=claim)).outcomes[0].effect
    assert (more.mean, more.n) == (pytest.approx(4.0), 4), "a seed of one arm alone is in no pair"
    calm, wild = (5.0, 5.01, 4.99, 5.02, 4.98, 5.0), (5.0, 5.5, 4.6, 5.4, 4.4, 5.1)
    for b, a, verdict in ((calm, wild, decide.FOR), (wild, calm, decide.AGAINST)):
        assert assess(claim, table_of(b, a, claim=claim)).verdict == verdict
    few = table_of((5.0, 7.0), (6.0, 4.0), claim=claim)
    assert "| undefined, n = 2 at 20 steps |" in claims_page.claims_section([claim], {"test": few}, None)


def test_power_is_stated_for_the_smallest_effect_of_interest():
    claim = claim_of(published=-0.05)
    finding = assess(claim, table_of((4.9, 5.12, 4.95), claim=claim), PRIMARY)
    outcome = finding.outcomes[0]
    assert outcome.detectable == pytest.approx(inference.smallest_detectable(outcome.effect.sd, 3))
    assert any(text.endswith("the smallest effect of interest is 0.020") for text in finding.lacks)
    assert outcome.replication == "contains it"
    assert outcome.bound == -outcome.effect.low  # the interval reaches further down than up
    other = assess(claim_of(published=-0.05), table_of((4.9, 4.91, 4.89))).outcomes[0]
    assert other.replication == "excludes it"  # -0.1 ± 0.025


def test_the_page_says_what_would_decide_a_claim():
    losses = (4.9, 5.05, 4.9, 5.0, 4.9)
    undecided = claims_page.claims_section([claim_of()], {"test": table_of(losses)}, None)
    # Differences to 5.0: -0.1, 0.05, -0.1, 0, -0.1; mean -0.05, which is 0.05 from zero, 0.01 from a margin of ±0.06.
    spread = inference.effect([-0.1, 0.05, -0.1, 0, -0.1]).sd
    needed = inference.seeds_needed(spread, -0.05)
    assert f"{needed} seeds would decide it at the observed mean and spread" in undecided
    within = claims_page.claims_section([claim_of("within", margin=0.06)], {"test": table_of(losses)}, None)
    needed = inference.seeds_needed(spread, 0.01)
    assert f"{needed} seeds would decide it at the observed mean and spread" in within
    suite = suite_of({"a": DENSE, "b": SWITCH, "c": SWITCH})
    other = dataclasses.replace(claim_of(published=-0.05, min_steps=20), number=2, suite="other")
    pair = {"test": table_of((4.9, 5.12, 4.95)), "other": Table(suite, [])}
    longer = dataclasses.replace(other, number=3, min_steps=40)  # its spread is unknown
    text = claims_page.claims_section([claim_of(min_steps=20), other, longer], pair, None)
    tokens = 20 * suite.tokens_per_step / 1e6
    assert f"no runs of b, a; needs 5 seeds of each arm for 20 steps ({tokens:.1f}M tokens), which would detect" in text
    assert "for 40 steps" in text
    assert text.count("which would detect") == 1


def test_all_claims_on_one_page(tmp_path):
    claims_page.write_page(tmp_path, REGISTERED, {})
    text = (tmp_path / "claims.md").read_text()
    named = {claim.number: claim.sentence + (f" ({claim.family})" if claim.family else "") for claim in CLAIMS}
    assert all(f"| {number} | {text_of} |" in text for number, text_of in named.items())
    assert f"not tested: {len(CLAIMS)}" in text
    assert REGISTERED.digest in text


def test_a_full_disk_is_said_with_the_page_and_advice(tmp_path):
    with fill_disk(0), pytest.raises(OSError, match="No space left") as caught:
        claims_page.write_page(tmp_path, REGISTERED, {})
    advice = "No space left on device; free space, and run the same command again"
    assert cli._refusal(caught.value) == f"{tmp_path / 'claims.md'}: {advice}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("number = 1", 'number = "one"', "number"),
        ('rule = "below"', 'rule = "beneath"', "rule"),
        ('rule = "below"', 'rule = "shown"', "claim 1: all its parts are 'shown', which decide nothing"),
        ("[[claim.part]]", "[[claim.parts]]", "part"),
        ('value = "loss[b] - loss[a]"', 'value = "loss[b"', "not understood"),
        ('what = "loss"', "what = 3", "what"),
        ("min_steps = 5", "min_steps = -0.5", "min_steps"),
        ("min_steps = 5", "min_steps = -5", "min_steps"),
        ("min_steps = 5", "margin = 5", "margin"),
        ('what = "loss"', 'what = "loss"\nmargin = nan', "margin=nan"),
        ('what = "loss"', 'what = "loss"\nmargin = -0.1', "margin=-0.1"),
        ("number = 1", "number = -1", "number=-1"),
        ("[[claim]]", "[claim]", "claim"),
        ("claims = [1]", "claims = [2]", "those that primary.claims names"),
        ('family = "primary"', 'family = "replication"', "those that primary.claims names"),
        ("smallest = 0.1", 'smallest = "small"', "smallest"),
        ('family = "primary"', 'family = "secondary"', "family"),
        ("number = 1", "number = ", "Invalid value"),
    ],
)
def test_a_file_of_claims_of_wrong_types_is_refused_in_a_sentence(tmp_path, old, new, message):
    text = """
[primary]
question = "which?"
claims = [1]
smallest = 0.1
equivalence = 0.1
pilot = ""
[[claim]]
number = 1
suite = "test"
text = "b beats a"
source = "paper"
min_steps = 5
family = "primary"
[[claim.part]]
what = "loss"
rule = "below"
value = "loss[b] - loss[a]"
"""
    path = tmp_path / "claims.toml"
    path.write_text(text)
    assert read_claims(path).claims[0].parts[0].what == "loss"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=f"claims.toml: not a list of claims .*{message}"):
        read_claims(path)
