"""Exit codes and signals of the launchers, with stand-ins for the runs."""

import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A stand-in for a run: exits with the next code of a file each time; for "wait" exits with 75 on SIGTERM, and counts
# the signals.
RUN = """
stop=
trap 'echo term >> terms; stop=yes' TERM
echo start >> starts
code=$(head -n 1 codes); sed -i 1d codes
if [ "$code" = wait ]; then
    while [ -z "$stop" ] && [ ! -e over ]; do sleep 0.05; done
    sleep 0.2
    exit 75
fi
exit "$code"
"""


def _again(folder, codes):
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    (folder / "run.sh").write_text(RUN)
    return subprocess.Popen(
        # Background processes start with SIGINT ignored, which a shell cannot undo by itself.
        ["env", "--default-signal=INT", "sh", "-euc", f". {ROOT}/scripts/launch/again.sh; again sh run.sh"],
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )


def _lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(("codes", "last"), [([0], 0), ([75, 75, 0], 0), ([75, 1, 0], 1), ([130], 130)])
def test_only_exit_code_75_restarts(tmp_path, codes, last):
    assert _again(tmp_path, codes).wait(timeout=60) == last
    assert _lines(tmp_path / "starts") == codes.index(last) + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_stops_its_run_once(tmp_path, number):
    launcher = _again(tmp_path, ["wait", 0])
    try:
        while _lines(tmp_path / "codes") == 2:
            assert launcher.poll() is None
        launcher.send_signal(number)
        launcher.send_signal(number)
        assert launcher.wait(timeout=60) == 75  # once the run has ended, not before
    finally:
        launcher.kill()
        (tmp_path / "over").touch()  # ends a run that was not stopped
    assert _lines(tmp_path / "starts") == 1
    assert _lines(tmp_path / "terms") == 1
