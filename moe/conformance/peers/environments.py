"""An environment of its own for each library, made by uv from one file of pins."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from moe.config import ConfigError
from moe.system.atomic_files import write_atomic

PINS = Path(__file__).with_name("environments.toml")


@dataclasses.dataclass(frozen=True)
class Environment:
    """One library's environment.

    Attributes:
        name: of the table in environments.toml, and of the folder.
        python: version.
        packages: requirements, pinned.
        worker: file of workers/.
        folder: where it is.
        options: further options of ``uv pip install``.
        alone: requirements that are installed without what they ask for, after ``packages``, which have what is needed.
        control: holds known bugs, which must deviate, or this package's layers, which must not.
        here: the running environment, which nothing is installed into.
    """

    name: str
    python: str
    packages: tuple[str, ...]
    worker: str
    folder: Path
    options: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    control: bool = False
    here: bool = False

    @property
    def interpreter(self) -> Path:
        """Its Python."""
        return Path(sys.executable) if self.here else self.folder / "bin" / "python"

    def make(self) -> None:
        """Create it where it is missing or was made of other pins.

        Raises:
            ConfigError: uv is missing, or cannot install the packages.
        """
        if self.here:
            return
        beside = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
        uv = shutil.which("uv", path=beside)
        if uv is None:
            raise ConfigError("--suite=peers needs uv on PATH or in this environment (pip install 'moe-jax[judge]')")
        stamp, pins = self.folder / "pins.txt", "\n".join((self.python, *self.packages, *self.options, *self.alone))
        if stamp.exists() and stamp.read_text() == pins:
            return
        _run([uv, "venv", "--clear", "--quiet", "--python", self.python, str(self.folder)], self.name)
        install = [uv, "pip", "install", "--quiet", "--python", str(self.interpreter), *self.options]
        _run([*install, *self.packages], self.name)
        if self.alone:
            _run([*install, "--no-deps", *self.alone], self.name)
        write_atomic(stamp, pins)

    def run(self, program: Path, *arguments: str) -> str:
        """Standard output of a program in this environment; its errors go to the terminal."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XLA", "JAX"))
        }
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
        return _run([str(self.interpreter), str(program), *arguments], self.name, environment)


def _run(command: list[str], name: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{name}: {' '.join(command[:3])} … failed: {last}")
    return done.stdout


def read(folder: Path) -> dict[str, Environment]:
    """Every environment of environments.toml, kept in ``folder``."""
    tables = tomllib.loads(PINS.read_text())
    return {
        name: Environment(
            name,
            table.get("python", ""),
            tuple(table.get("packages", ())),
            table["worker"],
            folder / name,
            tuple(table.get("options", ())),
            tuple(table.get("alone", ())),
            table.get("control", False),
            table.get("here", False),
        )
        for name, table in tables.items()
    }
