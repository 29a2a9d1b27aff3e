"""Entry points as `python main.py ...` runs them, but in this process."""

import contextlib
import io
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from absl import flags

from moe.programs import cli

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """Exit code and output of a program."""

    code: int
    output: str
    errors: str


def run_here(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Ended:
    """Run ``python script arguments`` in this process; ``script`` is relative to the repository."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
    monkeypatch.chdir(ROOT)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    assert cli  # its flag is defined once, at import; those of an entry point are removed afterwards
    known = set(flags.FLAGS)
    for name in [name for name in sys.modules if name.startswith("moe.programs.")]:
        del sys.modules[name]  # defines its flags again
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):  # what the interpreter would print
            return Ended(1, output.getvalue(), errors.getvalue() + end.code)
        return Ended(int(end.code or 0), output.getvalue(), errors.getvalue())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return Ended(0, output.getvalue(), errors.getvalue())
