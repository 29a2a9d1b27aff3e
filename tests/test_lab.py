"""The ablation lab: plans, records, statistics, claims and the report."""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from configs import base as defaults
from moe.config import ConfigError
from moe.lab import costs, law, plan, records, results, statistics
from moe.lab.claims import decide, registration
from moe.lab.claims.registration import Claim, Part
from moe.lab.expressions import Term, parse
from moe.lab.records import DIVERGED, FINISHED, PRIMARY, Key, Record
from moe.lab.report import claims_page, page
from moe.lab.running import jobs, runner
from moe.lab.suite import Comparison, Suite, Sweep, Variant, check, load_suite, with_seeds
from moe.lab.table import MissingError, Table
from moe.training.loop import train
from tests.tiny_text import build

ROOT = Path(__file__).resolve().parents[1]
SUITES = sorted(path for path in (ROOT / "configs/ablations").glob("*.py") if path.stem not in ("__init__", "common"))
CLAIMS, DIGEST = registration.read_claims(ROOT / "configs/ablations/claims.toml")


# --- Statistics ------------------------------------------------------------------------------------------------------
def test_paired_interval_by_hand():
    # Mean 2, standard deviation 1, error 1/sqrt(3) = 0.57735; t(0.975, 2) = 4.30265: ± 2.48414. t = 3.46410,
    # p = 1 - t/sqrt(2 + t²) = 1 - 0.92582 = 0.07418, which is the closed form for two degrees of freedom.
    e = statistics.effect([1.0, 2.0, 3.0])
    assert (e.mean, e.n, e.sd) == (2.0, 3, 1.0)
    assert (e.low, e.high, e.p) == pytest.approx((-0.48414, 4.48414, 0.07418), abs=1e-5)


def test_one_seed_has_no_interval_and_a_diverged_one_no_mean():
    one, diverged = statistics.effect([5.0]), statistics.effect([5.0, math.inf, 4.0])
    assert (one.mean, one.low, one.high, one.n) == (5.0, -math.inf, math.inf, 1)
    assert math.isnan(diverged.mean)
    assert diverged.n == 3


def test_smallest_detectable_effect_is_the_published_table():
    # papers: standard deviation 0.025 → 0.082 (n = 3), 0.042 (5), 0.025 (10).
    found = [statistics.smallest_detectable(0.025, n) for n in (3, 5, 10)]
    assert found == pytest.approx([0.082, 0.042, 0.025], abs=6e-4)
    assert statistics.smallest_detectable(0.025, 1) == math.inf
    assert statistics.seeds_needed(0.025, found[1]) == 5
    assert statistics.seeds_needed(0.025, -found[2]) == 10


def test_holm_by_hand():
    # 0.01·3 = 0.03; 0.03·2 = 0.06; 0.04·1, but not less than the one before.
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([]) == []


def test_pitman_morgan_by_hand():
    # Sums (1,-1,2,-2), differences (1,-1,-2,2): r = (1 + 1 - 4 - 4)/10 = -0.6, t = -0.6·√2/0.8 = -1.06066, and with
    # two degrees of freedom p = (1 - |t|/sqrt(2 + t²))/2 = (1 - 0.6)/2. Variances 2/3 and 8/3.
    assert statistics.pitman_morgan([1, -1, 0, 0], [0, 0, 2, -2]) == pytest.approx((0.25, 0.2))


def test_pooled_model_of_two_arms_is_the_paired_test_and_uses_incomplete_seeds():
    losses = {"base": {0: 5.0, 1: 6.0, 2: 7.0}, "arm": {0: 6.0, 1: 8.0, 2: 10.0}}
    paired, found = statistics.effect([1.0, 2.0, 3.0]), statistics.pooled(losses, "base")["arm"]
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(
        (paired.mean, paired.low, paired.high, paired.p)
    )
    more = statistics.pooled({**losses, "third": {0: 5.0, 1: 6.5}}, "base")
    assert set(more) == {"arm", "third"}
    assert more["third"].n == 2
    assert statistics.pooled({"base": {0: 5.0}, "arm": {0: 6.0}}, "base") == {}


def test_bootstrap_weighs_domains_alike_and_covers_the_seeds():
    # Constant within a domain: every draw is (1 + 4)/2.
    assert statistics.bootstrap([[1, 1, 1, 4]], ["a", "a", "a", "b"]) == (2.5, 2.5)
    # Three seeds of -1, 0 and 1: all three the same, -1 or 1, once in 27 each, which is more than 2.5 %.
    assert statistics.bootstrap([[-1.0], [0.0], [1.0]], ["a"]) == (-1.0, 1.0)
    # Two seeds are kept as they are, and one row leaves nothing to draw.
    assert statistics.bootstrap([[-1.0], [2.0]], ["a"]) == (0.5, 0.5)


def test_censored_median_by_hand():
    # Three seeds: the range covers the median with 1 - 2/8; six: with 1 - 2/64.
    three = statistics.censored_median([0.5, math.inf, 0.7])
    assert (three.median, three.low, three.high, three.coverage, three.censored) == (0.7, 0.5, math.inf, 0.75, 1)
    six = statistics.censored_median([1, 2, 3, 4, 5, 6])
    assert (six.median, six.low, six.high, six.coverage) == (3.5, 1, 6, 1 - 2 / 64)
    assert statistics.censored_median([0.5, math.inf]).median == math.inf


def test_steps_to_reach_a_loss():
    curve = [(10, 5.0), (20, 4.0), (30, 3.5)]
    assert statistics.steps_to_reach(curve, 4.25) == 17.5  # three quarters of the way from 5 to 4
    assert statistics.steps_to_reach(curve, 3.5) == 30
    assert statistics.steps_to_reach(curve, 3.4) == math.inf


def test_crossing_is_interpolated_in_log_tokens():
    def effect(mean, half):
        return statistics.Effect(mean, mean - half, mean + half, 0.5, 3)

    # Halfway in log tokens; the lower end -0.1 is below zero from the start, the upper one 0.1 never.
    found = statistics.crossing([100, 10_000], [effect(0.1, 0.2), effect(-0.1, 0.2)])
    assert (found.tokens, found.low, found.high) == (pytest.approx(1000), 0.0, math.inf)
    assert math.isnan(statistics.crossing([100, 10_000], [effect(0.1, 0.05), effect(0.2, 0.05)]).tokens)
    found = statistics.crossing([100, 10_000], [effect(0.2, 0.1), effect(-0.2, 0.1)])
    # Ends: 0.1 → -0.3 crosses at a quarter, 0.3 → -0.1 at three quarters of the two decades.
    assert (found.low, found.high) == pytest.approx((100 * 10**0.5, 100 * 10**1.5))


def test_law_is_recovered_from_its_own_losses():
    def loss(experts, tokens):
        return math.exp(3.0 - 0.1 * math.log(tokens) - 0.05 * math.log(experts))

    points = {(e, t): loss(e, t) for e in (1, 4, 16) for t in (10**5, 10**6)}
    found = law.fit(points)
    assert found.coefficients == pytest.approx((3.0, -0.1, -0.05, 0.0), abs=1e-9)
    assert found.loss(64, 10**7) == pytest.approx(loss(64, 10**7))
    assert max(map(abs, found.residuals.values())) < 1e-9
    # One loss 1 % higher: its residual is positive; with an intercept all residuals sum to zero.
    found = law.fit({**points, (4, 10**6): points[4, 10**6] * 1.01})
    assert found.residuals[4, 10**6] > 0
    assert sum(found.residuals.values()) == pytest.approx(0.0, abs=1e-9)
    assert law.fit({(1, 10**5): 5.0, (4, 10**5): 4.9}) is None


# --- Suites and plans ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", ["laptop", "pod"])
def test_every_suite_is_as_equal_as_it_says(path, size):
    suite = load_suite(str(path), size)
    assert suite.name == path.stem
    assert set(suite.primary_domains) <= set(suite.base.data.domains) | {suite.base.data.dataset}


def test_every_claim_names_arms_of_its_suite():
    assert [claim.number for claim in CLAIMS] == list(range(1, 23))
    suites = {path.stem: load_suite(str(path), "laptop") for path in SUITES}
    for claim in CLAIMS:
        assert set(decide.arms_of(claim)) <= set(suites[claim.suite].variants), claim.number
        assert claim.min_steps <= suites[claim.suite].longest


def suite_of(variants, comparisons=None, seeds=(0, 1, 2), base=None, **fields):
    base = defaults.get_config() if base is None else base
    return Suite("test", "?", base, variants, seeds, comparisons or {}, **fields)


DENSE = Variant({"model.moe.gate": "none"})
SWITCH = Variant({"model.moe.gate": "switch"})


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (suite_of({"a": DENSE}, seeds=(0,)), "at least two"),
        (suite_of({"a": DENSE}, seeds=(0, 1, 1)), "at least two different"),
        (suite_of({"a": DENSE}, horizons=(10, 10)), "different positive numbers"),
        (suite_of({"a": Variant({"model.moe.gat": "none"})}), "variant 'a'.*gat"),
        (suite_of({"a": Variant({"model.moe.gate": "swich"})}), "variant 'a'.*swich"),
        (suite_of({"a": dataclasses.replace(DENSE, starts_from="b")}), "no variant 'b'"),
        (suite_of({"a": DENSE}, headline=("b",)), "headline: no variant 'b'"),
        (suite_of({"a": DENSE}, {"c": Comparison("a", ("b",), ("steps",))}), "no variant 'b'"),
        (suite_of({"a": DENSE}, {"c": Comparison("a", ("a",), ("luck",))}), "'luck' is not one of"),
        (suite_of({"a": DENSE}, sweep=Sweep((1e-3, 2e-3), (9,), 320)), "must contain the base config's 0.003"),
        (suite_of({"a": DENSE}, sweep=Sweep((3e-3, 6e-3), (1,), 320)), "none of the suite's"),
        (suite_of({"a": DENSE}, sweep=Sweep((3e-3, 6e-3), (9,), 7)), "must be one of the suite's"),
        (
            suite_of({"a": DENSE, "b": SWITCH}, {"c": Comparison("a", ("b",), ("total_parameters",))}),
            r"'b' has 3\.\d+ times the total_parameters of 'a'",
        ),
    ],
)
def test_a_suite_that_cannot_be_compared_is_refused(suite, message):
    with pytest.raises(ConfigError, match=message):
        check(suite)


def test_other_seeds_are_not_those_of_the_sweep():
    suite = suite_of({"a": DENSE}, sweep=Sweep((3e-3, 6e-3), (9,), 320))
    assert with_seeds(suite, [4]).seeds == (4,)
    for seeds in ([9], [1, 1]):
        with pytest.raises(ConfigError, match="--seeds"):
            with_seeds(suite, seeds)


def test_each_horizon_has_a_schedule_of_its_own():
    suite = suite_of({"a": dataclasses.replace(DENSE, rate_scale=0.5)}, horizons=(2000, 200))
    assert suite.steps == (200, 2000)
    for steps, warmup, evaluate in ((200, 20, 25), (2000, 200, 250)):
        config = suite.config("a", steps=steps, learning_rate=0.01)
        assert (config.train.num_steps, config.optimizer.warmup_steps) == (steps, warmup)
        assert (config.train.eval_every, config.optimizer.learning_rate) == (evaluate, 0.005)


def test_routing_groups_follow_the_batch_size():
    arms = {
        "whole": Variant({"model.moe.gate": "switch", "train.batch_size": 6}),
        "own": Variant({"model.moe.gate": "switch", "model.moe.group_size": 64}),
    }
    suite = suite_of(arms)
    length = suite.base.data.sequence_length
    assert suite.config("whole").model.moe.group_size == 6 * length
    assert suite.config("own").model.moe.group_size == 64


def record(variant, seed, loss, steps=20, rate=3e-3, status=FINISHED, **fields):
    """A run with one domain of two rows and two evaluations."""
    rows = [
        (step, "loss", domain, "", value)
        for step, value in ((steps // 2, loss + 1.0), (steps, loss))
        for domain in ("a", PRIMARY)
    ]
    own = {"rows": rows, "row_domains": ["a", "a"], "row_losses": [loss - 0.1, loss + 0.1], "claims": {}, **fields}
    return Record(
        variant, steps, rate, seed, status, "", commit="c", data={}, hardware="h", seconds=1.0, costs={}, **own
    )


def test_the_plan_goes_seed_by_seed_with_the_headline_arms_first():
    suite = suite_of({"a": DENSE, "other": SWITCH, "b": SWITCH}, seeds=(0, 1), horizons=(20, 10), headline=("a", "b"))
    order = [(key.seed, key.steps, key.variant) for key in plan.runs(suite, [])]
    assert order[:4] == [(0, 10, "a"), (0, 10, "b"), (0, 20, "a"), (0, 20, "b")]
    assert order[4:6] == [(1, 10, "a"), (1, 10, "b")]
    assert order[8:] == [(0, 10, "other"), (0, 20, "other"), (1, 10, "other"), (1, 20, "other")]


def test_parents_are_trained_before_their_children():
    child = dataclasses.replace(SWITCH, starts_from="parent", seed_offset=7)
    suite = suite_of({"child": child, "parent": DENSE}, seeds=(0, 1))
    order = [(key.variant, key.seed) for key in plan.runs(suite, [])]
    assert order == [("parent", 0), ("child", 0), ("parent", 1), ("child", 1)]
    key = plan.runs(suite, [])[1]
    assert plan.parents(suite, [], key) == {"starts_from": Key("parent", 320, 3e-3, 0)}
    assert suite.config("child", 1).seed == 8


def test_a_sweep_is_checked_at_the_longest_horizon_before_it_counts():
    suite = suite_of({"a": DENSE}, seeds=(0, 1), horizons=(10, 20), sweep=Sweep((1e-3, 3e-3, 9e-3), (7,), 10))
    assert [(key.steps, key.learning_rate) for key in plan.runs(suite, [])] == [(10, 1e-3), (10, 3e-3), (10, 9e-3)]
    middle = [record("a", 7, loss, 10, rate) for rate, loss in ((1e-3, 5.0), (3e-3, 4.9), (9e-3, 4.8))]
    # Best at 10 steps: the largest; it and its neighbour are tried at 20, and no other run is named yet.
    assert [key for key in plan.runs(suite, middle) if key.steps == 20] == [
        Key("a", 20, 3e-3, 7),
        Key("a", 20, 9e-3, 7),
    ]
    assert not plan.choose(suite, middle, "a").tuned
    # At 20 steps the largest rate diverges, so the one below it is the arm's.
    full = [*middle, record("a", 7, 4.5, 20, 3e-3), record("a", 7, 4.4, 20, 9e-3, DIVERGED)]
    choice = plan.choose(suite, full, "a")
    assert (choice.rate, choice.tuned) == (3e-3, True)
    assert {key.learning_rate for key in plan.runs(suite, full) if key.seed != 7} == {3e-3}
    # Reserved seeds are in no comparison.
    assert Table(suite, full).used == []


# --- Records and results ---------------------------------------------------------------------------------------------
def test_a_record_is_read_back(tmp_path):
    written = record("a", 0, 4.56789012)
    written.write(tmp_path)
    (read,) = records.read_all(tmp_path)
    assert read.key == written.key
    assert read.primary_loss == 4.56789  # seven digits
    (tmp_path / "records" / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"broken.json: not a record"):
        records.read_all(tmp_path)


def test_results_load_with_one_line_of_pandas(tmp_path):
    results.write(tmp_path, [record("a", 0, 4.5), record("b", 0, 4.25, probes={"p/x@1": 0.5})])
    found = pd.read_csv(tmp_path / "results.csv")
    last = found.query("quantity == 'loss' and domain == 'primary' and step == steps").set_index("variant").value
    assert (last["a"], last["b"]) == (4.5, 4.25)
    assert found.query("quantity == 'p/x'").layer.item() == 1


def test_executed_flops_leave_out_dropped_assignments():
    suite = suite_of({"dense": DENSE, "moe": Variant({"model.moe.gate": "switch", "model.moe.num_experts": 4})})
    dense, moe = suite.config("dense"), suite.config("moe")
    assert costs.executed_flops(dense, 0.0) == suite.costs("dense")["flops"]
    assert costs.executed_flops(moe, 0.0) == suite.costs("moe")["flops"]
    # Three matrices of a gated FFN in every layer, 2 FLOPs a weight, three passes; a quarter of the assignments.
    matrices = 3 * moe.model.d_model * (moe.model.moe.d_ff or moe.model.d_ff) * moe.model.num_layers
    tokens = moe.train.num_steps * moe.train.batch_size * moe.data.sequence_length
    saved = suite.costs("moe")["flops"] - costs.executed_flops(moe, 0.25)
    assert saved == pytest.approx(0.25 * 6 * matrices * tokens)


# --- Claims ----------------------------------------------------------------------------------------------------------
def test_expressions_by_hand():
    assert parse("loss[a] - 2 max_violation[b, layer=1-] - 0.5 + x/y_1.0[c, step=first]") == [
        Term(1.0, "loss", "a"),
        Term(-2.0, "max_violation", "b", layers="1-"),
        Term(-0.5),
        Term(1.0, "x/y_1.0", "c", first=True),
    ]
    for text in ("", "0.5", "loss", "loss[a] loss[b]", "loss[a, when=now]", "loss[a] * 2"):
        with pytest.raises(ValueError, match="value="):
            parse(text)


def test_values_of_layers_and_first_evaluations():
    rows = [(10, "loss", PRIMARY, "", 6.0), (20, "loss", PRIMARY, "", 5.0)]
    rows += [(20, "load", "", str(layer), value) for layer, value in enumerate((1.0, 2.0, 6.0))]
    table = Table(suite_of({"a": DENSE}), [record("a", 0, 5.0, rows=rows, probes={"p/q@0": 0.25, "p/q@1": 0.75})])
    expressions = ("load[a]", "load[a, layer=0]", "load[a, layer=1-]", "loss[a, step=first] - loss[a]", "p/q[a] - 1")
    assert [table.values(20, text)[0] for text in expressions] == [3.0, 1.0, 4.0, 1.0, -0.5]
    with pytest.raises(MissingError, match="no nothing of a"):
        table.values(20, "nothing[a]")


def claim_of(rule="below", value="loss[b] - loss[a]", **fields):
    part = {"margin": fields.pop("margin", 0.0), "published": fields.pop("published", None)}
    return Claim(1, "test", "b beats a", "paper", (Part("loss", rule, value, **part),), **fields)


def table_of(b, a=(5.0, 5.0, 5.0), claim=None, steps=20, **fields):
    hashes = {"1": (claim or claim_of()).hash}
    runs = [
        record(name, seed, loss, steps, status=DIVERGED if math.isinf(loss) else FINISHED, claims=hashes)
        for name, losses in (("a", a), ("b", b))
        for seed, loss in enumerate(losses)
    ]
    return Table(suite_of({"a": DENSE, "b": SWITCH}, horizons=(steps,), **fields), runs)


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
    finding = decide.assess(claim_of(), Table(suite_of({"a": DENSE, "b": SWITCH}), [record("a", 0, 5.0)]))
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


def test_all_claims_on_one_page(tmp_path):
    claims_page.write_page(tmp_path, CLAIMS, DIGEST, {})
    text = (tmp_path / "claims.md").read_text()
    assert all(f"| {claim.number} | {claim.text} |" in text for claim in CLAIMS)
    assert f"not tested: {len(CLAIMS)}" in text
    assert DIGEST in text


# --- Running and reporting -------------------------------------------------------------------------------------------
def tiny_base(directory):
    base = defaults.get_config()
    base.model.update(vocab_size=400, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16)
    base.model.moe.gate = "none"
    base.data.update(dataset="tiny_text/split", directory=str(directory), sequence_length=16, heldout_rows=8)
    base.data.shuffle_window = 4
    base.train.update(num_steps=4, sample_tokens=0)
    return base


def tiny_suite(base, **fields):
    moe = {"model.moe.gate": "mixtral", "model.moe.num_experts": 4, "model.moe.d_ff": 8}
    return suite_of(
        {"dense": Variant({}), "mixtral": Variant(moe)},
        {"equal FLOPs": Comparison("dense", ("mixtral",), ("steps", "flops"), tolerance=0.2)},
        base=base,
        heldout_rows=8,
        whole_batch_groups=False,  # the tests have a mesh of eight devices
        **fields,
    )


@pytest.fixture
def faked(monkeypatch):
    """Runs that are not trained: their records have losses made from the key."""
    calls = []

    def fake(self, key):
        calls.append(key)
        loss = 6.0 + 0.01 * key.seed - (0.1 if key.variant == "mixtral" else 0.0)
        record(key.variant, key.seed, loss, key.steps, key.learning_rate).write(self._workdir)

    monkeypatch.setattr(runner.Worker, "_train", fake)
    return calls


def test_only_what_is_missing_is_run_and_the_report_repeats(faked, tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    texts = []
    for name in ("first", "second"):
        workdir = tmp_path / name
        runner.Worker(with_seeds(suite, [0]), workdir, []).run()
        assert len(faked) == 2
        runner.Worker(suite, workdir, []).run()
        assert len(faked) == len(set(faked)) == 6
        faked.clear()
        page.write(workdir, suite, records.read_all(workdir), [], "", "COMMAND")
        texts.append([(workdir / name).read_bytes() for name in ("results.csv", "report.md", "effects.png")])
    assert texts[0] == texts[1]
    text = texts[0][1].decode()
    # -0.1 in every seed.
    assert "mixtral is better than dense: -0.1000 nats [-0.1000, -0.1000], n = 3" in text
    assert "## Claims" not in text  # a suite without claims has no empty table
    log = (tmp_path / "first" / "progress.log").read_text()
    assert "run 1 of 2, dense, 4 steps, learning rate 0.003, seed 0: start" in log


def test_a_suite_goes_on_from_records_alone(faked, tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    runner.Worker(with_seeds(suite, [0, 1]), tmp_path / "here", []).run()
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "here" / "records").rename(there / "records")
    faked.clear()
    runner.Worker(suite, there, []).run()
    assert {key.seed for key in faked} == {2}


def test_a_run_that_another_process_has_taken_is_left_to_it(faked, tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    taken = plan.runs(suite, [])[0]
    path = runner.run_directory(tmp_path, taken)
    path.parent.mkdir(parents=True)
    with runner.filelock.FileLock(f"{path}.lock"):
        runner.Worker(suite, tmp_path, []).run()
    assert len(faked) == 5
    assert taken not in faked


def test_a_failed_run_is_told_after_the_others(faked, monkeypatch, tmp_path):
    succeed = runner.Worker._train

    def fails_once(self, key):
        if key.seed == 1:
            raise ConfigError("the disk is full")
        succeed(self, key)

    monkeypatch.setattr(runner.Worker, "_train", fails_once)
    with pytest.raises(ConfigError, match=r"2 runs did not finish; the first, dense, .* seed 1: the disk is full"):
        runner.Worker(tiny_suite(tiny_base(tmp_path)), tmp_path, []).run()
    assert len(records.read_all(tmp_path)) == 4


def test_a_trial_of_two_seeds_is_marked(tmp_path):
    suite = dataclasses.replace(tiny_suite(tiny_base(tmp_path)), seeds=(0, 1))
    check(suite)
    found = [record(name, seed, 5.0 + seed, 4) for name in ("dense", "mixtral") for seed in (0, 1)]
    page.write(tmp_path, suite, found, [], "", "COMMAND")
    assert "**A trial:**" in (tmp_path / "report.md").read_text()


def test_report_of_horizons_tells_the_crossing(tmp_path):
    suite = dataclasses.replace(tiny_suite(tiny_base(tmp_path)), horizons=(4, 400))
    found = []
    for seed in (0, 1, 2):
        for steps, difference in ((4, 0.1), (400, -0.1)):
            found += [record("dense", seed, 5.0, steps), record("mixtral", seed, 5.0 + difference, steps)]
    page.write(tmp_path, suite, found, [], "", "COMMAND")
    text = (tmp_path / "report.md").read_text()
    tokens = 40 * suite.tokens_per_step / 1e6  # halfway between 4 and 400 in log steps
    assert f"It gets ahead at about {tokens:.2f} million tokens" in text
    assert "![horizons](horizons.png)" in text


def test_report_below_the_longest_horizon_says_so(tmp_path):
    suite = dataclasses.replace(tiny_suite(tiny_base(tmp_path)), horizons=(4, 400))
    found = [record(name, seed, loss, 4) for name, loss in (("dense", 5.0), ("mixtral", 5.1)) for seed in (0, 1, 2)]
    page.write(tmp_path, suite, found, [], "", "COMMAND")
    text = (tmp_path / "report.md").read_text()
    assert "The longest horizon, 400 steps, has no comparison yet" in text
    assert "below the crossing" in text


def test_effects_of_the_report_follow_from_results_csv(tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    ours, base = (4.91, 4.87, 4.95), (5.02, 4.99, 5.01)
    found = [record("dense", seed, loss, 4) for seed, loss in enumerate(base)]
    found += [record("mixtral", seed, loss, 4) for seed, loss in enumerate(ours)]
    page.write(tmp_path, suite, found, [], "", "COMMAND")
    results_csv = pd.read_csv(tmp_path / "results.csv")
    final = results_csv.query("quantity == 'loss' and domain == 'primary' and step == steps")
    by_seed = final.pivot_table("value", "seed", "variant")
    difference = by_seed["mixtral"] - by_seed["dense"]
    half = 4.30265 * difference.std() / math.sqrt(3)
    low, high = difference.mean() - half, difference.mean() + half
    assert f"{difference.mean():+.4f} nats [{low:+.4f}, {high:+.4f}], n = 3" in (tmp_path / "report.md").read_text()


def test_what_counts_as_diverged():
    assert runner._outcome(np.asarray([3.0, 4.0]), 400)[0] == FINISHED
    assert runner._outcome(np.asarray([3.0, math.nan]), 400)[0] == DIVERGED
    assert runner._outcome(np.asarray([6.9, 6.9]), 400)[0] == FINISHED  # ln 400 = 5.99
    status, reason = runner._outcome(np.asarray([7.0, 7.0]), 400)
    assert (status, reason) == (DIVERGED, "held-out loss 7.00, more than a nat above that of a uniform guess")


def test_jobs_are_pinned_to_a_core_each(monkeypatch):
    started = []

    class Job:
        def __init__(self, command, env):
            started.append((os.sched_getaffinity(0), command, env[jobs.WORKER]))

        def wait(self):
            return 0

    before = os.sched_getaffinity(0)
    monkeypatch.setattr(jobs.subprocess, "Popen", Job)
    monkeypatch.setattr(jobs.sys, "orig_argv", ["python", "scripts/ablate.py", "--jobs=1", "--workdir=w"])
    jobs.start(1)
    ((cores, command, _),) = started
    assert cores == {min(before)}
    assert command[1:] == ["scripts/ablate.py", "--workdir=w"]
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ConfigError, match=r"--jobs=4096: at most"):
        jobs.start(4096)


@pytest.mark.slow
def test_a_suite_trains_and_is_reproducible(tmp_path):
    directory = build(tmp_path / "data")
    suite = tiny_suite(tiny_base(directory))
    tables = []
    probed = dataclasses.replace(suite.variants["mixtral"], probes=("eval_capacity", "mask_top", "saturation"))
    suite = dataclasses.replace(suite, variants={**suite.variants, "mixtral": probed})
    for attempt in ("first", "second"):
        worker = runner.Worker(with_seeds(suite, [0, 1]), tmp_path / attempt, [])
        worker.run()
        worker.measure()
        tables.append([dataclasses.replace(r, seconds=0.0) for r in records.read_all(tmp_path / attempt)])
    assert tables[0] == tables[1]
    mixtral = [r for r in tables[0] if r.variant == "mixtral"]
    assert len({r.primary_loss for r in mixtral}) == 2
    assert len(mixtral[0].row_losses) == 8
    # At a capacity of 4·2·16/4 = 32 for 16 tokens nothing is dropped, as in the dropless model without masked experts.
    measured = mixtral[0].probes
    assert measured["eval_capacity/loss_4.0"] == pytest.approx(measured["mask_top/loss_full"], rel=1e-5)
    assert 0 <= measured["saturation/early@1"] <= 1
    # A run of the lab is an ordinary run: alone, with a program of its own, it logs the same rows.
    key = mixtral[-1].key
    train(
        suite.config(key.variant, key.seed, steps=key.steps, learning_rate=key.learning_rate), str(tmp_path / "alone")
    )
    alone = (tmp_path / "alone" / "metrics.jsonl").read_bytes()
    assert alone == (runner.run_directory(tmp_path / "first", key) / "metrics.jsonl").read_bytes()
