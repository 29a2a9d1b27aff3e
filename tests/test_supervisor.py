"""The parent of a distributed run's process: exit codes, signals, and what it shows of the child's errors."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import os
import signal
import sys
import time

from moe.system.supervisor import supervise

supervise(2)
time.sleep(0.2)  # until the first sign of life
"""

#: What JAX 0.12 writes on a lost process, shortened.
REPORT = r"""
sys.stderr.write("step 3\n"
    "E1202 00:32:22.697693   18409 coordination_service_agent.cc:288] Polled an error from coordination service.\n"
    "F1202 00:32:22.697876   18409 client.h:86] Terminating process because the JAX distributed service detected fatal "
    "errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n3\n"
    "The tasks have crashed. Check the task logs.\n*** Check failure stack trace: ***\n    @ 0x7fe5 absl::Flush()\n")
sys.stderr.flush()
os.abort()
"""
AGAIN = "run the same command again: it continues from the newest checkpoint\n"
STOPPED = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("body", "code", "errors"),
    [
        ("sys.exit('error: x: is wrong')", 1, "error: x: is wrong\n"),
        (STOPPED, 75, ""),
        (REPORT, 75, f"step 3\nerror: process 3 of this run was lost; {AGAIN}"),
        ("os.abort()", 134, ""),
        (
            "os.kill(os.getpid(), signal.SIGSTOP)",
            75,
            f"error: this process stood still for 2 s (train.host_timeout) and was ended; {AGAIN}",
        ),
    ],
    ids=["error", "stopped", "lost", "aborted", "frozen"],
)
def test_the_end_of_a_child_is_an_exit_code_and_one_sentence(tmp_path, body, code, errors):
    (tmp_path / "program.py").write_text(PROGRAM + body)
    command = [sys.executable, str(tmp_path / "program.py"), "--word"]
    ended = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (code, errors)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_ends_with_its_supervisor(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM + "print('ready', flush=True)\ntime.sleep(60)")
    command = [sys.executable, str(tmp_path / "program.py")]
    with subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout.readline() == b"ready\n"
        supervisor.send_signal(signal.SIGKILL)
        assert supervisor.stdout.read() == b""  # closed by the child, too
