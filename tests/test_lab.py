"""The ablation lab: suites, plans, records, expressions and the report."""

import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest

from moe.config import ConfigError
from moe.lab import costs, plan, records, results
from moe.lab.claims import decide
from moe.lab.expressions import Term, parse
from moe.lab.records import DIVERGED, PRIMARY, Key
from moe.lab.report import figures, page, sections
from moe.lab.suite import Comparison, Sweep, Variant, check, load_suite, with_seeds
from moe.lab.table import MissingError, Table
from tests.helpers import slow_case
from tests.lab_helpers import CLAIMS, DENSE, SWITCH, record, suite_of, tiny_base, tiny_suite

ROOT = Path(__file__).resolve().parents[1]
SUITES = sorted(path for path in (ROOT / "configs/ablations").glob("*.py") if path.stem not in ("__init__", "common"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", ["laptop", slow_case("pod")])
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
    # Best at 10 steps: the largest; it and the next lower are tried at 20, and no other run is named yet.
    assert [key for key in plan.runs(suite, middle) if key.steps == 20] == [
        Key("a", 20, 9e-3, 7),
        Key("a", 20, 3e-3, 7),
    ]
    assert not plan.choose(suite, middle, "a").tuned
    # At 20 steps the largest rate diverges, so the one below it is tried against the lowest, which is worse.
    checked = [*middle, record("a", 7, 4.5, 20, 3e-3), record("a", 7, 4.4, 20, 9e-3, DIVERGED)]
    assert plan.choose(suite, checked, "a").to_check == (1e-3,)
    full = [*checked, record("a", 7, 4.6, 20, 1e-3)]
    choice = plan.choose(suite, full, "a")
    assert (choice.rate, choice.tuned, choice.at_edge) == (3e-3, True, False)
    assert {key.learning_rate for key in plan.runs(suite, full) if key.seed != 7} == {3e-3}
    # Reserved seeds are in no comparison.
    assert Table(suite, full).used == []


def test_a_check_with_a_seed_of_the_comparisons_takes_their_run():
    sweep = Sweep((1e-3, 3e-3), (7,), 10, check_seed=0)
    suite = suite_of({"a": DENSE}, seeds=(0, 1), horizons=(10, 20), sweep=sweep)
    swept = [record("a", 7, loss, 10, rate) for rate, loss in ((1e-3, 5.0), (3e-3, 4.9))]
    # The run of the comparisons exists at the optimum: only the lower rate is missing.
    found = [*swept, record("a", 0, 4.5, 20, 3e-3)]
    assert plan.choose(suite, found, "a").to_check == (1e-3,)
    tuned = [*found, record("a", 0, 4.6, 20, 1e-3)]
    choice = plan.choose(suite, tuned, "a")
    assert (choice.rate, choice.at_edge) == (3e-3, True)  # of two rates; a larger one may be better still
    assert Table(suite, tuned).seeds(20, "a") == [0]
    # Of other seeds' comparisons it is no part.
    assert Table(dataclasses.replace(suite, seeds=(3, 4)), tuned).used == []


def test_a_sweep_at_the_longest_horizon_is_decided_by_its_reserved_seeds_alone():
    sweep = Sweep((1e-3, 3e-3), (7,), 20, check_seed=0)
    suite = suite_of({"a": DENSE}, seeds=(0, 1), horizons=(20,), sweep=sweep)
    swept = [record("a", 7, loss, 20, rate) for rate, loss in ((1e-3, 4.6), (3e-3, 4.5))]
    # The chosen rate's first run of the comparisons has a higher loss, which is that seed's, not the rate's.
    choice = plan.choose(suite, [*swept, record("a", 0, 4.9, 20, 3e-3)], "a")
    assert (choice.rate, choice.tuned, choice.tried) == (3e-3, True, {(20, 1e-3): 4.6, (20, 3e-3): 4.5})


def test_curves_are_compared_at_the_steps_that_all_runs_have():
    def run(variant, seed, points):
        rows = [(step, "loss", PRIMARY, "", loss) for step, loss in points.items()]
        return record(variant, seed, 0.0, rows=rows)

    runs = [run("a", 0, {5: 6.0, 10: 5.0, 20: 4.0}), run("b", 0, {5: 5.5, 10: 4.8, 20: 3.5})]
    runs += [run("a", 1, {8: 5.0, 10: 4.9, 20: 4.2}), run("b", 1, {5: 5.6, 10: 4.8, 20: 4.0})]  # "a" lost step 5
    found = Table(suite_of({"a": DENSE, "b": SWITCH}, horizons=(20,)), runs).curve_differences("b", "a", 20)
    assert found == {10: pytest.approx([-0.2, -0.1]), 20: pytest.approx([-0.5, -0.2])}


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
    runs = [record("a", 0, 4.5), record("b", 0, 4.25, probes={"p/x@1": 0.5}), record("a", 0, 4.4, rate=1e-3)]
    results.write(tmp_path, runs, [run.key for run in runs[:2]])
    found = pd.read_csv(tmp_path / "results.csv")
    last = found.query("compared and quantity == 'loss' and domain == 'primary' and step == steps")
    last = last.set_index("variant").value
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


def test_the_training_of_parents_is_counted():
    suite = suite_of({"parent": DENSE, "child": dataclasses.replace(DENSE, starts_from="parent")}, horizons=(20,))
    runs = [record(name, seed, 5.0) for name in ("parent", "child") for seed in (0, 1)]
    text = sections.costs_section(Table(suite, runs))
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")]
        for line in text.splitlines()
        if "|" in line
    }
    executed, before = 7, 8
    assert rows["child"][before] == rows["parent"][executed] == f"{suite.costs('parent')['flops']:.3g}"
    assert rows["parent"][before] == "–"


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
    assert f"Its mean loss is the lower one from about {tokens:.2f} million tokens on" in text
    assert "![horizons](horizons.png)" in text


def test_report_below_the_longest_horizon_says_so(tmp_path):
    suite = dataclasses.replace(tiny_suite(tiny_base(tmp_path)), horizons=(4, 400))
    found = [record(name, seed, loss, 4) for name, loss in (("dense", 5.0), ("mixtral", 5.1)) for seed in (0, 1, 2)]
    found.append(record("dense", 0, 4.0, 400))  # a first run of the next horizon, without a partner
    page.write(tmp_path, suite, found, [], "", "COMMAND")
    text = (tmp_path / "report.md").read_text()
    assert "The longest horizon, 400 steps, has no comparison yet" in text
    assert "below the crossing" in text
    assert "| dense | 4 | 5.0000 ± 0.0000 |" in text  # the table of domains stays with the three seeds


def test_the_picture_of_a_sweep_names_arms_that_only_one_panel_has(tmp_path, monkeypatch):
    suite = suite_of({"a": DENSE, "b": DENSE}, seeds=(0, 1), horizons=(10, 20), sweep=Sweep((1e-3, 3e-3), (7,), 10))
    found = [record(name, 7, 5.0, 10, rate) for name in ("a", "b") for rate in (1e-3, 3e-3)]
    found.append(record("b", 7, 4.0, 20, 1e-3))
    pictures = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: pictures.append(figure) or path.name)
    assert figures.sweep(tmp_path / "sweep.png", Table(suite, found)) == "sweep.png"
    (picture,) = pictures
    assert [text.get_text() for text in picture.axes[-1].get_legend().get_texts()] == ["a", "b"]


def test_effects_of_the_report_follow_from_results_csv(tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    ours, base = (4.91, 4.87, 4.95), (5.02, 4.99, 5.01)
    found = [record("dense", seed, loss, 4) for seed, loss in enumerate(base)]
    found += [record("mixtral", seed, loss, 4) for seed, loss in enumerate(ours)]
    page.write(tmp_path, suite, found, [], "", "COMMAND")
    results_csv = pd.read_csv(tmp_path / "results.csv")
    final = results_csv.query("compared and quantity == 'loss' and domain == 'primary' and step == steps")
    by_seed = final.pivot_table("value", "seed", "variant")
    difference = by_seed["mixtral"] - by_seed["dense"]
    half = 4.30265 * difference.std() / math.sqrt(3)
    low, high = difference.mean() - half, difference.mean() + half
    assert f"{difference.mean():+.4f} nats [{low:+.4f}, {high:+.4f}], n = 3" in (tmp_path / "report.md").read_text()
