"""Allocator, stop signals during startup, standard streams and environment of an entry point."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from moe.system import checkout, process
from moe.training import progress
from tests.helpers import slow_case
from tests.program_helpers import run_here

ROOT = Path(__file__).parents[1]
KEPT = "dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always"
HUGE = "glibc.malloc.hugetlb=1"
JEMALLOC = {"LD_PRELOAD": "libjemalloc.so.2", "MALLOC_CONF": KEPT}


@pytest.mark.parametrize(
    ("here", "jemalloc", "mode", "restarts_with"),
    [
        ({}, True, "never", JEMALLOC),
        ({}, False, "madvise", {"GLIBC_TUNABLES": HUGE}),
        ({}, False, "always", None),
        ({}, False, "never", None),
        (JEMALLOC, True, "madvise", None),  # the restarted program
        ({"GLIBC_TUNABLES": HUGE}, True, "madvise", None),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, True, "madvise", None),
        ({"LD_PRELOAD": ""}, True, "madvise", {"LD_PRELOAD": "", "GLIBC_TUNABLES": HUGE}),
        ({"LD_PRELOAD": "libtcmalloc.so.4"}, True, "never", None),
        ({"MALLOC_CONF": "narenas:1"}, True, "never", JEMALLOC | {"MALLOC_CONF": f"{KEPT},narenas:1"}),
        ({"GLIBC_TUNABLES": "a=1"}, False, "madvise", {"GLIBC_TUNABLES": f"a=1:{HUGE}"}),
    ],
)
def test_a_program_restarts_with_an_allocator_that_keeps_freed_memory(monkeypatch, here, jemalloc, mode, restarts_with):
    restarts = []
    monkeypatch.setattr(os, "environ", dict(here))
    monkeypatch.setattr(os, "execv", lambda path, arguments: restarts.append((path, arguments)))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(process, "_starts", lambda _: jemalloc)
    monkeypatch.setattr(process, "_huge_page_mode", lambda: mode)
    process.use_allocator()
    assert restarts == ([] if restarts_with is None else [(sys.executable, sys.orig_argv)])
    assert os.environ == (here if restarts_with is None else restarts_with)


def test_a_missing_library_is_not_preloaded():
    assert process._starts({})
    assert not process._starts({"LD_PRELOAD": "libjemalloc.so.no_such_version"})


def test_the_commit_is_unknown_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout.commit() == checkout.short_commit() == "unknown"


def test_allocator_description_that_benchmarks_print(monkeypatch):
    def said(mode: str, **variables: str) -> str:
        monkeypatch.setattr(os, "environ", variables)
        monkeypatch.setattr(process, "_huge_page_mode", lambda: mode)
        return process.allocator()

    assert said("madvise", **JEMALLOC) == "jemalloc, huge pages on"
    assert said("never", **JEMALLOC) == "jemalloc, huge pages off"
    assert said("madvise", GLIBC_TUNABLES=HUGE) == "the system allocator, huge pages on"
    assert said("madvise") == "the system allocator, huge pages off"
    assert said("always") == "the system allocator, huge pages on"


def test_an_entry_point_uses_jemalloc_where_it_is_installed():
    """After its restart a program maps jemalloc's library exactly where that can be loaded."""
    program = (
        "from moe.system import process; process.prepare(); print(process.allocator()); "
        "print('jemalloc' in open('/proc/self/maps').read())"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    clean = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=clean, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    has = process._starts({"LD_PRELOAD": "libjemalloc.so.2"})
    assert output[0].startswith("jemalloc" if has else "the system allocator")
    assert output[1] == str(has)


STOPS = ((signal.SIGTERM, 75), (signal.SIGINT, 130))
PROGRAM = """
import os
import sys
import time
from moe.system import process
getattr(process, os.environ.get("PREPARE", "prepare"))()
print("prepared", flush=True)
from moe.programs import cli
import jax

def main():
    print("stderr \u2713", file=sys.stderr, flush=True)
    print("stdout \u2713", flush=True)
    jax.devices()
    time.sleep(float(os.environ.get("STAY", "0")))

cli.run(main)
"""


def start(*redirections: str, **variables: str) -> subprocess.Popen[str]:
    """Start PROGRAM in a new process, which does not inherit an ignored SIGINT from tests that run in the
    background."""
    command = f'exec "$0" -c "$1" {" ".join(redirections)}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            ["sh", "-c", command, sys.executable, PROGRAM],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    finally:
        signal.signal(signal.SIGINT, ours)


@pytest.mark.parametrize(
    ("number", "code", "seconds", "prepare"),
    [
        *((number, code, wait, "prepare") for number, code in STOPS for wait in (0.0, 0.5)),
        *((number, code, 0.0, "use_tpu_compiler") for number, code in STOPS),  # moe plan and scaling.py
    ],
)
def test_a_signal_during_startup_ends_the_program_without_a_traceback(number, code, seconds, prepare):
    process = start(STAY="30", PREPARE=prepare)  # seconds, so that it does not end before the signal
    assert process.stdout is not None
    assert process.stdout.readline() == "prepared\n"
    time.sleep(seconds)  # while JAX is imported
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors


DESTRUCTOR = """
import os
import signal
import sys
import time
from moe.system import process

class Abandoned:
    def __del__(self):
        raise RuntimeError("Event loop is closed")  # TensorStore's, after an array could not be read

class Deleted:
    def __del__(self):
        Abandoned()
        if sys.argv[1] != "0":
            os.kill(os.getpid(), int(sys.argv[1]))
            time.sleep(0)  # the handler raises here
        print(1 / 0)

signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where tests run in the background
process._exit_on_stop_signals()
process.raise_on_stop_signals()
try:
    Deleted()
    time.sleep(10 if sys.argv[1] != "0" else 0)
finally:
    print("cleaned up", flush=True)
"""


@pytest.mark.parametrize(("number", "code", "error"), [*((*stop, "") for stop in STOPS), (0, 0, "ZeroDivisionError")])
def test_a_signal_inside_a_destructor_is_not_lost(number, code, error):
    """``number`` 0 sends no signal: other errors in a destructor are printed as usual."""
    ended = subprocess.run(
        [sys.executable, "-c", DESTRUCTOR, str(int(number))], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (code, "cleaned up\n")
    assert error in ended.stderr if error else not ended.stderr
    assert "Event loop" not in ended.stderr


@pytest.mark.parametrize("redirection", [pytest.param("2>&-", marks=pytest.mark.slow), "2>/dev/full"])
def test_a_closed_or_full_stderr_does_not_end_a_run(redirection):
    process = start(redirection)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.splitlines()[1:] == ["stdout \u2713"]


def test_a_closed_pipe_behind_stdout_does_not_end_a_run(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:  # closing it fails if unwritten text is left
        monkeypatch.setattr(sys, "stdout", stream)
        progress.say("lost")
        progress.say("lost too")


def test_a_line_of_progress_in_full(capsys, monkeypatch):
    """Steps 1 (compiled) at 0 s and 11 at 20 s: 2 s a step, 89 steps left: 178 s. 11 steps of 0.01 epochs."""
    clock = iter((0.0, 20.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = progress.Progress(0, 100, quiet=False, epochs_per_step={"a": 0.01, "b": 0.02})
    for _ in range(11):
        shown.advance()
    row = {"cross_entropy": 2.0, "learning_rate": 3e-4, "fraction_tokens_dropped": [0.1, 0.2]}
    shown.logged(row, {"tokens_per_second": 1000.4, "mfu": 0.5, "mfu_datasheet": 0.25})
    shown.evaluated({"loss": 2.5, "standard_error": 0.0124, "targets": 32635})
    shown.show(11)
    assert capsys.readouterr().err == (
        "step 11/100 (11 %, 3 min left) loss 2.000 heldout 2.500 ± 0.012 (32,635 tokens) tokens/s 1,000 "
        "dropped 15.0 % lr 0.0003 epoch 0.11 to 0.22 MFU 25 % (50 % of the measured matmul rate)\n"
    )


HELDOUT = "loss 1.000 heldout 2.000 ± 0.012 (32,635 tokens)"
WARNING = "warning: no token for 1 more of 8 experts"


def _report_three_times() -> None:
    shown = progress.Progress(0, 60, quiet=False, epochs_per_step={"a": 0.01})
    for step in range(1, 61):
        shown.advance()
        if step % 20 == 0:
            row = {"cross_entropy": 4 - step / 20, "learning_rate": 3e-4, "fraction_tokens_dropped": [0.1, 0.2]}
            shown.logged(row, {"tokens_per_second": 1000.4, "mfu": 0.5})
            shown.evaluated({"loss": 5 - step / 20, "standard_error": 0.0124, "targets": 32635})
            shown.show(step)
        if step == 30:
            shown.write(WARNING)
    shown.close()


def _written_to_a_terminal(monkeypatch, columns: int) -> list[str]:
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, columns))
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        _report_three_times()
    written = b""
    with contextlib.suppress(OSError):  # Linux's error when the other end is closed
        while block := os.read(reader, 4096):
            written += block
    os.close(reader)
    return written.decode().replace("\r\n", "\n").split("\n")


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        (41, "loss 1.000"),
        (80, HELDOUT),
        (110, f"{HELDOUT} tokens/s 1,000 dropped 15.0 %"),
        (200, f"{HELDOUT} tokens/s 1,000 dropped 15.0 % lr 0.0003 epoch 0.60 MFU 50 %"),
    ],
)
def test_a_terminal_shows_one_line_that_is_updated_in_place(monkeypatch, columns, values):
    above, bar, rest = _written_to_a_terminal(monkeypatch, columns)
    assert above.split("\r")[-1] == WARNING
    assert rest == ""
    rewritten = bar.split("\r")
    assert len(rewritten) > 3
    assert max(map(len, [*above.split("\r"), *rewritten])) <= columns
    done, _, shown = rewritten[-1].partition(" left, ")
    assert done == "100 % 60/60, 00:00"
    assert shown.rstrip("█ ") == values


def test_a_file_gets_a_line_for_each_report(capsys):
    _report_three_times()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "step 20/60",
        WARNING,
        "step 40/60",
        "step 60/60",
    ]


def test_a_terminal_of_unknown_width_gets_lines(monkeypatch):
    """A terminal that reports no columns, as in a container or on a CI console."""
    lines = _written_to_a_terminal(monkeypatch, 0)
    assert [line.partition(" ")[2].partition(" ")[0] for line in lines] == ["20/60", "no", "40/60", "60/60", ""]


def test_an_ascii_terminal_gets_escapes():
    process = start(PYTHONIOENCODING="ascii")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (output.splitlines()[1], errors) == ("stdout \\u2713", "stderr \\u2713\n")


def test_figures_need_no_display(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "no_such_backend")
    process._check_environment()
    assert os.environ["MPLBACKEND"] == "Agg"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JAX_PLATFORMS": "abacus"}, "error: JAX_PLATFORMS='abacus': Unable to initialize backend"),
        slow_case({"JAX_PLATFORMS": "cuda"}, "error: JAX_PLATFORMS='cuda': "),
        slow_case({"JAX_ENABLE_X64": "1"}, "error: JAX_ENABLE_X64='1': must be unset or 0"),
        ({"JAX_ENABLE_X64": "perhaps"}, "error: JAX_ENABLE_X64='perhaps': must be unset or 0"),
    ],
)
def test_wrong_environment_variables_are_refused_in_one_sentence(variables, words):
    _, errors = (process := start(**variables)).communicate(timeout=60)
    assert process.returncode == 1
    assert words in errors
    assert "Traceback" not in errors


def test_a_current_directory_that_was_deleted_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match="error: the current directory was deleted"):
        process._check_environment()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("moe conform", "--scale=1e308"), "flag --scale=1e308"),
        (("scripts/conformance.py", "--layers=nowhere"), "--layers=nowhere: holds no npz files"),
        (("scripts/conformance.py", "--out=nowhere/table.md"), "--out=nowhere/table.md: must be a file in a folder"),
        (("scripts/count_params.py", "--config=tiny"), "--config: no such option"),
        (("scripts/settings_pages.py", "--folder=nowhere"), "nowhere/run.md"),
    ],
)
def test_a_wrong_flag_is_refused_before_the_work(command, says, monkeypatch):
    monkeypatch.setattr("moe.conformance.table.run", lambda _: pytest.fail("the work of minutes has begun"))
    ended = run_here(command[0], [command[1]], monkeypatch)
    assert (ended.code, ended.output) == (1, "")
    assert says in ended.errors
    assert "Traceback" not in ended.errors
