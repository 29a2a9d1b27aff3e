"""Runs of the ablation lab: which are trained, by which process, and what is recorded."""

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moe.config import ConfigError, MeshConfig
from moe.lab import records, results, step_seconds
from moe.lab.benchmarks import train_steps
from moe.lab.loading import with_seeds
from moe.lab.records import DIVERGED, FINISHED, PRIMARY
from moe.lab.running import evaluation, jobs, last_tenth, probes, progress, runner
from moe.lab.running.heldout import dropless
from moe.lab.running.programs import Programs
from moe.lab.schedule import PlannedRuns
from moe.lab.suite import Sweep, Variant
from moe.parallel.mesh import make_mesh
from moe.training.train import train
from tests.lab_helpers import DENSE, SWITCH, claim_of, keyed, record, suite_of, tiny_base, tiny_suite, write_page
from tests.tiny_text import build


@pytest.fixture
def faked(monkeypatch):
    """Replace training by records whose losses are made from the key; returns the keys that were run."""
    calls = []

    def fake(self, key):
        calls.append(key)
        loss = 6.0 + 0.01 * key.seed - (0.1 if key.variant == "mixtral" else 0.0)
        (run,) = keyed(self._suite, [record(key.variant, key.seed, loss, key.steps, key.learning_rate)])
        run.write(self._workdir)

    monkeypatch.setattr(runner.Worker, "_train", fake)
    monkeypatch.setattr(runner.Worker, "_open_text", lambda self: None)  # these runs have no text
    return calls


def test_only_missing_runs_are_trained_and_the_report_is_reproducible(faked, tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    texts = []
    for name in ("first", "second"):
        workdir = tmp_path / name
        runner.Worker(with_seeds(suite, [0]), workdir, []).run()
        assert len(faked) == 2
        runner.Worker(suite, workdir, []).run()
        assert len(faked) == len(set(faked)) == 6
        faked.clear()
        write_page(workdir, suite, records.read_all(workdir))
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


def test_a_suite_continues_from_its_records_only(faked, tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    runner.Worker(with_seeds(suite, [0, 1]), tmp_path / "here", []).run()
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "here" / "records").rename(there / "records")
    faked.clear()
    runner.Worker(suite, there, []).run()
    assert {key.seed for key in faked} == {2}


def test_an_arm_of_adapters_starts_from_another(tmp_path):
    """Its workdir is known only when it is trained; its programs serve all seeds."""
    lora = Variant({"lora.rank": 2}, starts_from="parent")
    suite = suite_of({"parent": SWITCH, "lora": lora, "rank_4": dataclasses.replace(lora, overrides={"lora.rank": 4})})
    assert suite.config("lora").start.checkpoint == "parent"
    programs, mesh = Programs(), make_mesh(MeshConfig(), jax.devices()[:1])
    first, second = (suite.config("lora", seed, starts_from=str(tmp_path / str(seed))) for seed in (0, 1))
    programs(first, mesh), programs(suite.config("rank_4"), mesh)
    assert (len(programs._programs), programs(second, mesh).config) == (2, second)
    with pytest.raises(ConfigError, match=r"variant 'alone': lora\.rank=2: needs start\.checkpoint"):
        suite_of({"alone": dataclasses.replace(lora, starts_from="")}).config("alone")


def test_a_run_that_another_process_has_locked_is_left_to_it(faked, tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    found = PlannedRuns(suite, [])
    taken = found.runs()[0]
    with runner._lock(tmp_path, found.run(taken)):
        runner.Worker(suite, tmp_path, []).run()
    assert len(faked) == 5
    assert taken not in faked


def test_a_process_waits_for_the_sweep_that_others_finish(faked, monkeypatch, tmp_path):
    suite = dataclasses.replace(tiny_suite(tiny_base(tmp_path)), sweep=Sweep((1e-3, 3e-3, 9e-3), (7, 8)))
    found = PlannedRuns(suite, [])
    taken = found.runs()[0]
    lock = runner._lock(tmp_path, found.run(taken))
    lock.acquire()

    def ends(_):
        (run,) = keyed(suite, [record(taken.variant, taken.seed, 6.0, taken.steps, taken.learning_rate)])
        run.write(tmp_path)
        lock.release()

    monkeypatch.setattr(runner.time, "sleep", ends)
    runner.Worker(suite, tmp_path, []).run()
    assert taken not in faked
    assert {(key.variant, key.seed) for key in faked} >= set(itertools.product(suite.variants, suite.seeds))


def test_a_process_rereads_the_records_after_a_run_that_ended_while_it_read(faked, monkeypatch, tmp_path):
    """The last run of a sweep is written after the records were read, before its lock is taken: more runs follow."""
    sweep = Sweep((1e-3, 3e-3, 9e-3), (7,))
    suite = dataclasses.replace(tiny_suite(tiny_base(tmp_path)), sweep=sweep)
    monkeypatch.setattr(runner, "_LOOK_AGAIN", 0.01)
    last, read_all, looks = PlannedRuns(suite, []).runs()[0], records.read_all, []

    def missing():
        found = PlannedRuns(suite, read_all(tmp_path))
        return [key for key in found.runs() if found.record(key) is None]

    def write(key):
        loss = 6.0 if key.learning_rate == 3e-3 else 7.0
        keyed(suite, [record(key.variant, key.seed, loss, key.steps, key.learning_rate)])[0].write(tmp_path)

    def read(folder):
        found = read_all(folder)
        if not looks:
            write(last)
        looks.append(found)
        return found

    while todo := [key for key in missing() if key != last]:
        for key in todo:
            write(key)
    monkeypatch.setattr(runner, "read_all", read)
    runner.Worker(suite, tmp_path, []).run()
    assert faked
    assert not missing()


def test_an_arm_without_its_parent_is_refused(faked, tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    suite = dataclasses.replace(suite, variants={**suite.variants, "child": Variant({}, starts_from="dense")})
    with pytest.raises(ConfigError, match=r"child, .* needs the run dense, .* not finished"):
        runner.Worker(suite, tmp_path / "w", [], only=runner.only(suite, ["child"], [])).run()
    assert not faked


@pytest.mark.parametrize("own", [{"starts_from": "dense"}, {"rate_from": "dense"}])
def test_an_arm_whose_rate_follows_from_untrained_arms_is_refused(faked, tmp_path, own):
    suite = tiny_suite(tiny_base(tmp_path))
    variants = {**suite.variants, "child": Variant({}, **own)}
    suite = dataclasses.replace(suite, sweep=Sweep((1e-3, 3e-3, 9e-3), (7,)), variants=variants)
    with pytest.raises(ConfigError, match="child: its learning rate follows from arms that are not trained here"):
        runner.Worker(suite, tmp_path / "w", [], only=runner.only(suite, ["child"], [])).run()
    assert not faked


def test_a_run_that_ended_in_an_error_has_not_diverged(monkeypatch, tmp_path):
    """Some updates of its last logged row were skipped, but it ended because its data cannot be read."""

    def fail(config, directory, **_):
        Path(directory).mkdir(parents=True)
        row = {"step": 1, "kind": "train", "skipped": 0.1, "loss": 6.0, "cross_entropy": 6.0}
        (Path(directory) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        raise ConfigError("the batch of step 2 cannot be read")

    monkeypatch.setattr(runner, "train", fail)
    monkeypatch.setattr(runner.Worker, "_open_text", lambda self: None)
    with pytest.raises(ConfigError, match=r"runs did not finish; the first, .*cannot be read"):
        runner.Worker(tiny_suite(tiny_base(tmp_path)), tmp_path / "w", []).run()
    assert not records.read_all(tmp_path / "w")


def test_a_failed_run_is_reported_after_the_others(faked, monkeypatch, tmp_path):
    succeed = runner.Worker._train

    def fails_once(self, key):
        if key.seed == 1:
            raise ConfigError("the disk is full")
        succeed(self, key)

    monkeypatch.setattr(runner.Worker, "_train", fails_once)
    with pytest.raises(ConfigError, match=r"2 runs did not finish; the first, dense, .* seed 1: the disk is full"):
        runner.Worker(tiny_suite(tiny_base(tmp_path)), tmp_path, []).run()
    assert len(records.read_all(tmp_path)) == 4


def test_a_stopped_run_is_evaluated_at_the_same_checkpoints_as_others(tmp_path, monkeypatch):
    train_config = suite_of({"a": DENSE}, horizons=(2000,)).config("a").train
    assert (train_config.save_every, train_config.keep_every) == (250, 250)
    # Stops at 650 and 850 left extra checkpoints; the last step need not be a multiple of 250.
    monkeypatch.setattr(results.manager, "complete_steps", lambda _: [250, 500, 650, 750, 850, 1990])
    assert results.checkpoint_steps(tmp_path, train_config.save_every) == [250, 500, 750, 1990]


def test_what_counts_as_diverged():
    assert evaluation.outcome(np.asarray([3.0, 4.0]), 400)[0] == FINISHED
    assert evaluation.outcome(np.asarray([3.0, math.nan]), 400)[0] == DIVERGED
    assert evaluation.outcome(np.asarray([6.9, 6.9]), 400)[0] == FINISHED  # ln 400 = 5.99
    status, reason = evaluation.outcome(np.asarray([7.0, 7.0]), 400)
    assert (status, reason) == (DIVERGED, "held-out loss 7.00, more than a nat above that of a uniform guess")


@pytest.mark.parametrize(("code", "error"), [(75, SystemExit), (1, ConfigError)])
def test_stopped_jobs_are_told_apart_from_failed_ones(monkeypatch, code, error):
    """Exit code 75 means that SIGTERM stopped the program, and that the same command continues."""
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=lambda: code))
    with pytest.raises(error, match=r"75|a process failed"):
        jobs.start(1, [])


def test_ctrl_c_waits_for_the_jobs_to_save(tmp_path):
    """It reaches them too: they save, and hold the locks of their runs until then."""
    saved = tmp_path / "saved"
    pause, mark = "time.sleep(0.3)", f"pathlib.Path({str(saved)!r}).touch()"
    job = f"import os, pathlib, time; {pause}; os.kill({os.getpid()}, 2); {pause}; {mark}"
    handler = signal.signal(signal.SIGINT, lambda *_: sys.exit("left before its jobs"))
    try:
        with pytest.raises(SystemExit, match=r"^130$"):
            jobs.start(1, ["-ISc", job])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert saved.exists()


@pytest.mark.parametrize(
    ("event", "error"),
    [(lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit), (lambda: os.stat("/nowhere"), FileNotFoundError)],
)
def test_jobs_are_ended_if_a_further_one_is_not_started(monkeypatch, tmp_path, event, error):
    """One that goes on would train for days."""
    ended = []

    def popen(*_, **__):
        number = next(count)
        if number == 1:
            event()
        asked = []
        return SimpleNamespace(terminate=lambda: asked.append(1), wait=lambda: (asked and ended.append(number)) or 75)

    count = itertools.count()
    monkeypatch.setattr(jobs.subprocess, "Popen", popen)
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(jobs.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(jobs.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(error):
        jobs.start(3, [])
    assert ended == ([0, 1] if error is SystemExit else [0])


def test_each_job_is_pinned_to_one_core(monkeypatch, tmp_path):
    started = []

    class Job:
        def __init__(self, command, env):
            started.append((os.sched_getaffinity(0), command, env[jobs.WORKER]))

        def wait(self):
            return 0

    before = os.sched_getaffinity(0)
    monkeypatch.setattr(jobs.subprocess, "Popen", Job)
    monkeypatch.setattr(jobs.tempfile, "gettempdir", lambda: str(tmp_path))
    jobs.start(1, ["-m", "moe", "ablate", "--workdir=w"])
    ((cores, command, _),) = started
    assert cores == {min(before)}
    assert command[1:] == ["-m", "moe", "ablate", "--workdir=w"]
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ConfigError, match=r"--jobs=4096: at most"):
        jobs.start(4096, [])


def test_cores_of_other_commands_are_taken_last(monkeypatch, tmp_path):
    monkeypatch.setattr(jobs.tempfile, "gettempdir", lambda: str(tmp_path))
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second, contextlib.ExitStack() as third:
        assert jobs._free_first([0, 1, 2], 1, first) == [0]
        assert jobs._free_first([0, 1, 2], 1, second) == [1]
        assert jobs._free_first([0, 1, 2], 3, third) == [2, 0, 1]
        first.close()
        assert jobs._free_first([0, 1, 2], 2, third) == [0, 1]


def test_probes_are_measured_once_and_only_at_the_rate_in_use(tmp_path, monkeypatch):
    suite = suite_of({"a": dataclasses.replace(DENSE, probes=("p",))}, seeds=(0, 1), horizons=(20,))
    runs = keyed(suite, [record("a", 0, 5.0), record("a", 1, 5.0), record("a", 2, 4.0, rate=1e-3)])
    for run in runs:
        run.write(tmp_path)
        runner.run_directory(tmp_path, run.key, run.run).mkdir(parents=True)
    mesh = make_mesh(suite.config("a").mesh)
    trained = SimpleNamespace(model=SimpleNamespace(program=SimpleNamespace(mesh=mesh)))
    monkeypatch.setattr(runner.Worker, "_trained", lambda *_: trained)
    calls = itertools.count(1)
    monkeypatch.setitem(probes.PROBES, "p", lambda _: {"calls": float(next(calls))})
    worker = runner.Worker(suite, tmp_path, [])

    def found():
        return [record.probes.get("p/calls") for record in records.read_all(tmp_path)]  # seeds in order

    with runner._lock(tmp_path, runs[1].run):  # another process measures it
        worker.measure()
    assert found() == [1.0, None, None]
    for _ in range(2):
        worker.measure()
        assert found() == [1.0, 2.0, None]


def test_a_probe_that_cannot_be_measured_is_logged_and_the_others_are_measured(tmp_path, monkeypatch):
    """The checkpoints that one probe reads were pruned by another suite, which has the same run without probes."""
    suite = suite_of({"a": dataclasses.replace(DENSE, probes=("saturation", "p"))}, seeds=(0, 1), horizons=(20,))
    runs = keyed(suite, [record("a", 0, 5.0), record("a", 1, 5.0)])
    for run in runs:
        run.write(tmp_path)
        runner.run_directory(tmp_path, run.key, run.run).mkdir(parents=True)
    config = suite.config("a")
    program = SimpleNamespace(config=config, mesh=make_mesh(config.mesh))
    last = SimpleNamespace(model=SimpleNamespace(program=program), steps=[config.train.num_steps])
    monkeypatch.setattr(runner.Worker, "_trained", lambda *_: last)
    monkeypatch.setitem(probes.PROBES, "p", lambda _: {"one": 1.0})
    runner.Worker(suite, tmp_path, []).measure()
    assert [found.probes for found in records.read_all(tmp_path)] == [{"p/one": 1.0}] * 2
    log = (tmp_path / "progress.log").read_text()
    for run in runs:
        assert f"not measured: probe saturation of {run.key}: the probe saturation needs checkpoints" in log


def test_a_run_is_probed_before_the_next_one_is_trained(tmp_path, monkeypatch):
    suite = suite_of({"a": dataclasses.replace(DENSE, probes=("p",))}, seeds=(0, 1), horizons=(20,))
    runs = {run.key: run for run in keyed(suite, [record("a", 0, 5.0), record("a", 1, 5.0)])}

    def train(worker, key):
        runs[key].write(tmp_path)
        runner.run_directory(tmp_path, key, runs[key].run).mkdir(parents=True)

    mesh = make_mesh(suite.config("a").mesh)
    monkeypatch.setattr(runner.Worker, "_open_text", lambda _: None)
    monkeypatch.setattr(runner.Worker, "_train", train)
    trained = SimpleNamespace(model=SimpleNamespace(program=SimpleNamespace(mesh=mesh)))
    monkeypatch.setattr(runner.Worker, "_trained", lambda *_: trained)
    monkeypatch.setitem(probes.PROBES, "p", lambda _: {"finished": float(len(records.read_all(tmp_path)))})
    runner.Worker(suite, tmp_path, [], sweep=False).run()
    assert [found.probes.get("p/finished") for found in records.read_all(tmp_path)] == [1.0, 2.0]


def test_probes_and_claims_are_checked_at_the_start():
    suite = suite_of({"a": DENSE, "b": dataclasses.replace(SWITCH, probes=("eval_capacities",))})
    with pytest.raises(ConfigError, match=r"variant 'b': no probe 'eval_capacities'; there are eval_capacity, "):
        runner.check_start(suite, [])
    with pytest.raises(ConfigError, match=r"claim 1: suite 'test' has no variant 'b'"):
        runner.check_start(suite_of({"a": DENSE}), [claim_of()])
    runner.check_start(suite_of({"a": DENSE, "b": SWITCH}), [claim_of()])


def test_steps_of_arms_are_timed_and_read_back(tmp_path):
    assert step_seconds.read(tmp_path) is None
    suite = tiny_suite(tiny_base(tmp_path))
    seconds = train_steps.processor_seconds({"dense": suite.config("dense")}, 3)
    step_seconds.StepSeconds(seconds, 3, "1 x cpu", "abc").write(tmp_path)
    found = step_seconds.read(tmp_path)
    low, middle, high = found.arms["dense"]
    assert 0 < low <= middle <= high
    assert (list(found.arms), found.steps) == (["dense"], 3)
    (tmp_path / step_seconds.FILE).write_text('{"arms": {"dense": [0, 1]}}')
    with pytest.raises(ConfigError, match=r"step_seconds\.json: .*arms"):
        step_seconds.read(tmp_path)


@pytest.mark.slow
def test_a_suite_trains_and_is_reproducible(tmp_path):
    directory = build(tmp_path / "data")
    suite = tiny_suite(tiny_base(directory))
    tables = []
    probed = dataclasses.replace(
        suite.variants["mixtral"], probes=tuple(sorted(probes.PROBES.keys() - {"shared_expert"}))
    )
    suite = dataclasses.replace(suite, variants={**suite.variants, "mixtral": probed})
    for attempt in ("first", "second"):
        runner.Worker(with_seeds(suite, [0, 1]), tmp_path / attempt, []).run()
        tables.append([dataclasses.replace(r, seconds=0.0) for r in records.read_all(tmp_path / attempt)])
    assert tables[0] == tables[1]
    mixtral = [r for r in tables[0] if r.variant == "mixtral"]
    assert len({r.primary_loss for r in mixtral}) == 2
    assert len(mixtral[0].row_losses) == 8
    # At a capacity of 4·2·16/4 = 32 for 16 tokens nothing is dropped, as in the dropless model without masked experts.
    measured = mixtral[0].probes
    assert measured["eval_capacity/loss_4.0"] == pytest.approx(measured["mask_top/loss_full"], rel=1e-5)
    # A quarter of 4 experts is one; an eighth is rounded to none.
    assert {"mask_top/loss_full", "mask_top/loss_masked", "mask_top/loss_0.25"} == {n for n in measured if "mask" in n}
    assert measured["mask_top/loss_masked"] == measured["mask_top/loss_full"] != measured["mask_top/loss_0.25"]
    assert 0 <= measured["saturation/early@1"] <= 1
    assert 1 / 3 <= measured["coactivation/partner@1"] <= 1  # the most frequent of three partners
    first, either = (measured[f"repetition/{choices}_tiny_text/split@1"] for choices in ("first", "first_or_second"))
    assert first == measured["specialisation/repeat_first@1"] <= either <= 1
    for control in ("", "untrained_", "hash_"):
        assert 0 <= measured[f"specialisation/{control}repeat_first@1"] <= 1
    # A run of the lab is an ordinary run: trained on its own, with its own compiled program, it logs the same rows.
    key = mixtral[-1].key
    train(
        suite.config(key.variant, key.seed, steps=key.steps, learning_rate=key.learning_rate), str(tmp_path / "alone")
    )
    alone = (tmp_path / "alone" / "metrics.jsonl").read_bytes()
    assert alone == (runner.run_directory(tmp_path / "first", key, mixtral[-1].run) / "metrics.jsonl").read_bytes()


def test_the_primary_loss_is_the_mean_over_the_named_domains():
    losses, domains = {4: np.asarray([1.0, 3.0, 8.0])}, ["a", "a", "b"]
    assert (4, "loss", PRIMARY, "", 5.0) in evaluation._mixed_rows("loss", losses, domains, ("a", "b"))  # (2 + 8) / 2
    assert (4, "loss", PRIMARY, "", 2.0) in evaluation._mixed_rows("loss", losses, domains, ("a",))


def test_losses_of_the_last_tenth_by_batch(tmp_path):
    """The last two of 20 steps; a step that is trained again after a stop counts once."""
    program = SimpleProgram(config=SimpleNamespace(train=SimpleNamespace(num_steps=20)), train_step=lambda s, b: (s, b))
    path = tmp_path / "last"
    recorded = last_tenth.recording(program, path)
    for step in range(20):
        recorded.train_step(SimpleNamespace(step=step), SimpleNamespace(cross_entropy=step + 0.5))
    resumed = last_tenth.recording(program, path)
    for step in (18, 19):
        resumed.train_step(SimpleNamespace(step=step), SimpleNamespace(cross_entropy=step + 0.5))
    assert len(path.read_text().splitlines()) == 4
    assert last_tenth.losses(path, 20) == [18.5, 19.5]
    path.write_text("19 1")  # the disk was full; the run continues with step 19
    continued = last_tenth.recording(program, path)
    for step in (18, 19):
        continued.train_step(SimpleNamespace(step=step), SimpleNamespace(cross_entropy=step + 0.5))
    assert last_tenth.losses(path, 20) == [18.5, 19.5]


@dataclasses.dataclass(frozen=True)
class SimpleProgram:
    config: object
    train_step: object


def test_arms_with_a_capacity_are_evaluated_without_drops_too():
    suite = suite_of({"drop": SWITCH, "dense": DENSE, "choice": Variant({
        "model.moe.gate": "expert_choice", "model.moe.accept_future_leak": True})})  # fmt: skip
    dropping = suite.config("drop")
    assert dropless(dropping).model.moe.dispatch == "dropless"
    assert dropless(suite.config("dense")) == suite.config("dense")
    assert dropless(suite.config("choice")) is None


def test_the_time_left_is_rounded_to_whole_minutes(tmp_path, monkeypatch):
    """Half of the work took 179.6 minutes: 3 hours are left, not 2 hours and 60 minutes."""
    clock = iter((0.0, 179.6 * 60))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    shown = progress.Progress(suite_of({"a": SWITCH}), tmp_path)
    shown._left = 2.0
    assert shown._time_left(1.0, running=True).startswith("3 h 0 min left")


def test_the_pace_counts_only_the_steps_of_this_process(tmp_path, monkeypatch):
    """A run of 8 steps goes on at step 6; one step takes 2 minutes, so the last one does too."""
    clock = iter((0.0, 120.0, 120.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    suite, key = suite_of({"a": SWITCH}), records.Key("a", 8, 1e-3, 0)
    shown = progress.Progress(suite, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "kind": "train", "cross_entropy": 2.0}\n')
    shown.start(key, [key], [])
    with shown.following(key, tmp_path):
        shown._follow(key, 6, 2.0)
        shown._follow(key, 7, 2.0)
    lines = (tmp_path / "progress.log").read_text().splitlines()
    assert lines[-2].endswith("step 6 of 8, loss 2.000; time left not known yet")
    said, _, end = lines[-1].partition(", until ")
    assert said.endswith("test, run 1 of 1, a, 8 steps, learning rate 0.001, seed 0: step 7 of 8, loss 2.000; "
                         "0 h 2 min left at the pace of this process")  # fmt: skip
    said_at = datetime.datetime.fromisoformat(lines[-1][:19])
    ends = {f"{said_at + datetime.timedelta(minutes=2, seconds=late):%d %B %H:%M}" for late in (0, 5)}
    assert end in ends
    assert shown._trained == pytest.approx(suite.costs("a", 8)["flops"] / 4)


def test_a_disk_that_is_full_for_a_moment_does_not_end_the_lines_of_a_run(tmp_path, monkeypatch):
    said, third = [], threading.Event()

    def full(path, text):
        said.append(text)
        if len(said) < 3:
            raise OSError(28, "No space left on device")
        third.set()

    monkeypatch.setattr(progress, "append", full)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.01)
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "kind": "train", "cross_entropy": 2.0}\n')
    shown = progress.Progress(suite_of({"a": SWITCH}), tmp_path)
    with shown.following(records.Key("a", 8, 1e-3, 0), tmp_path):
        assert third.wait(10)


def test_arms_may_read_texts_whose_domains_have_the_same_names(tmp_path, monkeypatch):
    suite = suite_of(
        {name: Variant({"data.dataset": f"/tmp/{name}/text"}) for name in ("raw", "clean")}, horizons=(20,)
    )
    (run,) = keyed(suite, [record("raw", 0, 5.0)])

    def prepare_run(config, progress):
        return SimpleNamespace(versions={"books": config.data.dataset.split("/")[2]})

    monkeypatch.setattr(runner.pipeline, "prepare_run", prepare_run)
    dataclasses.replace(run, data={"books": "raw"}).write(tmp_path)
    runner.Worker(suite, tmp_path, [])._open_text()
    dataclasses.replace(run, data={"books": "older"}).write(tmp_path)
    with pytest.raises(ConfigError, match=r"text of 'books' has changed since .* \(version older, now raw\)"):
        runner.Worker(suite, tmp_path, [])._open_text()


def test_arms_with_other_domains_of_a_folder_read_the_same_text(tmp_path, monkeypatch):
    arms = {"all": (), "books": ("books",)}
    dataset = {"data.dataset": "/tmp/x/text"}
    suite = suite_of({name: Variant({**dataset, "data.domains": used}) for name, used in arms.items()}, horizons=(20,))
    (run,) = keyed(suite, [record("all", 0, 5.0)])
    dataclasses.replace(run, data={"books": "1", "code": "1"}).write(tmp_path)

    def prepare_run(config, progress):
        return SimpleNamespace(versions=dict.fromkeys(config.data.domains or ("books", "code"), "2"))

    monkeypatch.setattr(runner.pipeline, "prepare_run", prepare_run)
    with pytest.raises(ConfigError, match=r"text of 'books' has changed since the run all"):
        runner.Worker(suite, tmp_path, [], only=lambda key: key.variant == "books")._open_text()


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("other", [SWITCH, Variant({"data.shuffle_window": 64})])
def test_runs_on_a_folder_that_changed_are_not_compared(tmp_path, monkeypatch, version, other):
    """The version of a folder is known only once it is opened, and is not part of a run's identity."""
    suite = suite_of({"a": DENSE, "b": other}, horizons=(20,))
    (run,) = keyed(suite, [record("a", 0, 5.0)])
    dataclasses.replace(run, data={"own": "1", "literature": "0"}).write(tmp_path)
    prepared = SimpleNamespace(versions={"own": version, "literature": "1.2.0"})
    monkeypatch.setattr(runner.pipeline, "prepare_run", lambda *_, **__: prepared)
    changed = pytest.raises(ConfigError, match=r"text of 'own' has changed since .* \(version 1, now 2\)")
    with contextlib.nullcontext() if version == "1" else changed:
        runner.Worker(suite, tmp_path, [])._open_text()
