"""What the launchers do with exit codes and signals; the runs are stand-ins."""

import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Ends with the next of the codes in a file each time that it is run, and "stops" with 75 on SIGTERM, counting those.
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
        # Tests run in the background are born with SIGINT ignored, which a shell cannot undo by itself.
        ["env", "--default-signal=INT", "sh", "-euc", f". {ROOT}/scripts/launch/again.sh; again sh run.sh"],
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )


def _lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(("codes", "last"), [([0], 0), ([75, 75, 0], 0), ([75, 1, 0], 1), ([130], 130)])
def test_75_alone_is_started_again(tmp_path, codes, last):
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
        (tmp_path / "over").touch()  # ends a run that nobody stopped
    assert _lines(tmp_path / "starts") == 1
    assert _lines(tmp_path / "terms") == 1
