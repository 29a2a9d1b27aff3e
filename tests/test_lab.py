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
from moe.lab import costs, plan, records, results
from moe.lab.claims import decide
from moe.lab.expressions import Term, parse
from moe.lab.records import DIVERGED, FINISHED, PRIMARY, Key
from moe.lab.report import page
from moe.lab.running import jobs, runner
from moe.lab.suite import Comparison, Sweep, Variant, check, load_suite, with_seeds
from moe.lab.table import MissingError, Table
from moe.training.loop import train
from tests.lab_helpers import CLAIMS, DENSE, SWITCH, record, suite_of
from tests.tiny_text import build

ROOT = Path(__file__).resolve().parents[1]
SUITES = sorted(path for path in (ROOT / "configs/ablations").glob("*.py") if path.stem not in ("__init__", "common"))


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


def test_only_the_arms_and_horizons_asked_for_are_trained(faked, tmp_path):
    suite = tiny_suite(tiny_base(tmp_path), horizons=(2, 4))
    only = runner.only(suite, ["mixtral"], ["4"])
    runner.Worker(suite, tmp_path / "w", [], only=only).run()
    assert {(key.variant, key.steps) for key in faked} == {("mixtral", 4)}
    with pytest.raises(ConfigError, match="--horizons=3: must be among 2, 4"):
        runner.only(suite, [], ["3"])
    with pytest.raises(ConfigError, match="--arms=none: must be among dense, mixtral"):
        runner.only(suite, ["none"], [])


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
    probed = dataclasses.replace(
        suite.variants["mixtral"], probes=("eval_capacity", "mask_top", "specialisation", "saturation")
    )
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
    for control in ("", "untrained_", "hash_"):
        assert 0 <= measured[f"specialisation/{control}repeat_first@1"] <= 1
    # A run of the lab is an ordinary run: alone, with a program of its own, it logs the same rows.
    key = mixtral[-1].key
    train(
        suite.config(key.variant, key.seed, steps=key.steps, learning_rate=key.learning_rate), str(tmp_path / "alone")
    )
    alone = (tmp_path / "alone" / "metrics.jsonl").read_bytes()
    assert alone == (runner.run_directory(tmp_path / "first", key) / "metrics.jsonl").read_bytes()
