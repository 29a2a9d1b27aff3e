"""Configs and suites that are installed: moe configs lists them, moe configs NAME prints one to copy and change.

A name stands wherever a file does: moe train --config=quickstart, moe ablate --suite=capacity_factor. An argument
follows a colon: moe train --config=mixtral_8x7b:v5p-128.
"""

import difflib
import sys
import textwrap
from pathlib import Path

from moe.programs.help_text import without_flags
from moe.system import process, shipped

_EXAMPLES = ("moe configs", "moe configs mixtral > mine.py", "moe train --config=mine.py --workdir=/tmp/mine")


def run() -> None:
    """The program."""
    with process.closed_output_exits():
        _show(sys.argv[1:])
        sys.stdout.flush()


def _show(arguments: list[str]) -> None:
    if {"--help", "-h"} & {*arguments}:
        print(
            without_flags(__doc__ or "", [("NAME", "Of a config or a suite; without it, all are listed.")], _EXAMPLES)
        )
        return
    if arguments == ["--names"]:  # for completion
        print(" ".join([*shipped.describe(shipped.CONFIGS), *shipped.describe(shipped.SUITES)]))
        return
    if len(arguments) > 1:
        sys.exit("error: moe configs takes one name; --help shows examples")
    if arguments:
        print(_file(arguments[0]).read_text(), end="")
        return
    for heading, folder in (("configs (--config=NAME)", shipped.CONFIGS), ("suites (--suite=NAME)", shipped.SUITES)):
        print(f"{heading}, in {folder}")
        for name, sentence in shipped.describe(folder).items():
            print(f"  {name:<26}{textwrap.shorten(sentence, 92, placeholder=' …')}")
        print()


def _file(name: str) -> Path:
    """File of a config or a suite. Exits where there is none of that name."""
    names = {found: folder for folder in (shipped.SUITES, shipped.CONFIGS) for found in shipped.describe(folder)}
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        sys.exit(f"error: no config or suite {name!r}{f'; did you mean {near[0]}?' if near else ''}")
    return names[name] / f"{name}.py"
