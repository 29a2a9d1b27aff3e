"""What ends or spoils a run: bad numbers, damaged checkpoints, a full disk, signals, a second run in its workdir."""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import signals
from moe.atomic_files import from_checked_json, to_checked_json
from moe.checkpoints import integrity, manager, parameters
from moe.checkpoints import workdir as workdirs
from moe.checkpoints.workdir import read_config
from moe.config import ConfigError, to_dict
from moe.metrics_files import read_rows
from moe.parallel.mesh import make_mesh
from moe.training import health
from moe.training import loop as training
from moe.training.loop import train
from moe.training.step import build
from tests.helpers import mounted
from tests.test_train import ONE, compilation_cache, directory, tiny  # noqa: F401  fixtures

SETTINGS = {
    "model.num_layers": 1,
    "train.log_every": 1,
    "train.eval_every": 6,
    "train.sample_tokens": 0,
    "optimizer.learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def programs():
    """make_program that compiles once; what differs between runs here is no part of a program."""
    made = []

    def make(config, mesh, teacher=None):
        if not made:
            made.append(build(config, mesh, teacher))
        return dataclasses.replace(made[0], config=config)

    return make


@pytest.fixture(scope="module")
def whole(directory, programs, tmp_path_factory):  # noqa: F811
    """A run that nothing happened to: 6 steps, checkpoints of 2, 4 and 6, the newest two kept."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs)
    return workdir


class Interrupted(Exception):
    pass


def raise_interrupted():
    raise Interrupted


def at_step(wanted, act):
    """train._next that does something before the batch of a step."""
    take = training.next_batch

    def taking(iterator, step, checkpoints):
        if step == wanted:
            act()
        return take(iterator, step, checkpoints)

    return taking


def rows(workdir, kind):
    return [row for row in read_rows(workdir / "metrics.jsonl") if row["kind"] == kind]


def steps(workdir):
    return manager.complete_steps(training.epath.Path(workdir))


def state_of(program, workdir, step):
    checkpoints = manager.Checkpoints(training.epath.Path(workdir), 9)
    state, _ = checkpoints.restore(step, program.state)
    checkpoints.close()
    return state


# --- Numbers going wrong ---------------------------------------------------------------------------------------------
def test_an_update_that_is_not_finite_changes_nothing(directory, whole, programs):  # noqa: F811
    config = tiny(directory, **SETTINGS)
    mesh = make_mesh(config.mesh, ONE)
    with jax.set_mesh(mesh):
        program = programs(config, mesh)
        rng = np.random.default_rng(0)
        tokens = rng.integers(3, 400, (8, 16)).astype(np.int32)
        ones = np.ones_like(tokens)
        batch = {"tokens": tokens, "targets": tokens, "segment_ids": ones, "positions": ones.cumsum(1) - 1}
        batch = training.place(batch, mesh)
        # One infinite norm scale: the loss is NaN.
        scale = lambda state: state.parameters["final_norm"]["scale"]  # noqa: E731
        before = state_of(program, whole, 4)
        scale_before = scale(before)
        before.parameters["final_norm"]["scale"] = scale_before.at[0].set(jnp.inf)
        kept = jax.tree.map(np.asarray, before)
        after, metrics = program.train_step(before, batch)
        assert not np.isfinite(metrics.loss)
        assert metrics.skipped == 1
        assert after.step == 5
        for name in ("parameters", "biases", "rng"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(kept, name))
        changed = [
            jax.tree_util.keystr(path)
            for (path, ours), theirs in zip(
                jax.tree_util.tree_leaves_with_path(after.optimizer), jax.tree.leaves(kept.optimizer), strict=True
            )
            if (np.asarray(ours) != theirs).any()
        ]
        assert len(changed) == 1  # the schedule's count: the learning rate goes on with the steps
        assert metrics.learning_rate == pytest.approx(rows(whole, "train")[4]["learning_rate"])
        # The same state, mended, is updated.
        after.parameters["final_norm"]["scale"] = scale_before
        last, metrics = program.train_step(after, batch)
        assert metrics.skipped == 0
        assert (np.asarray(scale(last)) != np.asarray(kept.parameters["final_norm"]["scale"])).all()


def poisoned(programs, at):
    """make_program whose parameters turn infinite before some steps, as an update gone wrong leaves them."""

    def make(config, mesh, teacher=None):
        program = programs(config, mesh, teacher)

        def step(state, batch):
            if int(state.step) + 1 in at:
                norm = jax.tree.map(lambda scale: scale * jnp.inf, state.parameters["final_norm"])
                state = dataclasses.replace(state, parameters=state.parameters | {"final_norm": norm})
            return program.train_step(state, batch)

        return dataclasses.replace(program, train_step=step)

    return make


def test_rollback_goes_on_past_the_bad_batches(directory, tmp_path, programs):  # noqa: F811
    config = tiny(directory, **SETTINGS, **{"train.num_steps": 10, "train.max_skipped_steps": 3})
    bad = poisoned(programs, {5})
    train(config, str(tmp_path / "run"), ONE, make_program=bad)
    warned = [(row["step"], row["what"]) for row in rows(tmp_path / "run", "warning") if row["what"] != "dead"]
    assert warned == [(5, "skipped"), (6, "skipped"), (7, "skipped"), (7, "rollback")]
    back = next(row for row in rows(tmp_path / "run", "warning") if row["what"] == "rollback")
    assert back["to"] == 4
    first = next(row for row in rows(tmp_path / "run", "warning") if row["what"] == "skipped")
    assert first["first_row"] == 4 * 8  # the fifth batch of 8 rows
    logged = rows(tmp_path / "run", "train")
    assert [row["step"] for row in logged] == [*range(1, 11)]
    assert [row["skipped"] for row in logged] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert np.isfinite([row["loss"] for row in logged[7:]]).all()
    assert logged[7]["learning_rate"] < logged[4]["learning_rate"] < logged[2]["learning_rate"]
    # Interrupted after the rollback and before the next checkpoint: the same bytes, rollback and all.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "next_batch", at_step(8, raise_interrupted))
        with pytest.raises(Interrupted):
            train(config, str(tmp_path / "stopped"), ONE, make_program=bad)
    assert steps(tmp_path / "stopped") == [2, 4]
    train(config, str(tmp_path / "stopped"), ONE, make_program=bad)
    for name in ("metrics.jsonl", "report.txt"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "at", "words"),
    [
        ({"train.on_skipped_steps": "stop"}, {3}, "step 4: the last 2 updates were skipped, from step 3 on.*'stop'"),
        ({}, {1}, "no checkpoint is left to roll back to"),
    ],
)
def test_numbers_that_stay_bad_stop_the_run(directory, tmp_path, programs, overrides, at, words):  # noqa: F811
    config = tiny(directory, **SETTINGS, **{"train.max_skipped_steps": 2}, **overrides)
    with pytest.raises(ConfigError, match=words):
        train(config, str(tmp_path), ONE, make_program=poisoned(programs, at))


def test_a_streak_that_goes_on_goes_back_further(directory, tmp_path, programs):  # noqa: F811
    """Spoilt at 7, back to 6, spoilt again at 9 without a good step between: back to 4."""
    config = tiny(directory, **SETTINGS, **{"train.num_steps": 12, "train.max_skipped_steps": 2})
    train(config, str(tmp_path), ONE, make_program=poisoned(programs, {7, 9}))
    assert [row["to"] for row in rows(tmp_path, "warning") if row["what"] == "rollback"] == [6, 4]
    assert rows(tmp_path, "train")[-1]["skipped"] == 0


def test_spikes_and_dead_experts_by_hand():
    """Losses 1, 2, 1, 2, ...: median 1.5, every deviation 0.5, sigma 0.7413; six of them end at 5.9478."""
    watch = health.Health(6.0, 8)
    metrics = [{"skipped": 0.0, "cross_entropy": 1.0 + step % 2} for step in range(16)]
    load = [[0.5, 0.5, 0.0], [0.2, 0.4, 0.4]]
    (dead,) = watch.look(16, metrics, {"expert_load": load})
    assert (dead["what"], dead["experts"]) == ("dead", [[0, 2]])
    resumed = health.Health(6.0, 8, json.loads(json.dumps(watch.memory())))
    for follower in (watch, resumed):
        assert follower.look(17, [{"skipped": 1.0, "loss": 9.0, "gradient_norm": np.inf}], {})[0]["what"] == "skipped"
    assert watch.look(18, [{"skipped": 0.0, "cross_entropy": 5.9}], {"expert_load": load}) == []
    (spike,) = resumed.look(18, [{"skipped": 0.0, "cross_entropy": 6.0}], {"expert_load": load})
    assert (spike["what"], spike["at"], spike["median"]) == ("spike", 18, 1.5)
    assert (watch.skipped_in_a_row, resumed.skipped_in_a_row) == (0, 0)
    (dead,) = resumed.look(19, [], {"expert_load": [[0.5, 0.5, 0.0], [0.0, 0.4, 0.6]]})
    assert dead["experts"] == [[1, 0]]  # the other one was dead before
    assert health.Health(0.0, 8, watch.memory()).look(20, [{"skipped": 0.0, "cross_entropy": 99.0}], {}) == []


# --- Damage ----------------------------------------------------------------------------------------------------------
def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path, part=0.5):
    content = bytearray(path.read_bytes())
    if content:
        content[int(part * len(content))] ^= 1
    path.write_bytes(content)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGES = {
    "an array's bit flipped": lambda folder: flip(largest(folder / "state")),
    "an array cut short": lambda folder: os.truncate(largest(folder / "state"), 1000),
    "an array lost": lambda folder: largest(folder / "state").unlink(),
    "the index lost": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "the index empty": lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b""),
    "a number of the loop changed": lambda folder: replace(folder / "memory" / "metadata", "3", "4"),
    "the data's place changed": lambda folder: replace(folder / "data" / "stream_0.json", "1", "2"),
    "the data's place lost": lambda folder: (folder / "data" / "stream_0.json").unlink(),
    "a file that is a folder": lambda folder: (
        (folder / "memory" / "metadata").unlink(),
        (folder / "memory" / "metadata").mkdir(),
    ),
    "another step's under its name": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.parent / "4", folder),
    ),
    "all lost": lambda folder: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(directory, whole, programs, tmp_path, capsys, damage):  # noqa: F811
    """The run goes on from the one before, writes the same again, and deletes nothing."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "report.txt").unlink()
    DAMAGES[damage](workdir / "checkpoints" / "6")
    spoilt = {path.name: path.read_bytes() for path in (workdir / "checkpoints" / "6").rglob("*") if path.is_file()}
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs)
    said = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert len(said) == 1
    assert said[0].startswith(f"the checkpoint of step 6 is damaged and now lies in {workdir}/damaged/6: ")
    aside = workdir / "damaged" / "6"
    assert {path.name: path.read_bytes() for path in aside.rglob("*") if path.is_file()} == spoilt
    assert steps(workdir) == [4, 6]
    for name in ("metrics.jsonl", "report.txt"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_rows_that_are_lost_are_written_again(directory, whole, programs, tmp_path):  # noqa: F811
    """Metrics lack a row that was there when checkpoint 6 was made: the run goes on from 4, and writes it again."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "report.txt").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] != 5))
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    assert (workdir / "damaged" / "6").exists()
    for name in ("metrics.jsonl", "report.txt"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_rows_that_are_lost_for_good_do_not_end_the_run(directory, whole, programs, tmp_path, capsys):  # noqa: F811
    """No checkpoint has all its rows: the run says so, and goes on from the newest; a finished one has no report."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    two_steps_back(workdir)
    (workdir / "metrics.jsonl").unlink()
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs)
    assert "metrics.jsonl has 0 rows up to step 4, and had" in capsys.readouterr().out
    assert rows(workdir, "train") == rows(whole, "train")[4:]
    assert not (workdir / "damaged").exists()
    for name in ("metrics.jsonl", "report.txt"):
        (workdir / name).unlink()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: the last evaluation, which the report shows, is missing"):
        train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs)


def two_steps_back(workdir):
    """As a run that was killed after step 4."""
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / "report.txt").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: (w / "config.json").unlink(), "a checkpoint of step 4 but no config.json"),
        (lambda w: (w / "config.json").write_bytes(b"\xff"), r"config\.json: 'utf-8' codec can't decode"),
        (
            lambda w: (w / "tokenizer.model").write_bytes(b"x"),
            r"tokenizer\.model: differs from the tokenizer of this config",
        ),
        (lambda w: (w / "metrics.jsonl").write_text("[]\n{}\n"), r"metrics\.jsonl, line 1: not a row of metrics"),
        (lambda w: (w / ".lock").unlink() or (w / ".lock").mkdir(), r"cannot be written \(Is a directory\)"),
    ],
)
def test_a_workdir_whose_small_files_are_spoilt(directory, whole, programs, tmp_path, spoil, words):  # noqa: F811
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    two_steps_back(workdir)
    spoil(workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=words) as caught:
        train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_what_else_lies_among_the_checkpoints_is_left_alone(directory, whole, programs, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    two_steps_back(workdir)
    for name in ("mine", "\N{SUPERSCRIPT TWO}", "-1", "1e3"):
        (workdir / "checkpoints" / name).mkdir()
    (workdir / "checkpoints" / "99").write_text("a file")
    (workdir / "checkpoints" / "loop").symlink_to(workdir / "checkpoints" / "loop")
    (workdir / "tokenizer.model").unlink()  # this one is written again
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    for name in ("metrics.jsonl", "report.txt", "tokenizer.model"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    assert (workdir / "checkpoints" / "99").read_text() == "a file"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_file_of_a_checkpoint_in_every_way(directory, whole, programs, tmp_path, capsys):  # noqa: F811
    """The state that comes back is the one that was saved, or the one of the checkpoint before."""
    config = tiny(directory, **SETTINGS)
    mesh = make_mesh(config.mesh, ONE)
    prepared = training.pipeline.prepare(config.data, config.model.vocab_size)
    ways = {
        "lost": lambda path: path.unlink(),
        "empty": lambda path: path.write_bytes(b""),
        "half": lambda path: os.truncate(path, path.stat().st_size // 2),
        "junk": lambda path: path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256 + 1)),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
        **{f"bit {part}": functools.partial(flip, part=part) for part in (0.01, 0.3, 0.6, 0.99)},
    }
    files = sorted(path.relative_to(whole) for path in (whole / "checkpoints" / "6").rglob("*") if path.is_file())
    found = collections.Counter()
    with jax.set_mesh(mesh):
        program = programs(config, mesh)
        good = {step: integrity.checksums(state_of(program, whole, step)) for step in (4, 6)}
        for file in files:
            for name, spoil in ways.items():
                shutil.rmtree(tmp_path / "run", ignore_errors=True)
                shutil.copytree(whole, tmp_path / "run")
                spoil(tmp_path / "run" / file)
                checkpoints = manager.Checkpoints(training.epath.Path(tmp_path / "run"), 2)
                iterator = training.pipeline.train_iterator(prepared, config.data, batch_size=8, seed=0)
                step, state, _ = checkpoints.resume(program.state, iterator, lambda _: None)
                checkpoints.close()
                assert integrity.checksums(state) == good[step], (file, name)
                found[step] += 1
    with capsys.disabled():
        print(f"\n{found.total()} of {len(files) * len(ways)}: {found[6]} harmless, {found[4]} back to the one before")


def test_nothing_is_touched_where_no_checkpoint_is_good(directory, whole, programs, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for step in (4, 6):
        flip(largest(workdir / "checkpoints" / str(step) / "state"))
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"no checkpoint is good \(step 6: \d+ arrays? .*; step 4: "):
        train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    model = read_config(workdir).model
    # One byte may lie in the optimizer's arrays, which are not read here. How many files hold the arrays, and which
    # holds what, differs from run to run: bytes in all of them.
    for path in (workdir / "checkpoints" / "6" / "state" / "ocdbt.process_0" / "d").iterdir():
        spoilt = bytearray(path.read_bytes())
        spoilt[len(spoilt) // 8 :: 997] = bytes(255 - byte for byte in spoilt[len(spoilt) // 8 :: 997])
        path.write_bytes(spoilt)
    with pytest.raises(ConfigError, match="the checkpoint of step 6 is damaged"):
        parameters.read_parameters(workdir, model)
    parameters.read_parameters(whole, model)


def test_what_cannot_be_read_for_other_reasons_is_not_called_damaged(whole, programs, monkeypatch, directory):  # noqa: F811
    checkpoints = manager.Checkpoints(training.epath.Path(whole), 2, read_only=True)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(PermissionError):
        checkpoints.resume(None, None, print)  # pyright: ignore[reportArgumentType]
    assert steps(whole) == [4, 6]


def test_a_checksum_knows_every_bit_and_no_mesh():
    values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    words = values.view(np.uint32).ravel().astype(np.uint64)
    by_hand = int((words * (2 * np.arange(48, dtype=np.uint64) + 1)).sum() % 2**32)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    split = jax.device_put(values, jax.NamedSharding(mesh, jax.P("a", "b")))
    assert integrity.checksums([values, split]) == {"[0]": by_hand, "[1]": by_hand}
    moved = values.copy()
    moved[0, 0], moved[0, 1] = values[0, 1], values[0, 0]
    assert integrity.checksums([moved])["[0]"] != by_hand
    for bit in (0, 31):
        flipped = values.copy()
        flipped.view(np.uint32)[7, 5] ^= np.uint32(1) << np.uint32(bit)
        assert integrity.checksums([flipped])["[0]"] != by_hand
    assert from_checked_json(to_checked_json({"a": [0.1, float("nan")]}))["a"][0] == 0.1
    with pytest.raises(ValueError, match="checksum"):
        from_checked_json(to_checked_json({"a": 0.1}).replace("0.1", "0.2"))


def test_a_full_disk_stops_the_run_and_more_room_lets_it_go_on(directory, whole, programs, tmp_path):  # noqa: F811
    needed = sum(path.stat().st_size for path in (whole / "checkpoints" / "6").rglob("*") if path.is_file())
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={2 * needed // 1024 + 100}k", "tmpfs"):
        workdir, config = tmp_path / "disk" / "run", tiny(directory, **SETTINGS)
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes(needed // 2))
        with pytest.raises(ConfigError) as caught:
            train(config, str(workdir), ONE, make_program=programs, quiet=True)
        assert "\n" not in str(caught.value)
        assert "No space left on device" in str(caught.value)
        good = steps(workdir)
        assert f"of step {max(good)}" in str(caught.value) or f"from step {max(good)}" in str(caught.value)
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        train(config, str(workdir), ONE, make_program=programs, quiet=True)
        for name in ("metrics.jsonl", "report.txt"):
            assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_a_read_only_workdir_is_refused_before_anything_is_prepared(directory, whole, programs, tmp_path):  # noqa: F811
    with mounted(tmp_path / "disk", "--bind", "-o", "ro", str(whole.parent)):
        workdir = tmp_path / "disk" / "run"
        with pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system\)"):
            train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
        parameters.read_parameters(workdir, read_config(workdir).model)  # reading needs no more


def test_a_batch_that_cannot_be_read_is_named(directory, whole, programs, tmp_path, monkeypatch):  # noqa: F811
    def failing(*arguments, **named):
        iterator = make(*arguments, **named)
        take = type(iterator).__next__
        count = []

        def broken(self):
            count.append(1)
            if len(count) == 4:
                raise OSError(5, "Input/output error")
            return take(self)

        monkeypatch.setattr(type(iterator), "__next__", broken)
        return iterator

    make = training.pipeline.train_iterator
    monkeypatch.setattr(training.pipeline, "train_iterator", failing)
    words = r"the batch of step 4 cannot be read \(\[Errno 5\] Input/output error\).* continues from step 2"
    with pytest.raises(ConfigError, match=words):
        train(tiny(directory, **SETTINGS), str(tmp_path), ONE, make_program=programs, quiet=True)
    monkeypatch.undo()
    train(tiny(directory, **SETTINGS), str(tmp_path), ONE, make_program=programs, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


# --- Other processes -------------------------------------------------------------------------------------------------
def test_a_second_run_in_a_workdir_is_refused(directory, whole, programs):  # noqa: F811
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with workdirs.locked(training.epath.Path(whole)), pytest.raises(ConfigError, match="another run uses it"):
        train(tiny(directory, **SETTINGS), str(whole), ONE, make_program=programs)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_steps_end(directory, whole, programs, tmp_path, monkeypatch, number, code):  # noqa: F811
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(training, "next_batch", at_step(3, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(signals.Stopped) as caught:
        train(tiny(directory, **SETTINGS), str(tmp_path), ONE, make_program=programs, quiet=True)
    assert caught.value.code == code
    assert steps(tmp_path) == [2, 3]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    monkeypatch.undo()
    train(tiny(directory, **SETTINGS), str(tmp_path), ONE, make_program=programs, quiet=True)
    for name in ("metrics.jsonl", "report.txt"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_before_the_first_step_ends_the_run_at_once(directory, programs, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(training.pipeline, "prepare", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(signals.Stopped):
        train(tiny(directory, **SETTINGS), str(tmp_path / "run"), ONE, make_program=programs)
    assert not (tmp_path / "run").exists()


# --- Workdirs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a[x]", "star*", "what?", "back\\slash", "bytes\udcff"])
def test_a_path_that_orbax_cannot_read_back_is_refused(directory, programs, tmp_path, name):  # noqa: F811
    with pytest.raises(ConfigError, match="checkpoints cannot be kept under a path with"):
        train(tiny(directory, **SETTINGS), str(tmp_path / name / "run"), ONE, make_program=programs, quiet=True)
    assert not list(tmp_path.iterdir())


def test_other_odd_characters_in_a_path_work(directory, whole, programs, tmp_path):  # noqa: F811
    workdir = tmp_path / " -~!@#$%^&'(\") {+=,;:}|<`>\t\n%41é.\N{SNOWMAN} " / "run"
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    (workdir / "report.txt").unlink()
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    for name in ("metrics.jsonl", "report.txt"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_without_its_checkpoints_is_not_trained_again(directory, whole, programs, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="has metrics up to step 6 but no checkpoint; put checkpoints/ back, or del"):
        train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    for name in ("metrics.jsonl", "report.txt"):
        (workdir / name).unlink()
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_start_that_fails_before_the_first_step_does_not_claim_the_workdir(directory, programs, tmp_path):  # noqa: F811
    """It fails in the first step, as one that does not compile or fit; the corrected command trains."""

    def broken(config, mesh, teacher=None):
        def step(state, batch):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        return dataclasses.replace(programs(config, mesh, teacher), train_step=step)

    wrong = tiny(directory, **SETTINGS, **{"train.num_steps": 1000})
    with pytest.raises(ConfigError, match="does not fit in memory"):
        train(wrong, str(tmp_path / "run"), ONE, make_program=broken, quiet=True)
    assert read_config(tmp_path / "run") == wrong
    train(tiny(directory, **SETTINGS), str(tmp_path / "run"), ONE, make_program=programs, quiet=True)
    assert read_config(tmp_path / "run").train.num_steps == 6


def test_a_state_that_cannot_fit_is_refused_before_anything_is_written(directory, tmp_path):  # noqa: F811
    config = tiny(directory, **SETTINGS, **{"model.moe.d_ff": 2**22, "model.moe.num_experts": 4096})
    with pytest.raises(ConfigError, match=r"parameters and optimizer state need [\d,.]+ GiB where there are"):
        train(config, str(tmp_path / "run"), ONE, quiet=True)
    assert not (tmp_path / "run").exists()


def test_parameters_that_are_not_finite_are_never_saved(directory, programs, tmp_path):  # noqa: F811
    """An update that leaves infinite parameters while its own loss and gradients were finite."""

    def spoiling(at):
        def make(config, mesh, teacher=None):
            program = programs(config, mesh, teacher)

            def step(state, batch):
                state, metrics = program.train_step(state, batch)
                if int(state.step) in at:
                    norm = jax.tree.map(lambda scale: scale * jnp.inf, state.parameters["final_norm"])
                    state = dataclasses.replace(state, parameters=state.parameters | {"final_norm": norm})
                return state, metrics

            return dataclasses.replace(program, train_step=step)

        return make

    config = tiny(directory, **SETTINGS, **{"train.max_skipped_steps": 1})
    train(config, str(tmp_path / "run"), ONE, make_program=spoiling({4}), quiet=True)
    assert steps(tmp_path / "run") == [2, 6]
    assert [row["to"] for row in rows(tmp_path / "run", "warning") if row["what"] == "rollback"] == [2]
    with pytest.raises(ConfigError, match="step 6: the parameters are not finite"):
        train(config, str(tmp_path / "last"), ONE, make_program=spoiling({6}), quiet=True)
    assert steps(tmp_path / "last") == [2, 4]


# --- Going on with other settings ------------------------------------------------------------------------------------
def test_a_finished_run_goes_on_with_more_steps_and_another_rate(directory, whole, tmp_path, capsys):  # noqa: F811
    """Four more steps at a constant rate: refused without the flag, recorded with it, and exact when interrupted."""
    made = []

    def make(config, mesh, teacher=None):  # another schedule is another program
        if not made:
            made.append(build(config, mesh, teacher))
        return dataclasses.replace(made[0], config=config)

    changes = {"train.num_steps": 10, "optimizer.schedule": "constant", "optimizer.learning_rate": 5e-3}
    config = tiny(directory, **SETTINGS | changes | {"train.eval_every": 5})
    for name in ("run", "stopped"):
        shutil.copytree(whole, tmp_path / name)
    with pytest.raises(ConfigError, match=r"optimizer\.schedule .*train\.num_steps .*, or add --change to go on"):
        train(config, str(tmp_path / "run"), ONE, make_program=make)
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(ConfigError, match=r"set back seed \(there 0, here 1\)$"):
        train(other, str(tmp_path / "run"), ONE, make_program=make, allow_changes=True)
    train(config, str(tmp_path / "run"), ONE, make_program=make, allow_changes=True)
    assert "changed from step 6 on: optimizer.learning_rate 0.01 to 0.005" in capsys.readouterr().out
    recorded = [json.loads(line) for line in (tmp_path / "run" / "changes.jsonl").read_text().splitlines()]
    assert [row["step"] for row in recorded] == [6]
    assert recorded[0]["changes"]["train.num_steps"] == [6, 10]
    assert read_config(tmp_path / "run") == config
    logged = rows(tmp_path / "run", "train")
    assert logged[:6] == rows(whole, "train")
    assert [row["step"] for row in logged] == [*range(1, 11)]
    np.testing.assert_allclose([row["learning_rate"] for row in logged[6:]], 5e-3, rtol=1e-6)
    assert [row["step"] for row in rows(tmp_path / "run", "heldout/all")] == [6, 10]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "next_batch", at_step(9, raise_interrupted))
        with pytest.raises(Interrupted):
            train(config, str(tmp_path / "stopped"), ONE, make_program=make, allow_changes=True, quiet=True)
    train(config, str(tmp_path / "stopped"), ONE, make_program=make, quiet=True)
    for name in ("metrics.jsonl", "report.txt", "changes.jsonl", "config.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_the_dispatch_may_change_only_where_nothing_can_be_dropped(directory, tmp_path):  # noqa: F811
    """Capacity 1.25 drops; 4 = E / K does not, since C is then S."""
    for factor, refused in ((1.25, True), (4.0, False)):
        settings = {"model.moe.capacity_factor": factor, "model.moe.eval_capacity_factor": 4.0}
        theirs, ours = (tiny(directory, **settings, **{"model.moe.dispatch": mode}) for mode in ("gather", "dropless"))
        (tmp_path / "config.json").write_text(json.dumps(to_dict(theirs)))
        with pytest.raises(ConfigError, match=r"model\.moe\.dispatch") if refused else contextlib.nullcontext():
            assert workdirs.refuse_other_run(ours, training.epath.Path(tmp_path)) == {}


# --- Retention -------------------------------------------------------------------------------------------------------
def test_the_newest_the_best_and_every_nth_are_kept(directory, programs, tmp_path):  # noqa: F811
    """Held-out losses 3, 1, 2, ... at steps 2, 4, 6, ...: 4 is the best, also for a run that was started again."""
    settings = {"train.num_steps": 12, "train.eval_every": 2, "train.keep_checkpoints": 1, "train.keep_every": 6}
    config = tiny(directory, **SETTINGS | settings)
    losses = {2: 3.0, 4: 1.0, 6: float("nan"), 8: 2.0, 10: 4.0, 12: 5.0}
    counted = []

    def evaluated(program, variables, heldout):
        counted.append(1)
        results = evaluate(program, variables, heldout)
        results["all"]["loss"] = losses[2 * len(counted)]
        return results

    evaluate = training.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", evaluated)
        patch.setattr(training, "next_batch", at_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(signals.Stopped):
            train(config, str(tmp_path), ONE, make_program=programs, quiet=True)
        assert steps(tmp_path) == [4, 6, 9]
        train(config, str(tmp_path), ONE, make_program=programs, quiet=True)
    assert steps(tmp_path) == [4, 6, 12]


# --- Slow: other meshes, and several processes -----------------------------------------------------------------------
#: (devices, mesh, dispatch) of one run's starts; nothing is dropped, so that every way to travel computes the same.
TRAVELS = [
    (8, {"mesh.data": 2, "mesh.expert": 4}, "gather"),
    (4, {"mesh.data": 1, "mesh.expert": 2, "mesh.fsdp": 2}, "einsum"),
    (2, {"mesh.data": 1, "mesh.tensor": 2}, "dropless"),
    (1, {}, "gather"),
    (8, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2}, "dropless"),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_reshard_matrix(directory, tmp_path, capsys):  # noqa: F811
    """Two steps on each of 8, 4, 2, 1 and 8 devices, against ten steps on one."""
    settings = SETTINGS | {"train.num_steps": 10, "train.eval_every": 10}
    settings |= {"model.moe.capacity_factor": 8.0, "model.moe.eval_capacity_factor": 8.0}
    train(tiny(directory, **settings), str(tmp_path / "still"), ONE, quiet=True)
    for number, (count, mesh, dispatch) in enumerate(TRAVELS):
        config = tiny(directory, **settings, **mesh, **{"model.moe.dispatch": dispatch})
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted):
            patch.setattr(training, "next_batch", at_step(2 * number + 3, raise_interrupted))
            train(config, str(tmp_path / "moved"), jax.devices()[:count], quiet=True)
    still, moved = (rows(tmp_path / name, "train") for name in ("still", "moved"))
    with capsys.disabled():
        print(
            "\nstep  devices  mesh, dispatch                                            loss  on one device  difference"
        )
        for one, other in zip(still, moved, strict=True):
            count, mesh, dispatch = TRAVELS[(one["step"] - 1) // 2]
            sizes = " ".join(f"{axis.removeprefix('mesh.')} {size}" for axis, size in mesh.items())
            print(
                f"{one['step']:4}  {count:7}  {sizes + ', ' + dispatch:52} {other['loss']:9.6f}  {one['loss']:13.6f}  "
                f"{abs(other['loss'] - one['loss']):.1e}"
            )
    assert [row["step"] for row in moved] == [*range(1, 11)]
    np.testing.assert_allclose([row["loss"] for row in moved], [row["loss"] for row in still], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_stop_at_one_step(directory, tmp_path):  # noqa: F811
    """SIGTERM reaches one of them; both save the same step and end with 75."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    }
    tree = to_dict(tiny(directory, **SETTINGS, **{"train.num_steps": 100_000, "train.save_every": 100_000}))
    (tmp_path / "config.py").write_text(
        "import ml_collections\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({tree!r}, convert_dict=True)\n"
    )
    command = [
        sys.executable,
        "main.py",
        "--distributed",
        f"--config={tmp_path}/config.py",
        f"--workdir={tmp_path}/run",
    ]
    root = Path(__file__).parents[1]
    pair = []
    for index in range(2):
        with (tmp_path / f"{index}.log").open("w") as log:
            own = environment | {"JAX_PROCESS_ID": str(index)}
            pair.append(subprocess.Popen(command, cwd=root, env=own, stdout=log, stderr=log))
    try:
        while len(train_rows := rows(tmp_path / "run", "train")) < 3:
            assert [process.poll() for process in pair] == [None, None], (tmp_path / "0.log").read_text()[-2000:]
            time.sleep(0.2)
        pair[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=300) for process in pair] == [signals.START_AGAIN] * 2
    finally:
        for process in pair:
            process.kill()
    (saved,) = steps(tmp_path / "run")
    assert saved == rows(tmp_path / "run", "train")[-1]["step"] >= len(train_rows)
