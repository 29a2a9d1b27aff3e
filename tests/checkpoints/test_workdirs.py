"""Disks, paths, locks and failed starts of a workdir, and the checkpoints that are kept in it."""

import asyncio
import dataclasses
import itertools
import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from orbax.checkpoint._src.futures import future
from orbax.checkpoint._src.handlers import pytree_checkpoint_handler

from moe.checkpoints import integrity, parameters, streamed
from moe.checkpoints import workdir as workdirs
from moe.checkpoints.manager import Checkpoints
from moe.checkpoints.orbax_threads import no_background_tracebacks
from moe.checkpoints.retention import LowestLoss
from moe.checkpoints.workdir import latest_change, read_config, record_changes, write_run_files
from moe.config import Config, ConfigError, OptimizerConfig, TrainConfig
from moe.data import pipeline, tokenizer_files
from moe.data.tokenizer import train_tokenizer
from moe.interop import import_checkpoint
from moe.models.state import TrainState
from moe.system import atomic_files, signals
from moe.system.sealed_folder import unsealed
from moe.training import loop as training
from moe.training.averaging import write_average
from moe.training.train import train
from tests.helpers import mounted, random_model, tiny_model
from tests.run_helpers import ONE, SETTINGS, at_step, steps, tiny

# Most runs of a file are the same program.
pytestmark = pytest.mark.usefixtures("compilation_cache")


def test_a_full_disk_stops_the_run_and_more_room_lets_it_continue(directory, whole, programs, tmp_path):
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


def test_a_read_only_workdir_is_refused_before_anything_is_prepared(directory, whole, programs, tmp_path):
    with mounted(tmp_path / "disk", "--bind", "-o", "ro", str(whole.parent)):
        workdir = tmp_path / "disk" / "run"
        with pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system\)"):
            train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
        parameters.read_parameters(workdir, read_config(workdir).model)  # reading does not need to write


def test_a_batch_that_cannot_be_read_is_named(directory, whole, programs, tmp_path, monkeypatch):
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

    make = pipeline.train_iterator
    monkeypatch.setattr(pipeline, "train_iterator", failing)
    words = r"the batch of step 4 cannot be read \(\[Errno 5\] Input/output error\).* continues from step 2"
    with pytest.raises(ConfigError, match=words):
        train(tiny(directory, **SETTINGS), str(tmp_path), ONE, make_program=programs, quiet=True)
    monkeypatch.undo()
    train(tiny(directory, **SETTINGS), str(tmp_path), ONE, make_program=programs, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_second_run_in_a_workdir_is_refused(directory, whole, programs):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with workdirs.locked_workdir(epath.Path(whole)), pytest.raises(ConfigError, match="another run uses it"):
        train(tiny(directory, **SETTINGS), str(whole), ONE, make_program=programs)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_the_lock_of_another_user_is_named(tmp_path, monkeypatch):
    """One who may write here and tried to train leaves a lock that the owner of the run may not take."""
    (tmp_path / workdirs.LOCK).touch()

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(workdirs.filelock.FileLock, "acquire", refuse)
    with pytest.raises(ConfigError, match=rf"Permission denied: {workdirs.LOCK} is another user's; delete it"):
        workdirs.locked_workdir(epath.Path(tmp_path)).__enter__()


@pytest.mark.parametrize("name", ["a[x]", "star*", "what?", "back\\slash", "bytes\udcff"])
def test_a_path_that_orbax_cannot_read_back_is_refused(directory, programs, tmp_path, name):
    with pytest.raises(ConfigError, match="checkpoints cannot be kept under a path with"):
        train(tiny(directory, **SETTINGS), str(tmp_path / name / "run"), ONE, make_program=programs, quiet=True)
    assert not list(tmp_path.iterdir())


def test_other_unusual_characters_in_a_path_work(directory, whole, programs, tmp_path):
    workdir = tmp_path / " -~!@#$%^&'(\") {+=,;:}|<`>\t\n%41é.\N{SNOWMAN} " / "run"
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    (workdir / "report.txt").unlink()
    train(tiny(directory, **SETTINGS), str(workdir), ONE, make_program=programs, quiet=True)
    for name in ("metrics.jsonl", "report.txt"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_a_relative_path_works(directory, whole, programs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny(directory, **SETTINGS), "run", ONE, make_program=programs, quiet=True)
    (tmp_path / "run" / "report.txt").unlink()
    train(tiny(directory, **SETTINGS), "run", ONE, make_program=programs, quiet=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    config = import_checkpoint(Path(__file__).parents[1] / "data" / "checkpoints" / "mixtral", "imported")
    for workdir, model in (("run", read_config("run").model), ("imported", config.model)):
        parameters.read_parameters(workdir, model)


def test_a_finished_run_without_its_checkpoints_is_not_trained_again(directory, whole, programs, tmp_path):
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


def test_a_start_that_fails_before_the_first_step_does_not_claim_the_workdir(directory, programs, tmp_path):
    """After a failure in the first step, as of a program that does not compile or fit, the corrected command trains."""

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


def test_the_tokenizer_of_a_failed_start_is_not_used_by_the_run(tmp_path):
    """A leftover tokenizer might be read first; files beside a continued run, or without an earlier start, stay."""
    folder, own = epath.Path(tmp_path), {"tokenizer.json": b"{}"}
    (folder / "chat_template.jinja").write_text("mine")
    write_run_files(Config(), {"tokenizer.model": b"old", "tokenizer_config.json": b"old"}, folder, new=True)
    assert len(list(folder.iterdir())) == 4
    write_run_files(Config(), own, folder, new=True)
    assert {path.name for path in folder.iterdir()} == {"config.json", *own}
    (folder / "tokenizer.model").write_text("mine")
    write_run_files(Config(), own, folder, new=False)
    assert (folder / "tokenizer.model").exists()


def test_a_state_that_cannot_fit_is_refused_before_anything_is_written(directory, tmp_path):
    absurd = ({"model.moe.d_ff": 2**22, "model.moe.num_experts": 4096}, {"train.batch_size": 2**24})
    for settings in absurd:
        config = tiny(directory, **SETTINGS | settings)
        with pytest.raises(ConfigError, match=r"training state and activations need [\d,.]+ GiB where there are"):
            train(config, str(tmp_path / "run"), ONE, quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_newest_the_best_and_every_nth_checkpoint_are_kept(directory, programs, tmp_path):
    """Held-out losses 3, 1, 2, ... at steps 2, 4, 6, ...: 4 is the best, also for a run that was resumed."""
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
        assert steps(tmp_path) == [4, 6, 8, 9]  # 9, of the interruption, does not take the place of 8
        train(config, str(tmp_path), ONE, make_program=programs, quiet=True)
    assert steps(tmp_path) == [4, 6, 12]


def test_a_checkpoint_without_a_finite_loss_is_not_the_best(tmp_path):
    best = LowestLoss(epath.Path(tmp_path))
    best.losses = {2: float("nan"), 4: 3.0, 6: None, 8: 1.0}
    infos = [types.SimpleNamespace(step=step) for step in (2, 4, 6, 8)]
    assert best.should_preserve(infos, context=None) == [False, False, False, True]
    assert best.should_preserve(infos[:3], context=None) == [False, True, False]
    assert best.should_preserve(infos[:1], context=None) == [False]


def test_interruptions_do_not_take_the_place_of_regular_checkpoints(tmp_path):
    """Saved every 4 steps, two kept, stopped at 9 and 10: a rollback goes to 8, as without the stops, not to 10."""
    checkpoints = Checkpoints(epath.Path(tmp_path), 2, save_every=4)
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(2)}, {}, {"count": jnp.zeros(1)}, jnp.zeros(2))
    found = []
    for step in (4, 8, 9, 10, 12):
        checkpoints.save(step, state, None, {}, None)
        checkpoints.wait()
        found.append(steps(tmp_path))
    assert checkpoints.before(12, 4) == [8, 10]  # older ones, first those that an uninterrupted run would have
    checkpoints.close()
    assert found == [[4], [4, 8], [4, 8, 9], [4, 8, 9, 10], [8, 10, 12]]


def test_a_limit_on_file_sizes_ends_the_run_in_one_sentence(directory, programs, tmp_path):
    """`ulimit -f`: the arrays of a checkpoint are larger than the limit, the other files are not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (48 * 1024, hard))
    try:
        with pytest.raises(ConfigError) as caught:
            train(tiny(directory, **SETTINGS), str(tmp_path / "run"), ONE, make_program=programs, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(caught.value)
    assert "there is no checkpoint yet" in str(caught.value)
    train(tiny(directory, **SETTINGS), str(tmp_path / "run"), ONE, make_program=programs, quiet=True)


def test_a_workdir_of_parameters_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streamed, "write_atomic", fail)
    files = {"tokenizer.json": b"{}"}
    out = tmp_path / "new" / "out"
    with pytest.raises(ConfigError, match=r"out: cannot be written, and nothing was left: .*No space left"):
        streamed.write_workdir(str(out), Config(), {"table": np.ones(3, np.float32)}, {}, files)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fails_orbax_is_said_once(tmp_path, monkeypatch, caplog):
    """Orbax's thread logs a traceback of the error that it raises."""
    make = os.mkdir

    def fail(path, *rest, **options):
        if "state" in str(path):
            raise OSError(28, "No space left on device")
        make(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(ConfigError, match=r"out: cannot be written, and nothing was left: .*No space left"):
        streamed.write_workdir(str(tmp_path / "out"), Config(), {"table": np.ones(3, np.float32)}, {}, {})
    assert not (tmp_path / "out").exists()
    assert not [record for record in caplog.records if record.exc_info]


def test_no_writer_is_left_behind_by_a_checkpoint_that_fails(tmp_path, monkeypatch):
    """Neither one that waits for the folder that could not be made, nor one that still writes into others."""
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(2)}, {}, {"count": jnp.zeros(1)}, jnp.zeros(2))
    checkpoints = Checkpoints(epath.Path(tmp_path), 2)
    make = os.mkdir

    def fail(path, *rest, **options):
        if "orbax-checkpoint-tmp" in str(path):
            raise OSError(28, "No space left on device")
        make(path, *rest, **options)

    def save():
        with pytest.raises(ConfigError, match="No space left on device"), no_background_tracebacks():  # noqa: PT012
            checkpoints.save(1, state, None, {}, None)
            checkpoints.wait()
        return [thread for thread in threading.enumerate() if isinstance(thread, future._SignalingThread)]

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", fail)
        assert save() == []

    def fail_beside_a_writer(*_, **__):
        future.CommitFuture(asyncio.sleep(0.2))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", fail_beside_a_writer)
    assert save() == []


def test_a_clock_that_is_set_forward_within_a_save_is_named(tmp_path, monkeypatch):
    """Orbax measures its waits by the time of day: the disk is not full, and the next start saves."""
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(2)}, {}, {"count": jnp.zeros(1)}, jnp.zeros(2))
    clock = itertools.count(time.time(), 86_400)
    with monkeypatch.context() as patch, no_background_tracebacks():
        patch.setattr(time, "time", lambda: next(clock))
        checkpoints = Checkpoints(epath.Path(tmp_path), 2)
        with pytest.raises(ConfigError, match=r"TimeoutError: .*; the system's clock was set forward") as caught:  # noqa: PT012
            checkpoints.save(1, state, None, {}, None)
            checkpoints.wait()
    assert "free space" not in str(caught.value)
    again = Checkpoints(epath.Path(tmp_path), 2)
    again.save(2, state, None, {}, None)
    again.close()
    assert steps(tmp_path)[-1] == 2


def test_a_folder_that_fails_leaves_what_others_put_beside_it(tmp_path):
    """Two exports at once need the same new parent; the one that fails removes only its own folder."""
    exports = epath.Path(tmp_path) / "made" / "exports"
    with pytest.raises(KeyError), atomic_files.new_folder(exports / "failed"):  # noqa: PT012
        (exports / "failed" / "part").write_text("x")
        (exports / "other").mkdir()
        (exports / "other" / "model.safetensors").write_text("x")
        raise KeyError
    left = sorted(path.relative_to(exports) for path in Path(exports).rglob("*"))
    assert left == [Path("other"), Path("other/model.safetensors")]


def test_a_folder_is_written_by_one_program_only(tmp_path, monkeypatch):
    """A second export to one new folder, at once or as the first one ends, removes nothing of the first."""
    folder = epath.Path(tmp_path) / "out"
    with atomic_files.new_folder(folder):
        with pytest.raises(ConfigError, match="out: another program is writing it"), atomic_files.new_folder(folder):
            pytest.fail("written by two")
        (folder / "first").write_text("x")
    shutil.rmtree(folder)
    folder.mkdir()
    os.chmod(folder, 0o750)
    lock = atomic_files.lock
    monkeypatch.setattr(atomic_files, "lock", lambda *given: (folder / "first").write_text("x") and lock(*given))
    with pytest.raises(ConfigError, match="it holds first"), atomic_files.new_folder(folder):
        pytest.fail("written by two")
    assert [path.name for path in folder.iterdir()] == ["first"]
    monkeypatch.undo()
    (folder / "first").unlink()
    with pytest.raises(KeyError), atomic_files.new_folder(folder):  # noqa: PT012
        (folder / "part").mkdir()
        os.symlink(tmp_path, folder / "link")
        raise KeyError
    assert (list(folder.iterdir()), os.stat(folder).st_mode & 0o777) == ([], 0o750)


def test_arrays_that_go_to_no_mesh_are_read_into_the_memory_of_the_host(tmp_path, monkeypatch):
    """A device lacks room for the experts of all layers: 60 GB in Mixtral 8x7B."""
    model = tiny_model(num_layers=1)
    expected = nnx.to_pure_dict(nnx.state(random_model(model), nnx.Param))
    streamed.write_workdir(str(tmp_path / "run"), Config(model=model), expected, {}, {})
    host, used = jax.devices()[5], set()
    monkeypatch.setattr(parameters, "host_device", lambda: host)
    monkeypatch.setattr(
        parameters, "compare", lambda _, tree: [used.update(leaf.devices()) for leaf in jax.tree.leaves(tree)]
    )
    found = parameters.read_parameters(tmp_path / "run", model)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert used == {host}


def test_an_array_for_the_host_may_exceed_what_orbax_reads_at_once(tmp_path, monkeypatch):
    """Orbax refuses an array above 96 GB, here above 100 bytes, which was reported as damage."""
    model = tiny_model(num_layers=1)
    expected = nnx.to_pure_dict(nnx.state(random_model(model), nnx.Param))
    streamed.write_workdir(str(tmp_path / "run"), Config(model=model), expected, {}, {})

    def limit(size, *, use_default_if_none=True):
        return size * 10**9 if size else 100 if use_default_if_none else None

    monkeypatch.setattr(pytree_checkpoint_handler, "_concurrent_bytes", limit)
    found = parameters.read_parameters(tmp_path / "run", model)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_large_array_is_written_in_parts(tmp_path, monkeypatch):
    """A device that reads its shard of an array reads every part that it touches: one of the experts of all layers
    would have 60 GB in Mixtral 8x7B. With at most 50 elements, [2,3,4,5] is written as matrices [4,5], [2,4,5] whole,
    the table [10,6] (60 elements) as five rows each."""
    monkeypatch.setattr(streamed, "PART_ELEMENTS", 50)
    shapes = {"experts": (2, 3, 4, 5), "attention": (2, 4, 5), "table": (10, 6), "scale": (6,), "number": ()}
    tree = {name: np.arange(math.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    written = streamed.streamed(tree)
    found = {name: each.part_shape for name, each in written.items()}
    assert found == shapes | {"experts": (1, 1, 4, 5), "table": (5, 6)}
    assert {name: len(list(each.parts())) for name, each in written.items()} == {
        "experts": 6, "attention": 1, "table": 2, "scale": 1, "number": 1
    }  # fmt: skip
    model = tiny_model(num_layers=2)
    expected = nnx.to_pure_dict(nnx.state(random_model(model), nnx.Param))
    streamed.write_workdir(str(tmp_path / "run"), Config(model=model), expected, {}, {})
    jax.tree.map(np.testing.assert_array_equal, parameters.read_parameters(tmp_path / "run", model), expected)
    sums = integrity.checksums({"parameters": expected})
    saved = integrity.saved_checksums(epath.Path(tmp_path / "run"), 0)
    assert saved == {name.replace("['parameters']", ".parameters", 1): value for name, value in sums.items()}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.uint8])
def test_the_checksum_of_an_array_that_is_written_in_parts(monkeypatch, dtype):
    """Blocks of 7 words, and parts that begin anywhere, give the checksum of the whole array."""
    monkeypatch.setattr(integrity, "_BLOCK", 7)
    values = np.random.default_rng(0).normal(size=100).astype(dtype)
    parts = sum(integrity.partial_checksum(values[start:end], start) for start, end in ((0, 1), (1, 40), (40, 100)))
    assert {"": parts % 2**32} == integrity.checksums(values)
    assert parts % 2**32 == int(integrity._checksum(values))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_flipped_bit_of_a_model_without_a_run_is_found(tmp_path, dtype):
    model = tiny_model(num_layers=1)
    tree = nnx.to_pure_dict(nnx.state(random_model(model), nnx.Param))
    streamed.write_workdir(str(tmp_path / "run"), Config(model=model), tree, {}, {})
    files = (tmp_path / "run" / "checkpoints" / "0" / "state").rglob("d/*")
    path = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="the checkpoint of step 0 is damaged: 1 arrays differ"):
        parameters.read_parameters(tmp_path / "run", model, dtype=dtype)


def test_a_checkpoint_without_checksums_is_said_once(tmp_path, capsys):
    """Earlier versions wrote none for imports and averages."""
    model = tiny_model(num_layers=1)
    tree = nnx.to_pure_dict(nnx.state(random_model(model), nnx.Param))
    streamed.write_workdir(str(tmp_path / "run"), Config(model=model), tree, {}, {})
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "0" / "memory")
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, parameters.read_parameters(tmp_path / "run", model), tree)
    assert capsys.readouterr().err.count("its checkpoint has no checksums") == 1


def test_an_average_has_every_file_of_the_tokenizer(tmp_path):
    import_checkpoint(Path(__file__).parents[1] / "data" / "checkpoints" / "mistral", tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps(unsealed(config.read_text())))  # without checksums of the files that are added
    (tmp_path / "run" / "tokenizer.model").write_bytes(train_tokenizer(["word of a text\n" * 99], 272).model_bytes)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / "run" / name).write_text(f'"{name}"')
    write_average(str(tmp_path / "run"), str(tmp_path / "mean"), [], ema=False)
    kept = tokenizer_files.companions(tmp_path / "mean")
    assert kept.keys() == {"tokenizer.model", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert kept == tokenizer_files.companions(tmp_path / "run")


def test_a_shortened_message_of_tensorstore_keeps_its_reason():
    error = ValueError(
        "Error writing " + "x" * 300 + ": File too large [os_error_code='27'] [tensorstore_spec='{" + "y" * 300
    )
    assert atomic_files.first_line(error).endswith("File too large [os_error_code='27']")


def test_rows_without_a_checkpoint_are_judged_by_the_latest_start(tmp_path):
    """A start that saves every 80 steps ends after 40, the next, every 1,000, after 500: there was no checkpoint."""
    folder = epath.Path(tmp_path)
    write_run_files(Config(train=TrainConfig(save_every=80)), {}, folder, new=True)
    write_run_files(Config(train=TrainConfig(save_every=1000)), {}, folder, new=False)
    for step in (500, 2000):  # the first save, at 1,000, may not have ended before the second begins
        (folder / "metrics.jsonl").write_text(f'{{"step": {step}, "kind": "train"}}\n')
        assert workdirs.contents(folder) is workdirs.Contents.METRICS
    (folder / "metrics.jsonl").write_text('{"step": 2001, "kind": "train"}\n')
    with pytest.raises(ConfigError, match="metrics up to step 2001 but no checkpoint"):
        workdirs.contents(folder)


def test_a_run_is_finished_with_its_last_checkpoint_and_its_report(tmp_path):
    config, found = Config(train=TrainConfig(num_steps=400)), []
    for step in (200, 400):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        for words in (True, False):
            (tmp_path / "report.txt").write_text("") if words else (tmp_path / "report.txt").unlink()
            found.append(workdirs.is_finished(config, epath.Path(tmp_path)))
    assert found == [False, False, True, False]


def test_a_workdir_of_parameters_is_not_continued_as_a_run(tmp_path):
    folder = epath.Path(tmp_path)
    (folder / "checkpoints" / "0").mkdir(parents=True)
    workdirs.write_config(Config(), folder)
    with pytest.raises(ConfigError, match=r"holds only the parameters of a model, .* --config\.start\.checkpoint="):
        workdirs.refuse_other_run(workdirs.read_config(folder), folder)


def test_a_new_run_does_not_have_the_changes_of_an_earlier_one(tmp_path):
    """After the advice to delete metrics.jsonl and report.txt, where the checkpoints are gone."""
    folder, config = epath.Path(tmp_path), Config(optimizer=OptimizerConfig(learning_rate=6e-4))
    record_changes(config, {"optimizer.learning_rate": [4e-4, 6e-4]}, 4, folder)
    write_run_files(config, {}, folder, new=False)
    assert latest_change(folder) == 4
    write_run_files(config, {}, folder, new=True)
    assert latest_change(folder) == 0


def test_a_change_is_not_appended_to_an_unterminated_line(tmp_path):
    folder, line = epath.Path(tmp_path), '{"step": 2, "changes": {"train.num_steps": [2, 4]}}'
    (folder / "changes.jsonl").write_text(line)
    record_changes(Config(), {"train.num_steps": [4, 6]}, 4, folder)
    lines = (folder / "changes.jsonl").read_text().splitlines()
    assert (lines[0], [json.loads(line)["step"] for line in lines]) == (line, [2, 4])
    (folder / "changes.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match=r"changes\.jsonl: not a record of changes: not JSON"):
        record_changes(Config(), {"train.num_steps": [4, 6]}, 4, folder)
    (folder / "changes.jsonl").unlink()
    os.mkfifo(folder / "changes.jsonl")  # reading it would wait for ever
    with pytest.raises(ConfigError, match=r"changes\.jsonl: is not a regular file"):
        latest_change(folder)


def test_a_change_that_a_kill_prevented_is_not_recorded(tmp_path, monkeypatch):
    """The start is killed between changes.jsonl and config.json; a plain start then goes on with the old values."""
    folder, old, new = (
        epath.Path(tmp_path),
        *(Config(optimizer=OptimizerConfig(learning_rate=rate)) for rate in (6e-4, 9e-4)),
    )
    record_changes(old, {"optimizer.learning_rate": [4e-4, 6e-4]}, 4, folder)
    recorded = (folder / "changes.jsonl").read_bytes()
    with monkeypatch.context() as killed:
        killed.setattr(workdirs, "write_config", lambda *_: None)
        record_changes(new, {"optimizer.learning_rate": [6e-4, 9e-4]}, 6, folder)
    assert (folder / "changes.jsonl").read_bytes() != recorded
    assert latest_change(folder) == 4
    record_changes(old, {}, 6, folder)
    assert (folder / "changes.jsonl").read_bytes() == recorded
    for _ in range(2):  # killed again, and then made
        record_changes(new, {"optimizer.learning_rate": [6e-4, 9e-4]}, 6, folder)
        assert len((folder / "changes.jsonl").read_bytes().splitlines()) == 2
        workdirs.write_config(old, folder)
    assert latest_change(folder) == 4


def test_a_slow_disk_is_not_said_by_orbax_too(caplog):
    """Its thread tells the main thread, which waits for it, that it waits; other lines of Orbax stay."""

    def wait():
        thread = future._SignalingThread(target=lambda: None, send_signals=[], receive_signals=[], timeout_secs=60)
        thread.start()
        thread.join()
        future.logging.info("another line")
        lines = [record.getMessage() for record in caplog.records if "Thread" in record.msg or "line" in record.msg]
        caplog.clear()
        return ["join" if "_SignalingThread.join()" in line else line for line in lines]

    with caplog.at_level(logging.INFO, logger="absl"):
        assert wait() == ["join", "another line"]
        with no_background_tracebacks():
            assert wait() == ["another line"]
        assert wait() == ["join", "another line"]
