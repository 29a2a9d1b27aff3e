"""Files that are installed with the package: configs, suites, kept plans, the results' records, a model to play with.

In a checkout ``moe/configs`` and ``moe/lab/published`` are links to ``configs/`` and ``docs/results/``; a wheel holds
the files themselves. Importing this module imports nothing else.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

#: Config files, each with get_config().
CONFIGS = _PACKAGE / "configs"

#: Suites for ablations, each with get_suite(size), and the registered claims about them.
SUITES = CONFIGS / "ablations"

#: Plans that were compiled and are kept with the configs.
PLANS = CONFIGS / "plans.json"

#: Results: in each suite's folder the table of its runs.
RESULTS = _PACKAGE / "lab" / "published"

#: Packed model of the page to play with.
PLAYGROUND = _PACKAGE / "playground" / "model.npz"


def find(name: str, folder: Path = CONFIGS) -> str:
    """Path of a shipped file for its name; anything else, and the name of a file here, is returned as it is.

    A folder here, such as the workdir of a run or a report that has a config's name, changes nothing.

    Args:
        name: ``NAME`` or ``NAME:ARGUMENT``, such as ``mixtral`` or ``mixtral_8x7b:v5p-128``; or a path.
        folder: :data:`CONFIGS` or :data:`SUITES`.
    """
    stem, colon, argument = name.partition(":")
    file = folder / f"{stem}.py"
    if not re.fullmatch(r"\w+", stem) or os.path.isfile(stem) or not file.exists():
        return name
    return f"{file}{colon}{argument}"


def short(path: str) -> str:
    """Name of a shipped config for its path; other paths as they are. The inverse of :func:`find`."""
    file, colon, argument = path.partition(":")
    return f"{Path(file).stem}{colon}{argument}" if Path(file).parent == CONFIGS else path


def is_config(path: str) -> bool:
    """Whether a path is that of a shipped config, by whichever name of the folder."""
    return Path(path).resolve().parent == CONFIGS.resolve()


def describe(folder: Path = CONFIGS) -> dict[str, str]:
    """First sentence of the docstring of every config or suite of a folder, by name."""
    found = {}
    for file in sorted(folder.glob("*.py")):
        text = file.read_text()
        if re.search(r"^(def )?get_(config|suite)\b", text, re.MULTILINE):
            found[file.stem] = " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())
    return found
