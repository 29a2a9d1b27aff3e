"""Run the commands that a newcomer meets: python scripts/first_hour.py.

Builds the wheel, installs it into a fresh environment and an empty folder, and runs every command of the README, of
docs/index.md and of the first block of each guide there, in the order of the pages. Prints seconds and last line of
each; ends with 1 if one stops. A command that is still at work after --limit seconds gets SIGTERM, and has to end with
the exit code that says it goes on when it is started again. What the reader brings, a folder of text or a model, is put
in its place; commands that need a checkout, a network or a file of the reader's are named and left out.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from moe.programs import cli

ROOT = Path(__file__).resolve().parents[1]
_LIMIT = flags.DEFINE_integer("limit", 900, "Seconds after which a command is asked to stop.", lower_bound=1)
_PAGES = flags.DEFINE_list("pages", [], "Names of pages, such as README,index,runs; default: all.")
#: Exit code of a run that SIGTERM stopped: the same command continues.
_CONTINUES = 75
#: Pages whose runs others read.
_FIRST = ("README", "index", "runs", "playground")
#: Text of a command → reason to leave it out.
LEFT_OUT = {
    "scripts/install.sh": "sets up a checkout",
    "activate": "the environment is active",
    "pip install": "needs the network",
    "hf download": "needs the network",
    "mistralai/": "needs a download",
    "/tmp/mixtral ": "needs a download",
    "--topology=h100:2x8 --config": "needs the CUDA plugin, 4 GB",
    "--libraries=": "installs another library",
    "tensorboard --logdir": "serves until it is stopped",
    "main.py": "needs a checkout",
    "scripts/": "needs a checkout",
    "*.py": "needs a checkout",
    "my_layers": "a file of the reader's",
    "layer.npz": "a file of the reader's",
    "my_writers": "a file of the reader's",
    "my_objective": "a file of the reader's",
}
#: What the reader brings → what stands for it here, below the folder.
BROUGHT = {
    "my_text": "text",
    "/path/to/folder": "text",
    "/path/to/text": "text",
    "/path/to/model": "tmp/open",
    "WORKDIR": "tmp/quickstart",
    "=DIR": "=tmp/dir",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command and the page that it stands on."""

    page: str
    line: str

    def left_out(self) -> str:
        """Reason not to run it; empty: none."""
        return next((reason for text, reason in LEFT_OUT.items() if text in f"{self.line} "), "")

    def here(self, folder: Path) -> str:
        """The command with files in a folder for those that the reader has."""
        line = self.line.replace("/tmp/", f"{folder}/tmp/")
        for name, place in BROUGHT.items():
            line = line.replace(name, f"={folder}/{place[1:]}" if place.startswith("=") else f"{folder}/{place}")
        return line


def commands() -> Iterator[Command]:
    """Commands of the README, the index and the first blocks of the guides."""
    guides = {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))} | {"README": ROOT / "README.md"}
    for name in (*_FIRST, *sorted(guides.keys() - {*_FIRST})):
        blocks = re.findall(r"^ *```sh\n(.*?)^ *```", guides[name].read_text(), re.DOTALL | re.MULTILINE)
        for line in "".join(blocks if name == "README" else blocks[:1]).replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield Command(name, " ".join(line.split()))


def run(line: str, folder: Path, environment: dict[str, str]) -> tuple[int, float, str]:
    """Exit code, seconds and last line of a command."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}" if "&&" not in line and "=" not in line.split()[0] else line],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(_LIMIT.value)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # of this command only
            code = process.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").split("\n")
    return code, time.monotonic() - start, next((text for text in reversed(lines) if text.strip()), "")


def install(folder: Path) -> Path:
    """Build the wheel, and install it into a fresh environment; the folder of its programs."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    wheel = next(folder.glob("*.whl"))
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, wheel, "-c", ROOT / "constraints.txt"], check=True)
    return folder / "venv" / "bin"


def main() -> None:
    """Run the commands and print a line for each."""
    stopped = 0
    with tempfile.TemporaryDirectory() as name:
        programs, folder = install(Path(name)), Path(name, "empty")
        (folder / "tmp").mkdir(parents=True)
        (folder / "text").mkdir()
        for page in (ROOT / "docs").glob("*.md"):
            shutil.copyfile(page, folder / "text" / f"{page.stem}.txt")
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
        environment |= {"PATH": f"{programs}:{environment['PATH']}", "HOME": str(folder)}
        for command in commands():
            if _PAGES.value and command.page not in _PAGES.value:
                continue
            if reason := command.left_out():
                print(f"{command.page}: {command.line}\n    left out: {reason}", flush=True)
                continue
            code, seconds, last = run(command.here(folder), folder, environment)
            at_limit = seconds > _LIMIT.value
            fine = code == 0 or (at_limit and code in (_CONTINUES, -signal.SIGTERM))
            stopped += not fine
            state = ("at work until the limit" if at_limit else "done") if fine else f"STOPPED with {code}"
            print(f"{command.page}: {command.line}\n    {seconds:.0f} s, {state}: {last}", flush=True)
    print(f"{stopped} stopped")
    sys.exit(bool(stopped))


if __name__ == "__main__":
    cli.run(main, examples=("python scripts/first_hour.py", "python scripts/first_hour.py --pages=README --limit=60"))
