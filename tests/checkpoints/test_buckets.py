"""Runs in a bucket: killed and resumed to the bit, rows without appends, damaged checkpoints, refusals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from etils.epath import backend

from moe.checkpoints import arrays, manager
from moe.checkpoints.workdir import disk_errors
from moe.config import Config, ConfigError, to_dict
from moe.system import metrics_files, waiting
from moe.system.metrics_files import METRICS, MetricsWriter, read_rows
from moe.system.reading import read_small_file
from moe.training.metric_writers import find_writers
from moe.training.train import train
from tests.run_helpers import ONE, SETTINGS, tiny

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read when gcsfs is imported, which fsspec does

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")
from tests.object_store import BUCKET, object_store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(monkeypatch):
    """A new object store, to which gs:// refers in this process too."""
    with object_store() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        _forget_connections()
        yield environment
    _forget_connections()


def _forget_connections():
    """Drop the one connection per process that etils and fsspec keep."""
    fsspec.filesystem("gcs").clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


def _row(step, **values):
    return {"step": step, "kind": "train", "loss": step / 10, **values}


def _write(workdir, start, steps, *, end):
    """Write rows of some steps, a sync after every second; without `end` the writer stays open, as after a kill."""
    writer = MetricsWriter(workdir, start, to_dict(Config()), find_writers(["tensorboard"]))
    for step in steps:
        writer.write(step, "train", {"loss": step / 10})
        if step % 2 == 0:
            writer.sync()
    if end:
        writer.close()
    else:
        writer._writers[0]._events.close()  # which the end of a process does too


def test_rows_in_a_bucket_equal_those_of_appends_to_a_file(store):
    workdir = epath.Path(f"gs://{BUCKET}/rows")
    _write(workdir, 0, range(1, 6), end=False)  # the row of step 5 is lost with the process
    assert read_rows(workdir / METRICS) == [_row(step) for step in range(1, 5)]
    assert len(list((workdir / f"{METRICS}.rows").iterdir())) == 2
    _write(workdir, 2, range(3, 7), end=True)
    assert read_rows(workdir / METRICS) == [_row(step) for step in range(1, 7)]
    expected = "".join(json.dumps(_row(step)) + "\n" for step in range(1, 7))
    assert (workdir / METRICS).read_text() == expected  # joined into one object again
    assert not (workdir / f"{METRICS}.rows").exists()
    assert any(path.name.startswith("events.") for path in (workdir / "tensorboard").iterdir())


def test_a_stray_object_among_rows_is_named(store):
    workdir = epath.Path(f"gs://{BUCKET}/stray")
    _write(workdir, 0, range(1, 3), end=False)
    (workdir / f"{METRICS}.rows" / "notes²").write_text("x")
    with pytest.raises(ConfigError, match=r"stray/metrics\.jsonl\.rows/notes²: not an object of rows of metrics"):
        read_rows(workdir / METRICS)


@pytest.mark.parametrize("kept", [1, 3])
def test_rows_survive_a_kill_between_joining_and_deleting(store, monkeypatch, kept):
    """Leftover objects of rows repeat joined rows, or follow a gap in them: every row is read exactly once."""
    workdir = epath.Path(f"gs://{BUCKET}/joined")
    _write(workdir, 0, range(1, 5), end=False)  # objects of rows 1-2 and 3-4
    with monkeypatch.context() as patch:
        patch.setattr(metrics_files, "_segments", lambda path: [])  # killed before it deletes
        lines = [f"{json.dumps(_row(step))}\n".encode() for step in range(1, kept + 1)]
        metrics_files._Segments(workdir / METRICS, lines)
    assert read_rows(workdir / METRICS) == [_row(step) for step in range(1, 5)]


def test_a_checkpoint_without_its_commit_object_does_not_count(store):
    workdir = epath.Path(f"gs://{BUCKET}/part")
    for step, names in ((2, ("a", manager.COMMIT)), (4, ("a",))):
        for name in names:
            (workdir / "checkpoints" / str(step) / name).write_text("x")
    assert manager.complete_steps(workdir) == [2]
    manager._move(workdir / "checkpoints" / "2", workdir / "damaged" / "2")
    assert sorted(path.name for path in (workdir / "damaged" / "2").iterdir()) == ["a", manager.COMMIT]
    assert manager.complete_steps(workdir) == []


def test_a_bucket_that_cannot_be_reached_is_refused(directory, monkeypatch):
    def missing(name, **_):
        raise ImportError(f"no library for {name}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    backend.fsspec_backend._get_filesystem.cache_clear()
    with pytest.raises(ConfigError, match=r"--workdir=gs://bucket/run: cannot be reached .*pip install gcsfs"):
        train(tiny(directory), "gs://bucket/run", ONE, quiet=True)


def test_waiting_for_a_silent_bucket_is_reported_and_limited(directory, monkeypatch, capsys):
    monkeypatch.setattr(waiting, "EVERY", 0.1)
    monkeypatch.setattr(waiting, "LIMIT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        _forget_connections()
        with pytest.raises(ConfigError, match=r"gs://bucket/run: cannot be reached .*no answer within 1 s"):
            train(tiny(directory), "gs://bucket/run", ONE, quiet=True)
        with pytest.raises(ConfigError, match=r"gs://bucket/a: cannot be reached .*no answer within 1 s"):
            read_small_file("gs://bucket/a")
    _forget_connections()
    assert "waiting for gs://bucket/run, 0 s\n" in capsys.readouterr().err


def test_a_first_answer_is_what_the_call_returns_or_raises():
    assert waiting.first_answer("it", lambda: 3) == 3
    with pytest.raises(KeyError):
        waiting.first_answer("it", lambda: {}["a"])


def test_retries_for_arrays_of_a_checkpoint_are_limited(monkeypatch):
    """While the store answers 503 for arrays, a save and a restore fail soon; TensorStore would try for 15 minutes."""
    monkeypatch.setattr(arrays, "RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"})
    refused: list[str] = []
    tree = {"a": jnp.arange(4.0)}
    args = ocp.checkpoint_utils.construct_restore_args(tree)

    def manager(name):
        return ocp.CheckpointManager(
            epath.Path(f"gs://{BUCKET}/{name}"), item_handlers={"state": arrays.array_handler()}
        )

    def restored(saved):
        found = saved.restore(1, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(tree, restore_args=args)))
        return np.asarray(found["state"]["a"])

    def refuses(name):
        return any(part in name for part in refused)

    with object_store(refuses) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        _forget_connections()
        saved = manager("whole")
        saved.save(1, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
        saved.wait_until_finished()
        np.testing.assert_array_equal(restored(saved), tree["a"])
        refused.append("state/ocdbt.process_0/")
        with pytest.raises(ValueError, match="All 2 retry attempts failed"):  # noqa: PT012
            broken = manager("broken")
            broken.save(1, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
            broken.wait_until_finished()
        refused.append("state/d/")
        with pytest.raises(ValueError, match="All 2 retry attempts failed"):
            restored(manager("whole"))
    _forget_connections()


def test_a_dataset_that_is_not_in_the_bucket_is_refused(directory, store):
    config = tiny(directory, **{"data.dataset": f"gs://{BUCKET}/nowhere"})
    with pytest.raises(ConfigError, match=f"data.dataset='gs://{BUCKET}/nowhere': no such folder"):
        train(config, str(directory / "run"), ONE, quiet=True)


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_resumes_bit_for_bit(directory, store, tmp_path):
    settings = {**SETTINGS, "train.num_steps": 12, "train.save_every": 3, "train.sample_tokens": 4}
    config = tiny(directory, **settings)
    (tmp_path / "config.py").write_text(f"def get_config():\n    return {to_dict(config)!r}\n")
    train(config, str(tmp_path / "whole"), ONE, quiet=True)
    workdir = epath.Path(f"gs://{BUCKET}/run")
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "main.py", f"--config={tmp_path}/config.py", f"--workdir={workdir}"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            while not (workdir / "checkpoints" / "3" / manager.COMMIT).exists():
                assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.02)
            run.send_signal(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
        finally:
            run.kill()
        assert not (workdir / "report.txt").exists()
        (workdir / "checkpoints" / "11" / "state" / "part").write_text("of a save that was killed")
        assert subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode == 0, (
            tmp_path / "log"
        ).read_text()[-3000:]
    assert "resuming gs://bucket/run at step" in (tmp_path / "log").read_text()
    for name in (METRICS, "report.txt"):
        assert (workdir / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert manager.complete_steps(workdir) == manager.complete_steps(epath.Path(tmp_path / "whole"))
    assert not (workdir / "checkpoints" / "11").exists()


class _Refused(Exception):
    """An error of a bucket's library that is not an OSError."""


_Refused.__module__ = "gcsfs.retry"


def test_errors_of_a_bucket_end_in_a_sentence(tmp_path):
    folder = epath.Path("gs://bucket/run")
    with (
        pytest.raises(ConfigError, match=r"gs://bucket/run: .*507.*continues from its newest checkpoint"),
        disk_errors(folder),
    ):
        raise _Refused("no room, 507")
    with pytest.raises(KeyError), disk_errors(folder):
        raise KeyError("ours")
    code = (
        "import moe.programs.cli\nclass Refused(Exception): pass\nRefused.__module__ = 'gcsfs.retry'\n"
        "def main():\n    import logging\n    logging.getLogger('gcsfs').error('many lines')\n"
        "    raise Refused('no, 503')\nmoe.programs.cli.run(main)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "error: no, 503\n")
