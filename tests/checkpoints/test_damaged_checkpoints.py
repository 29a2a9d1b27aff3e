"""Damaged or lost files of a workdir: the run resumes from a good checkpoint or stops with one sentence."""

import collections
import functools
import json
import os
import shutil
import types
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath

from moe.checkpoints import integrity, manager, parameters
from moe.checkpoints.workdir import read_config
from moe.config import ConfigError
from moe.data import pipeline
from moe.parallel.mesh import make_mesh
from moe.system import signals
from moe.system.atomic_files import from_checked_json, to_checked_json
from moe.training.train import train
from tests.helpers import slow_case
from tests.run_helpers import ONE, SETTINGS, rows, state_of, steps, tiny

# Most runs of a file are the same program.
pytestmark = pytest.mark.usefixtures("compilation_cache")


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
    "an array truncated": lambda folder: os.truncate(largest(folder / "state"), 1000),
    "an array lost": lambda folder: largest(folder / "state").unlink(),
    "the index lost": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "the index empty": lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b""),
    "a number of the loop changed": lambda folder: replace(folder / "memory" / "metadata", "3", "4"),
    "the position in the data changed": lambda folder: replace(folder / "data" / "stream_0.json", "1", "2"),
    "the position in the data lost": lambda folder: (folder / "data" / "stream_0.json").unlink(),
    "a file that is a folder": lambda folder: (
        (folder / "memory" / "metadata").unlink(),
        (folder / "memory" / "metadata").mkdir(),
    ),
    "another step under its name": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.parent / "4", folder),
    ),
    "all lost": lambda folder: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in folder.iterdir()],
}


#: All other kinds of damage run with the slow tests.
OFTEN = (
    "an array's bit flipped",
    "the index lost",
    "a number of the loop changed",
    "the position in the data changed",
    "a file that is a folder",
    "another step under its name",
)


@pytest.mark.parametrize("damage", [name if name in OFTEN else slow_case(name) for name in DAMAGES])
def test_a_damaged_checkpoint_is_set_aside(directory, whole, programs, tmp_path, capsys, damage):
    """The run continues from the previous checkpoint, writes the same files again, and deletes nothing."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "report.txt").unlink()
    DAMAGES[damage](workdir / "checkpoints" / "6")
    spoilt = {path.name: path.read_bytes() for path in (workdir / "checkpoints" / "6").rglob("*") if path.is_file()}
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs)
    said = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert len(said) == 1
    assert said[0].startswith(f"the checkpoint of step 6 is damaged and was moved to {workdir}/damaged/6: ")
    aside = workdir / "damaged" / "6"
    assert {path.name: path.read_bytes() for path in aside.rglob("*") if path.is_file()} == spoilt
    assert steps(workdir) == [4, 6]
    for name in ("metrics.jsonl", "report.txt"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_lost_rows_are_written_again(directory, whole, programs, tmp_path):
    """Metrics lack a row that was there when checkpoint 6 was made: the run continues from 4 and writes it again."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "report.txt").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] != 5))
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    assert (workdir / "damaged" / "6").exists()
    for name in ("metrics.jsonl", "report.txt"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_continues_without_rows_that_cannot_be_restored(directory, whole, programs, tmp_path, capsys):
    """No checkpoint has all its rows: the run says so and continues from the newest; a finished one gets no report."""
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
    """Reset the workdir to that of a run killed after step 4."""
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
        (lambda w: (w / "changes.jsonl").write_text("[]\n"), r"changes\.jsonl: not a record of changes"),
        (lambda w: (w / ".lock").unlink() or (w / ".lock").mkdir(), r"cannot be written \(Is a directory\)"),
    ],
)
def test_a_workdir_with_damaged_small_files_is_refused(directory, whole, programs, tmp_path, spoil, words):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    two_steps_back(workdir)
    spoil(workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=words) as caught:
        train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_other_files_among_the_checkpoints_are_left_alone(directory, whole, programs, tmp_path):
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
def test_every_damage_to_every_file_of_a_checkpoint_is_survived(directory, whole, programs, tmp_path, capsys):
    """The restored state is the one that was saved, or that of the previous checkpoint."""
    config = tiny(directory, **SETTINGS)
    mesh = make_mesh(config.mesh, ONE)
    prepared = pipeline.prepare(config.data, config.model.vocab_size)
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
                checkpoints = manager.Checkpoints(epath.Path(tmp_path / "run"), 2)
                iterator = pipeline.train_iterator(prepared, config.data, batch_size=8, seed=0)
                step, state, _ = checkpoints.resume(program.state, iterator, lambda _: None)
                checkpoints.close()
                assert integrity.checksums(state) == good[step], (file, name)
                found[step] += 1
    with capsys.disabled():
        print(f"\n{found.total()} of {len(files) * len(ways)}: {found[6]} harmless, {found[4]} back to the one before")


def test_nothing_is_changed_if_no_checkpoint_is_intact(directory, whole, programs, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for step in (4, 6):
        flip(largest(workdir / "checkpoints" / str(step) / "state"))
    (workdir / "report.txt").unlink()  # a finished run reads no checkpoint
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"no checkpoint is good \(step 6: \d+ arrays? .*; step 4: "):
        train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    model = read_config(workdir).model
    # A single byte might lie in the optimizer's arrays, which are not read here. How many files hold the arrays, and
    # which file holds what, differs from run to run, so that bytes in all of them are changed.
    for path in (workdir / "checkpoints" / "6" / "state" / "ocdbt.process_0" / "d").iterdir():
        spoilt = bytearray(path.read_bytes())
        spoilt[len(spoilt) // 8 :: 997] = bytes(255 - byte for byte in spoilt[len(spoilt) // 8 :: 997])
        path.write_bytes(spoilt)
    with pytest.raises(ConfigError, match="the checkpoint of step 6 is damaged"):
        parameters.read_parameters(workdir, model)
    parameters.read_parameters(whole, model)
    shutil.rmtree(workdir / "checkpoints" / "4" / "memory")
    with pytest.raises(ConfigError, match="step 4 is damaged: it has no checksums, which every run saves"):
        parameters.read_parameters(workdir, model, step=4)


def test_a_checkpoint_without_read_permission_is_not_called_damaged(whole, programs, monkeypatch, directory):
    checkpoints = manager.Checkpoints(epath.Path(whole), 2, read_only=True)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(PermissionError):
        checkpoints.resume(types.SimpleNamespace(stored=None), None, print)  # pyright: ignore[reportArgumentType]
    assert steps(whole) == [4, 6]


def test_damage_that_one_of_several_processes_sees_is_set_aside_but_for_the_oldest(tmp_path, monkeypatch, capsys):
    for step in ("2", "4"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    checkpoints = manager.Checkpoints(epath.Path(tmp_path), 2)
    monkeypatch.setattr(checkpoints, "restore", mock.Mock(side_effect=integrity.DamagedError("cut")))
    checkpoints.start_again(4, integrity.DamagedError("cut"))  # nothing in a run of one process
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(signals.StartAgain, match="the checkpoint of step 4 is damaged: cut") as caught:
        checkpoints.resume(mock.Mock(), None, print)
    assert caught.value.code == 75
    assert f"was moved to {tmp_path}/damaged/4: cut" in capsys.readouterr().err
    checkpoints._manager.reload()
    with pytest.raises(ConfigError, match=r"no checkpoint is good \(step 2: cut\); nothing was changed"):
        checkpoints.resume(mock.Mock(), None, print)
    assert steps(tmp_path) == [2]


def test_one_number_that_is_not_finite_is_found():
    for number, finite in ((0.0, True), (np.nan, False), (np.inf, False), (-np.inf, False)):
        assert integrity.is_finite({"a": np.zeros(3), "b": np.asarray([1.0, number])}) == finite


@pytest.mark.parametrize("on_host", [True, False])
def test_a_checksum_depends_on_every_bit_and_not_on_the_mesh(on_host, monkeypatch):
    """By NumPy, and by the program for arrays of accelerators and of other processes."""
    if not on_host:
        monkeypatch.setattr(integrity, "_is_on_host", lambda _: False)
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
