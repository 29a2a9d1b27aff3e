"""Two processes of four devices train as one process of eight does, and one continues after both were lost."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moe.config.parse import from_config_dict
from moe.configs import mixtral
from moe.training.train import train
from tests.tiny_text import build

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model.vocab_size": 400,
    "model.d_model": 32,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 16,
    "model.d_ff": 64,
    "model.moe.d_ff": 32,
    "data.dataset": "tiny_text/split",
    "data.sequence_length": 16,
    "data.shuffle_window": 8,
    "data.heldout_rows": 8,
    "mesh.data": 2,
    "mesh.expert": 4,
    "optimizer.warmup_steps": 1,
    "train.num_steps": 20,
    "train.log_every": 1,
    "train.eval_every": 20,
    "train.save_every": 2,
    "train.sample_tokens": 0,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return SETTINGS | {"data.directory": str(build(tmp_path_factory.mktemp("data")))}


@pytest.fixture(scope="module")
def source(settings, tmp_path_factory):
    """Workdir of a run in one process of eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    train(_config(settings), str(workdir), quiet=True)
    return workdir


@pytest.fixture(scope="module")
def alone(source):
    """Losses of the run in one process of eight devices."""
    return _losses(source)


def _config(settings):
    tree = mixtral.get_config()
    tree.update_from_flattened_dict(settings)
    return from_config_dict(tree)


def _losses(workdir, steps=20):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    assert list(losses) == list(range(1, steps + 1))
    return list(losses.values())


def _arguments(settings, workdir):
    given = [f"--config.{path}={value}" for path, value in settings.items()]
    return ["--config=configs/mixtral.py", f"--workdir={workdir}", *given]


def _environment(**more):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_COORDINATOR_ADDRESS": address} | more


def _start_two(settings, workdir, log):
    environment = _environment(JAX_NUM_PROCESSES="2")
    return [
        subprocess.Popen(
            [sys.executable, "main.py", "--distributed", *_arguments(settings, workdir)],
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(index)},
            stdout=log,
            stderr=log,
        )
        for index in (0, 1)
    ]


def _wait_for(path, processes, log):
    """Wait until a checkpoint is complete, when Orbax renames it."""
    deadline = time.monotonic() + 250
    while not path.exists():
        assert all(process.poll() is None for process in processes), Path(log.name).read_text()[-3000:]
        assert time.monotonic() < deadline, Path(log.name).read_text()[-3000:]
        time.sleep(0.02)


def _wait_for_lock(workdir):
    """Wait until the children of killed processes have ended too."""
    with open(workdir / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


@pytest.mark.slow
def test_one_process_continues_a_run_of_two_lost_processes(settings, alone, tmp_path):
    workdir = tmp_path / "run"
    with open(tmp_path / "log", "w") as log:
        pair = _start_two(settings, workdir, log)
        try:
            _wait_for(workdir / "checkpoints" / "2", pair, log)
        finally:
            for process in reversed(pair):  # one is lost, and its launcher ends the other
                process.kill()
        assert [process.wait() for process in pair] == [-9, -9]
    _wait_for_lock(workdir)
    train(_config(settings), str(workdir), quiet=True)
    np.testing.assert_allclose(_losses(workdir), alone, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_ends_with_75_after_the_other_is_lost(settings, tmp_path, lost):
    """The loss of process 0 closes the coordinator's connection; that of process 1 is noticed by missed heartbeats."""
    with open(tmp_path / "log", "w") as log:
        long = {"train.num_steps": 100_000, "train.host_timeout": 15}
        pair = _start_two(settings | long, tmp_path / "run", log)
        try:
            _wait_for(tmp_path / "run" / "checkpoints" / "2", pair, log)
            pair[lost].kill()
            assert pair[1 - lost].wait(timeout=120) == 75
        finally:
            for process in pair:
                process.kill()
                process.wait()
    lines = (tmp_path / "log").read_text().splitlines()
    assert f"error: process {lost}" in lines[-1]
    assert "was lost; run the same command again" in lines[-1]
    assert not [line for line in lines if "coordination_service" in line or "stack trace" in line]


def _launch(settings, workdir, devices):
    """Train in two processes of this many devices each."""
    command = ["sh", "scripts/launch/processes.sh", "2", str(devices), *_arguments(settings, workdir)]
    subprocess.run(command, cwd=ROOT, env=_environment(), check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_launched_processes_have_the_losses_of_one_process(settings, alone, tmp_path):
    _launch(settings, tmp_path / "run", 4)
    np.testing.assert_allclose(_losses(tmp_path / "run"), alone, rtol=1e-5)


@pytest.mark.slow
def test_processes_evaluate_a_model_together(source):
    """The first one prints; the last evaluation of the run was of the same rows, in one process."""
    environment = _environment(JAX_NUM_PROCESSES="2")
    command = [sys.executable, "-m", "moe", "evaluate", "--distributed", "--json", f"--workdir={source}"]
    pair = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"JAX_PROCESS_ID": str(index)}, stdout=subprocess.PIPE)
        for index in (0, 1)
    ]
    printed = [process.communicate(timeout=250)[0].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert "{" not in printed[1]
    found = json.loads(printed[0][printed[0].index("{") :])["all"]
    rows = map(json.loads, (source / "metrics.jsonl").read_text().splitlines())
    (expected,) = (row for row in rows if row["kind"] == "heldout/all")
    assert found["targets"] == expected["targets"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


FEW = {"mesh.data": 1, "train.num_steps": 2, "train.eval_every": 2}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_start_from_a_checkpoint(settings, source, tmp_path):
    """The checkpoint's parameters and moments are split over the processes; losses equal those of one process."""
    start = {"start.checkpoint": str(source), "start.optimizer": "carry"}
    settings = settings | FEW | start | {"mesh.fsdp": 2}
    _launch(settings, tmp_path / "pair", 4)
    train(_config(settings), str(tmp_path / "alone"), quiet=True)
    losses = [_losses(tmp_path / name, 2) for name in ("pair", "alone")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_that_share_rows_save_checkpoints(settings, tmp_path):
    """Each process writes the position of every stream."""
    _launch(settings | FEW | {"mesh.expert": 1, "mesh.tensor": 2, "train.save_every": 1}, tmp_path / "run", 1)
    assert np.isfinite(_losses(tmp_path / "run", 2)).all()
    assert (tmp_path / "run" / "checkpoints" / "2" / "data" / "stream_0.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_processes_start_again_if_one_finds_a_damaged_checkpoint(settings, tmp_path):
    """Only process 1 reads the position of stream 7; the launchers start both again, which go on from step 1."""
    settings, run = settings | FEW | {"mesh.expert": 2, "train.save_every": 1}, tmp_path / "run"
    _launch(settings, run, 1)
    losses = _losses(run, 2)
    (run / "checkpoints" / "2" / "data" / "stream_7.json").write_text("{")
    (run / "report.txt").unlink()
    _launch(settings, run, 1)
    assert (run / "damaged" / "2").exists()
    assert (run / "report.txt").exists()
    np.testing.assert_allclose(_losses(run, 2), losses, rtol=1e-5)
