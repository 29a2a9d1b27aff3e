"""SIGTERM and Ctrl-C while the main thread is inside of a library, where Python runs no handlers."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import slow_case

ROOT = Path(__file__).parents[1]
STOPS = ((signal.SIGTERM, 75), (signal.SIGINT, 130))

# Locking a mutex twice blocks the main thread in C for ever, without the interpreter's lock, and no signal wakes it.
PROGRAM = """
import ctypes
import signal
import sys
import threading
import time

signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where tests run in the background
from moe.system import process, stop_watch
stop_watch.PATIENCE = 1.0
process.prepare()
process.raise_on_stop_signals()
from moe.system.stop_watch import STOP_WATCH

def lock(libc=ctypes.CDLL(None), mutex=ctypes.create_string_buffer(64), twice=(0, 1)):
    for _ in twice:
        libc.pthread_mutex_lock(mutex)

def block():
    threading.Timer(0.5, print, ["blocked"], {"flush": True}).start()
    lock()

def compile_for_minutes():
    import jax
    import numpy as np

    def folded(x):  # XLA computes the constant while it compiles
        numbers = jax.numpy.asarray(np.arange(1 << 21, dtype=np.float32))
        return x + jax.lax.reduce_window(numbers, 0.0, jax.lax.max, (20_001,), (1,), "SAME")

    lowered = jax.jit(folded).lower(np.float32(1))
    threading.Timer(1, print, ["blocked"], {"flush": True}).start()
    lowered.compile()
"""


def ended(body: str, *signals: int) -> tuple[int, str, str]:
    """(Exit code, output, errors) of PROGRAM and ``body``, which prints "blocked" when it is to get the signals."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + body], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "blocked\n"
    for number in signals:
        program.send_signal(number)
    try:
        output, errors = program.communicate(timeout=60)
    finally:
        program.kill()
    return program.returncode, output, errors


@pytest.mark.parametrize(("number", "code"), [slow_case(*STOPS[0]), STOPS[1]])
def test_a_signal_ends_a_program_whose_main_thread_is_inside_of_a_library(number, code):
    assert ended("block()", number) == (code, "", f"stopped by {signal.Signals(number).name}\n")


@pytest.mark.parametrize(("number", "code"), [STOPS[0], slow_case(*STOPS[1])])
def test_a_signal_ends_a_program_that_compiles_for_minutes(number, code):
    assert ended("compile_for_minutes()", number)[0] == code


# What blocks after the handler has raised, which needs no message: the program was ending.
ENDINGS = {
    "finally": """
try:
    print("blocked", flush=True)
    time.sleep(60)
finally:
    lock()
""",
    "another thread": """
threading.Thread(target=lock).start()
print("blocked", flush=True)
time.sleep(60)
""",
    "a function at the exit": """
import atexit
atexit.register(lock)
print("blocked", flush=True)
time.sleep(60)
""",
    "a destructor": """
class Library:
    __del__ = lambda self, lock=lock: lock()

sys.library = Library()  # destroyed after all threads of Python have stopped
print("blocked", flush=True)
time.sleep(60)
""",
}


@pytest.mark.parametrize(
    "ending", ["another thread", "a destructor", *map(slow_case, ("finally", "a function at the exit"))]
)
def test_a_signal_ends_a_program_whose_end_is_blocked(ending):
    assert ended(ENDINGS[ending], signal.SIGTERM)[:2] == (75, "")


UNFINISHED = """
left = [True]

def write():
    time.sleep(3)  # longer than the watch's patience
    print("written", flush=True)
    left.clear()

threading.Thread(target=write, daemon=True).start()
with STOP_WATCH.unfinished(lambda: bool(left)):
    block()
"""


def test_a_signal_waits_for_what_is_being_written():
    assert ended(UNFINISHED, signal.SIGTERM) == (75, "written\n", "stopped by SIGTERM\n")
