"""Decisions about claims, and their page."""

import dataclasses
import math

import pytest

from moe.lab import statistics
from moe.lab.claims import decide
from moe.lab.report import claims_page
from moe.lab.table import Table
from tests.lab_helpers import CLAIMS, DENSE, DIGEST, SWITCH, claim_of, record, suite_of, table, table_of


@pytest.mark.parametrize(
    ("b", "verdict"),
    [
        ((4.9, 4.91, 4.89), decide.SUPPORTED),  # -0.1 ± 0.025
        ((5.1, 5.11, 5.09), decide.CONTRADICTED),
        ((4.9, 5.12, 4.95), decide.UNDECIDED),  # -0.01 ± 0.29
        ((4.0,), decide.UNDECIDED),  # one seed, however large the effect
    ],
)
def test_a_claim_is_decided_by_its_interval(b, verdict):
    finding = decide.assess(claim_of(), table_of(b))
    assert (finding.verdict, finding.post_hoc) == (verdict, False)


def test_below_its_horizon_a_claim_is_not_contradicted():
    claim = claim_of(min_steps=100)
    finding = decide.assess(claim, table_of((5.1, 5.11, 5.09), claim=claim))
    assert finding.verdict == decide.BELOW
    assert "regime: 20 steps of at least 100" in finding.lacks


def test_a_claim_edited_after_its_runs_is_post_hoc():
    edited = dataclasses.replace(claim_of(), text="b beats a, really")
    assert decide.assess(edited, table_of((4.9, 4.91, 4.89))).post_hoc
    text = claims_page.claims_section([edited], {"test": table_of((4.9, 4.91, 4.89))})
    assert "**post hoc: the claim was edited after its runs started**" in text


def test_a_claim_without_its_runs_or_its_premise_is_not_tested():
    assert decide.assess(claim_of(), None).verdict == decide.NOT_TESTED
    finding = decide.assess(
        claim_of(), table(suite_of({"a": DENSE, "b": SWITCH}, horizons=(20,)), [record("a", 0, 5.0)])
    )
    assert (finding.verdict, finding.note) == (decide.NOT_TESTED, "no runs of b")
    needs_gain = claim_of(requires="loss[a] - loss[b]")
    finding = decide.assess(needs_gain, table_of((4.9, 4.91, 4.89), claim=needs_gain))
    assert (finding.verdict, finding.note) == (decide.NOT_TESTED, "loss[a] - loss[b] is not below zero")


def test_margins_allow_what_was_stated():
    # Interval of (0, 0.001, 0.002): 0.001 ± 0.0025.
    small, large = statistics.effect([0.0, 0.001, 0.002]), statistics.effect([0.1, 0.101, 0.102])
    opposite = statistics.effect([-0.1, -0.101, -0.102])
    for rule in ("not_above", "within"):
        assert decide.verdict_of(rule, 0.02, small) == decide.SUPPORTED
        assert decide.verdict_of(rule, 0.02, large) == decide.CONTRADICTED
        assert decide.verdict_of(rule, 0.002, small) == decide.UNDECIDED
    assert decide.verdict_of("not_above", 0.02, opposite) == decide.SUPPORTED
    assert decide.verdict_of("within", 0.02, opposite) == decide.CONTRADICTED


def test_diverged_runs_are_outcomes():
    # Six seeds on which b diverges and a does not: sign test p = 2/64.
    worse = decide.assess(claim_of(), table_of((math.inf,) * 6, (5.0,) * 6))
    assert worse.verdict == decide.CONTRADICTED
    assert worse.outcomes[0].effect.p == pytest.approx(2 / 64)
    assert "6 of 6 pairs have a diverged run" in worse.outcomes[0].note
    # Two of three: no verdict, and the two seeds are not dropped.
    some = decide.assess(claim_of(), table_of((math.inf, math.inf, 4.9)))
    assert (some.verdict, some.outcomes[0].effect.n) == (decide.UNDECIDED, 3)


def test_less_variance_is_tested_on_pairs():
    # The pairs of test_pitman_morgan_by_hand: p = 0.2, no verdict.
    claim = claim_of("less_variance")
    finding = decide.assess(claim, table_of((5.0, 5.0, 7.0, 3.0), (6.0, 4.0, 5.0, 5.0), claim=claim))
    assert finding.outcomes[0].effect.mean == pytest.approx(4.0)  # b varies more
    assert finding.verdict == decide.UNDECIDED


def test_power_is_told_beside_the_published_effect():
    claim = claim_of(published=-0.05)
    finding = decide.assess(claim, table_of((4.9, 5.12, 4.95), claim=claim))
    outcome = finding.outcomes[0]
    assert outcome.detectable == pytest.approx(statistics.smallest_detectable(outcome.effect.sd, 3))
    assert outcome.seeds_needed == statistics.seeds_needed(outcome.effect.sd, 0.05) > 3
    assert any(text.startswith("power: finds") for text in finding.lacks)


def test_the_page_says_what_would_decide_a_claim():
    undecided = claims_page.claims_section([claim_of()], {"test": table_of((4.9, 5.05, 4.9))})
    # Differences to 5.0: -0.1, 0.05, -0.1; mean -0.05, sd 0.0866.
    needed = statistics.seeds_needed(statistics.effect([-0.1, 0.05, -0.1]).sd, -0.05)
    assert f"{needed} seeds would find effects as large as those seen" in undecided
    suite = suite_of({"a": DENSE, "b": SWITCH, "c": SWITCH})
    other = dataclasses.replace(claim_of(published=-0.05, min_steps=20), number=2, suite="other")
    pair = {"test": table_of((4.9, 5.12, 4.95)), "other": Table(suite, [])}
    text = claims_page.claims_section([claim_of(), other], pair)
    tokens = 20 * suite.tokens_per_step / 1e6
    assert f"no runs of b, a; needs 5 seeds of each arm for 20 steps ({tokens:.1f}M tokens), which find" in text


def test_all_claims_on_one_page(tmp_path):
    claims_page.write_page(tmp_path, CLAIMS, DIGEST, {})
    text = (tmp_path / "claims.md").read_text()
    assert all(f"| {claim.number} | {claim.text} |" in text for claim in CLAIMS)
    assert f"not tested: {len(CLAIMS)}" in text
    assert DIGEST in text
