"""The ablation lab: statistics by hand, suites that refuse, claims that can fail, reports that repeat."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import pytest

from configs import base as defaults
from moe.config import ConfigError, to_dict
from moe.lab import claims, report, results, runner, statistics
from moe.lab.results import PRIMARY, Results
from moe.lab.suite import Comparison, Suite, Variant, check, load_suite
from moe.routing.resolve import from_config_dict
from moe.training.loop import train
from tests.tiny_text import build

ROOT = Path(__file__).resolve().parents[1]
SUITES = sorted(path for path in (ROOT / "configs/ablations").glob("*.py") if path.stem not in ("__init__", "common"))


# --- Statistics ------------------------------------------------------------------------------------------------------
def test_paired_interval_by_hand():
    # Mean 2, standard deviation 1, error 1/sqrt(3) = 0.57735; t(0.975, 2) = 4.30265: ± 2.48414. t = 3.46410,
    # p = 1 - t/sqrt(2 + t²) = 1 - 0.92582 = 0.07418, which is the closed form for two degrees of freedom.
    e = statistics.effect([1.0, 2.0, 3.0])
    assert (e.mean, e.n) == (2.0, 3)
    assert (e.low, e.high, e.p) == pytest.approx((-0.48414, 4.48414, 0.07418), abs=1e-5)


def test_one_seed_decides_nothing():
    e = statistics.effect([5.0, math.nan])
    assert (e.mean, e.low, e.high, e.n) == (5.0, -math.inf, math.inf, 1)


def test_steps_to_reach_a_loss():
    curve = [(10, 5.0), (20, 4.0), (30, 3.5)]
    assert statistics.steps_to_reach(curve, 4.25) == 17.5  # three quarters of the way from 5 to 4
    assert statistics.steps_to_reach(curve, 3.5) == 30
    assert statistics.steps_to_reach(curve, 3.4) == math.inf


def test_variance_ratio():
    # Variances 1 and 4; F(1/4; 2, 2) = x/(1 + x) = 0.2 in closed form.
    assert statistics.variance_ratio([1, 2, 3], [2, 4, 6]) == pytest.approx((0.25, 0.2))


@pytest.mark.parametrize(
    ("tokens", "factor", "share"),
    [(256, 1.0, 0.0658), (256, 1.25, 0.0054), (512, 0.75, 0.2505), (512, 1.0, 0.0466), (2048, 1.0, 0.0233)],
)
def test_chance_of_drop_is_the_papers_table(tokens, factor, share):
    assert claims.chance_of_drop(tokens, 8, factor) == pytest.approx(share, abs=6e-5)


# --- Suites ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", ["laptop", "pod"])
def test_every_suite_is_as_equal_as_it_says(path, size):
    suite = load_suite(str(path), size)
    assert suite.name == path.stem
    assert set(suite.primary) <= set(suite.base.data.domains) | {suite.base.data.dataset}


def test_every_claim_has_its_suite():
    assert [claim.number for claim in claims.CLAIMS] == list(range(1, 21))
    assert {claim.suite for claim in claims.CLAIMS} <= {path.stem for path in SUITES}


def suite_of(variants, comparisons=None, seeds=(0, 1, 2), base=None):
    base = defaults.get_config() if base is None else base
    return Suite("test", "?", base, variants, seeds, comparisons or {}, ("a",))


DENSE = Variant({"model.moe.gate": "none"})
SWITCH = Variant({"model.moe.gate": "switch"})


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (suite_of({"a": DENSE}, seeds=(0, 1)), "at least three"),
        (suite_of({"a": DENSE}, seeds=(0, 1, 1)), "at least three different"),
        (suite_of({"a": Variant({"model.moe.gat": "none"})}), "variant 'a'.*gat"),
        (suite_of({"a": Variant({"model.moe.gate": "swich"})}), "variant 'a'.*swich"),
        (suite_of({"a": dataclasses.replace(DENSE, starts_from="b")}), "no variant 'b'"),
        (suite_of({"a": DENSE}, {"c": Comparison("a", ("b",), ("steps",))}), "no variant 'b'"),
        (suite_of({"a": DENSE}, {"c": Comparison("a", ("a",), ("luck",))}), "'luck' is not one of"),
        (
            suite_of({"a": DENSE, "b": SWITCH}, {"c": Comparison("a", ("b",), ("total_parameters",))}),
            r"'b' has 3\.\d+ times the total_parameters of 'a'",
        ),
    ],
)
def test_a_suite_that_cannot_be_compared_is_refused(suite, message):
    with pytest.raises(ConfigError, match=message):
        check(suite)


def test_shards_part_the_runs_and_keep_children_with_parents(tmp_path):
    suite = suite_of({"a": DENSE, "b": SWITCH, "c": dataclasses.replace(SWITCH, starts_from="a", seed_offset=7)})
    runs = runner.plan(suite, tmp_path)
    assert [run.variant for run in runs] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert runs[6].config.start.checkpoint == str(tmp_path / "runs/a/seed_0")
    assert (runs[0].config.seed, runs[6].config.seed) == (0, 7)
    for count in (1, 2, 4):
        parts = [runner.shard(suite, runs, index, count) for index in range(count)]
        assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)
        for part in parts:
            names = {(run.variant, run.seed) for run in part}
            assert all(("a", seed) in names for variant, seed in names if variant == "c")


# --- Claims ----------------------------------------------------------------------------------------------------------
def losses(**by_variant):
    """Results of one evaluation: variant → a loss per seed."""
    return Results(
        (name, seed, 10, "loss", PRIMARY, "", str(loss))
        for name, values in by_variant.items()
        for seed, loss in enumerate(values)
    )


@pytest.mark.parametrize(
    ("switch", "verdict"),
    [
        ((4.9, 4.91, 4.89), claims.SUPPORTED),  # -0.1 ± 0.025
        ((5.1, 5.11, 5.09), claims.CONTRADICTED),
        ((4.9, 5.12, 4.95), claims.UNDECIDED),  # -0.01 ± 0.29
        ((4.0, math.nan, math.nan), claims.NOT_TESTABLE),  # one seed, however large the effect
    ],
)
def test_a_claim_is_decided_by_its_interval(switch, verdict):
    finding = claims.CLAIMS[0].test(losses(switch=switch, dense=(5.0, 5.0, 5.0)))
    assert finding.verdict == verdict


def test_a_claim_without_its_runs_is_not_testable():
    assert claims.CLAIMS[0].test(None).verdict == claims.NOT_TESTABLE
    finding = claims.CLAIMS[0].test(losses(dense=(5.0, 5.0, 5.0)))
    assert (finding.verdict, finding.note) == (claims.NOT_TESTABLE, "no loss of switch")


def test_no_worse_and_alike_allow_the_margin():
    # Interval of (0, 0.001, 0.002): 0.001 ± 0.0025.
    small, large = [0.0, 0.001, 0.002], [0.1, 0.101, 0.102]
    assert claims.no_worse("", small).verdict == claims.alike("", small).verdict == claims.SUPPORTED
    assert claims.no_worse("", large).verdict == claims.alike("", large).verdict == claims.CONTRADICTED
    assert claims.no_worse("", [-value for value in large]).verdict == claims.SUPPORTED
    assert claims.alike("", [-value for value in large]).verdict == claims.CONTRADICTED


def test_a_part_against_the_claim_contradicts_it():
    # Exploration: jitter as argmax, but sampled better.
    r = losses(argmax=(5.0, 5.0, 5.0), jitter=(5.0, 5.001, 5.002), sampled=(4.8, 4.81, 4.79))
    finding = claims.CLAIMS[19].test(r)
    assert [part.verdict for part in finding.parts] == [claims.SUPPORTED, claims.CONTRADICTED]
    assert finding.verdict == claims.CONTRADICTED


# --- Running and reporting -------------------------------------------------------------------------------------------
def tiny_base(directory):
    base = defaults.get_config()
    base.model.update(vocab_size=400, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16)
    base.model.moe.gate = "none"
    base.data.update(dataset="tiny_text/split", directory=str(directory), sequence_length=16, heldout_rows=8)
    base.data.shuffle_window = 4
    base.optimizer.warmup_steps = 1
    base.train.update(num_steps=4, log_every=2, eval_every=2, save_every=2, keep_checkpoints=4, sample_tokens=0)
    return base


def tiny_suite(base):
    moe = {"model.moe.gate": "mixtral", "model.moe.num_experts": 4, "model.moe.d_ff": 8}
    suite = suite_of(
        {"dense": Variant({}), "mixtral": Variant(moe)},
        {"equal FLOPs": Comparison("dense", ("mixtral",), ("steps", "flops"), tolerance=0.2)},
        base=base,
    )
    return dataclasses.replace(suite, primary=("tiny_text/split",))


def fake_train(config, workdir, **_):
    """Rows as a run would write them, from the seed alone."""
    directory = Path(workdir)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    rows = []
    for step in (2, 4):
        loss = 6.0 - step / 4 + 0.01 * config.seed
        row = {"step": step, "loss": loss - (0.1 if config.model.moe.gate == "mixtral" else 0.0)}
        if config.model.moe.gate != "none":
            per_layer = {name: [0.1, 0.2] for name in ("router_entropy", "fraction_tokens_dropped", "router_z_loss")}
            row |= {"expert_load": [[0.5, 0.5, 0.0, 0.0]] * 2, **per_layer}
        rows += [{**row, "kind": "heldout/all"}, {**row, "kind": "heldout/tiny_text/split"}]
        rows.append({"step": step, "kind": "train", "cross_entropy": loss})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    timing = {"step": 4, "kind": "timing", "step_seconds": 0.5, "tokens_per_second": 256.0}
    (directory / "timing.jsonl").write_text(json.dumps(timing) + "\n")


@pytest.fixture
def faked(monkeypatch):
    calls = []
    monkeypatch.setattr(
        runner, "train", lambda config, workdir, **_: (calls.append(workdir), fake_train(config, workdir))
    )
    return calls


def test_only_what_is_missing_is_run_and_the_report_repeats(faked, tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    texts = []
    for attempt in ("first", "second"):
        workdir = tmp_path / attempt
        runs = runner.plan(suite, workdir)
        runner.run_missing(suite, runs[:2])
        assert len(faked) == 2
        runner.run_missing(suite, runs)
        assert len(faked) == len(set(faked)) == 6
        faked.clear()
        results.write(workdir, *results.collect(suite, runs))
        report.write(workdir, suite, Results.read(workdir), "COMMAND")
        texts.append([(workdir / name).read_bytes() for name in ("results.csv", "loss.png", "routing.png")])
        (workdir / "timing.csv").unlink()  # the clock's part, which no two runs share
        for picture in workdir.glob("*.png"):
            picture.unlink()
        report.write(workdir, suite, Results.read(workdir), "COMMAND")
        texts[-1].append((workdir / "report.md").read_bytes())
    assert texts[0][0] == texts[1][0]
    assert texts[0][-1] == texts[1][-1]
    page = texts[0][-1].decode()
    # -0.1 in every seed; MaxVio of (1/2, 1/2, 0, 0) is 2 - 1, and two experts are dead.
    assert "| mixtral | 4.9100 ± 0.0100 | -0.1000 [-0.1000, -0.1000], p = 0, n = 3 |" in page
    assert "| mixtral | 1.00 / 1.00 | 0.10 / 0.20 | 2.00 / 2.00 |" in page


def test_runs_of_a_suite_that_has_changed_since_are_refused(faked, tmp_path):
    base = tiny_base(tmp_path)
    suite = tiny_suite(base)
    runner.run_missing(suite, runner.plan(suite, tmp_path / "runs"))
    base.optimizer.learning_rate = 0.5
    with pytest.raises(ConfigError, match=r"holds a run with another config.*optimizer\.learning_rate"):
        runner.run_missing(suite, runner.plan(suite, tmp_path / "runs"))


def test_a_failed_run_is_told_after_the_others(faked, monkeypatch, tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    runs = runner.plan(suite, tmp_path / "runs")

    def fails_once(config, workdir, **_):
        if config.seed == 1:
            raise ConfigError("the disk is full")
        fake_train(config, workdir)

    monkeypatch.setattr(runner, "train", fails_once)
    with pytest.raises(ConfigError, match="2 of 6 runs did not finish; the first, dense, seed 1: the disk is full"):
        runner.run_missing(suite, runs)
    assert [run.done for run in runs] == [True, False, True] * 2


def test_all_claims_on_one_page(tmp_path):
    found = {"switch_vs_mixtral": losses(switch=(4.9, 4.91, 4.89), dense=(5.0, 5.0, 5.0))}
    report.claims_page(tmp_path, found)
    page = (tmp_path / "claims.md").read_text()
    assert all(f"| {claim.number} | {claim.text} |" in page for claim in claims.CLAIMS)
    assert "supported: 1" in page
    assert "not testable here: 19" in page


@pytest.mark.slow
def test_a_suite_trains_probes_and_is_reproducible(tmp_path):
    directory = build(tmp_path / "data")
    tables = []
    for attempt in ("first", "second"):
        suite = tiny_suite(tiny_base(directory))
        runs = runner.plan(suite, tmp_path / attempt)
        runner.run_missing(suite, runs)
        rows, _ = results.collect(suite, runs)
        tables.append(rows)
    assert tables[0] == tables[1]
    r = Results(tables[0])
    assert r.seeds == [0, 1, 2]
    assert len({r.last("mixtral", seed, "loss", PRIMARY) for seed in r.seeds}) == 3
    # A run of the lab is a run: alone, with a program of its own, it gives the same rows.
    alone = tmp_path / "alone"
    train(runs[-1].config, str(alone), quiet=True)
    assert (alone / "metrics.jsonl").read_bytes() == (runs[-1].directory / "metrics.jsonl").read_bytes()


def test_configs_of_suites_are_configs():
    common = importlib.import_module("configs.ablations.common")
    for size in ("laptop", "pod"):
        assert from_config_dict(common.base(size)).model.moe.gate == "none"
