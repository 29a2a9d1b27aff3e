"""SIGTERM and SIGINT: the run saves at the end of the step, in one process and in two."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import pytest

from moe.config import ConfigError, to_dict
from moe.data import pipeline
from moe.system import exit_codes, signals
from moe.training import loop as training
from moe.training.train import train
from tests.run_helpers import ONE, SETTINGS, at_step, rows, steps, tiny

# Most runs of this file share one program.
pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_end_of_the_step(directory, whole, programs, tmp_path, monkeypatch, number, code):
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


def test_a_signal_before_the_first_step_ends_the_run_at_once(directory, programs, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "prepare", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(signals.Stopped):
        train(tiny(directory, **SETTINGS), str(tmp_path / "run"), ONE, make_program=programs)
    assert not (tmp_path / "run").exists()


def test_a_signal_in_the_first_step_ends_the_run_at_once(directory, programs, tmp_path, monkeypatch):
    """The first step, and the evaluation, compile for minutes in a large model, and there is nothing to save."""
    monkeypatch.setattr(training, "next_batch", at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(signals.Stopped) as caught:
        train(tiny(directory, **SETTINGS), str(tmp_path), ONE, make_program=programs, quiet=True)
    assert caught.value.code == 75
    assert steps(tmp_path) == []


def test_the_evaluation_is_compiled_before_signals_are_deferred(directory, programs, tmp_path, monkeypatch):
    """The only evaluation is after step 6, whose compilation would delay a signal, and its end would lose 5 steps."""
    events, defer = [], signals.StopSignals.at_steps

    def recorded(*args):
        program = programs(*args)
        return dataclasses.replace(program, eval_step=lambda *a: events.append("evaluate") or program.eval_step(*a))

    monkeypatch.setattr(signals.StopSignals, "at_steps", lambda self: events.append("defer") or defer(self))
    train(tiny(directory, **SETTINGS), str(tmp_path), ONE, make_program=recorded, quiet=True)
    assert events[:2] == ["evaluate", "defer"]
    assert set(events[2:]) == {"evaluate"}


def test_only_a_second_signal_may_end_a_step_in_the_middle(monkeypatch):
    """The main thread is inside of XLA, so that no handler has run yet."""
    waiting = []
    monkeypatch.setattr(signals.STOP_WATCH, "unanswered", lambda: waiting)
    with signals.StopSignals() as stop:
        assert not stop._has_unsaved_step()
        with stop.at_steps():
            waiting.append(signal.SIGTERM)
            assert stop._has_unsaved_step()
            waiting.append(signal.SIGTERM)
            assert not stop._has_unsaved_step()
            del waiting[1]
            stop._handle(signal.SIGTERM, None)  # the first one was handled, and this is the second
            assert not stop._has_unsaved_step()


def test_a_second_signal_waits_for_the_checkpoint_that_is_being_written(directory, programs, tmp_path, monkeypatch):
    """Its thread would go on writing in a workdir whose lock is free, and beside a second call."""
    rename, begun, ended = os.rename, threading.Event(), []

    def slowly(source, target):
        if str(target).endswith("checkpoints/2"):
            begun.set()
            time.sleep(0.5)
            ended.append(target)
        rename(source, target)

    def twice():
        assert begun.wait(60)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "rename", slowly)
    monkeypatch.setattr(training, "next_batch", at_step(3, twice))
    with pytest.raises(signals.Stopped) as caught:
        train(tiny(directory, **SETTINGS), str(tmp_path), ONE, make_program=programs, quiet=True)
    assert caught.value.code == 130
    assert len(ended) == 1
    assert steps(tmp_path) == [2]


class Store(dict):
    """JAX's store of a run."""

    def key_value_set(self, key, value):
        if key in self:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self[key] = value

    def key_value_try_get(self, key):
        if key not in self:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self[key]


@pytest.fixture
def pair(monkeypatch):
    """This process as one of two: (their store, number of this process, exit codes of processes that left)."""
    store, number, left = Store(), [1], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: number[0])
    monkeypatch.setattr(signals.distributed.global_state, "client", store)
    monkeypatch.setattr(signals.threading, "Thread", mock.Mock())
    monkeypatch.setattr(signals.time, "sleep", lambda _: None)
    monkeypatch.setattr(signals.atexit, "register", lambda leave, code: left.append((number[0], code)))
    monkeypatch.setattr(signals.os, "_exit", lambda code: left.append((number[0], code)))
    return store, number, left


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("x: is wrong"), 1, "process 1: ConfigError: x: is wrong"),
        (signals.StartAgain("damaged"), 75, "process 1: StartAgain: damaged"),
        (SystemExit(130), 130, "process 1: SystemExit: 130"),
    ],
)
def test_an_error_of_one_process_ends_the_others_with_its_exit_code(pair, capsys, error, code, text):
    store, number, left = pair
    with pytest.raises(type(error)), signals.ended_together():
        raise error
    number[0] = 0
    signals._watch(store)
    assert left == [(1, code), (0, code)]
    assert capsys.readouterr().err == f"ended with {text}\n"
    with pytest.raises(ValueError, match="later"), signals.ended_together():  # the first one's reason stays
        raise ValueError("later")
    assert list(store.values()) == [f"{code} {text}"]


@pytest.mark.parametrize("is_cause", [False, True])
def test_a_broken_collective_waits_for_the_report_of_a_lost_process(pair, monkeypatch, is_cause):
    """The error itself, and that of a checkpoint that it caused."""
    store, _, _ = pair
    waits, broken = [], ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    monkeypatch.setattr(signals.time, "sleep", lambda seconds: waits.append((seconds, dict(store))))
    error = ConfigError("a checkpoint could not be written (Gloo)") if is_cause else broken
    error.__cause__ = broken if is_cause else None
    with pytest.raises(type(error), match="Gloo"), signals.ended_together(20):
        raise error
    assert waits == [(1.25 * 20 + 5, {})]  # nothing was announced before
    assert len(store) == 1


def test_a_signal_while_one_process_compiles_ends_the_others(pair):
    """Its main thread raises nothing: the thread that watches for signals tells the others."""
    store, _, left = pair
    with signals.ended_together():
        (say,) = signals.STOP_WATCH._farewells
        say(130)
    assert (list(store.values()), left) == (["130 process 1: Stopped: stopped by a signal"], [(1, 130)])


def test_one_of_several_processes_that_have_not_joined_is_refused(pair, monkeypatch):
    monkeypatch.setattr(signals.distributed.global_state, "client", None)
    with (
        pytest.raises(ConfigError, match="--distributed: must be given, since this is one of 2"),
        signals.ended_together(),
    ):
        pass


def test_processes_that_stop_at_the_same_step_or_finish_do_not_end_each_other(pair):
    store, _, left = pair
    with signals.ended_together():
        pass
    assert left == []
    with pytest.raises(signals.Stopped), signals.ended_together():
        raise signals.Stopped(75, "stopped by a preemption notice")
    assert (store, left) == ({}, [(1, 75)])  # at its own end


def test_a_stopped_process_leaves_after_the_shutdown_that_all_share(pair, monkeypatch):
    _, _, left = pair
    monkeypatch.setattr(signals.jax.distributed, "shutdown", lambda: left.append("shutdown"))
    signals._leave_with_others(75)
    assert left == ["shutdown", (1, 75)]


@contextlib.contextmanager
def two_processes(directory, folder, **settings):
    """The two processes of a run in ``folder/run``, whose output goes to ``folder/0.log`` and ``1.log``."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    }
    settings = SETTINGS | {"train.num_steps": 100_000, "train.save_every": 100_000} | settings
    tree = to_dict(tiny(directory, **settings))
    (folder / "config.py").write_text(f"def get_config():\n    return {tree!r}\n")
    command = [sys.executable, "main.py", "--distributed", f"--config={folder}/config.py", f"--workdir={folder}/run"]
    root = Path(__file__).parents[1]
    pair = []
    for index in range(2):
        with (folder / f"{index}.log").open("w") as log:
            own = environment | {"JAX_PROCESS_ID": str(index)}
            pair.append(subprocess.Popen(command, cwd=root, env=own, stdout=log, stderr=log))
    try:
        yield pair
    finally:
        for process in pair:
            process.kill()


def wait_until(pair, folder, reached):
    while not (found := reached()):
        assert [process.poll() for process in pair] == [None, None], (folder / "0.log").read_text()[-2000:]
        time.sleep(0.2)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_stop_at_the_same_step(directory, tmp_path):
    """SIGTERM reaches only one of them; both save the same step and exit with 75."""
    run = tmp_path / "run"
    with two_processes(directory, tmp_path) as pair:
        wait_until(pair, tmp_path, lambda: len(rows(run, "train")) >= 3)
        before = len(rows(run, "train"))
        pair[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=300) for process in pair] == [exit_codes.START_AGAIN] * 2
    (saved,) = steps(run)
    assert saved == rows(run, "train")[-1]["step"] >= before


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_two_processes_that_compile_stop_without_a_step(directory, tmp_path, number, code):
    """Layers that are not scanned compile for a minute or more, after which the run would save a first step."""
    with two_processes(directory, tmp_path, **{"model.scan_layers": False, "model.num_layers": 96}) as pair:
        wait_until(pair, tmp_path, lambda: "compiling the train step" in (tmp_path / "0.log").read_text())
        pair[1].send_signal(number)
        assert [process.wait(timeout=300) for process in pair] == [code] * 2
    assert steps(tmp_path / "run") == []
