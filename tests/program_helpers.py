"""Entry points as `python main.py ...` runs them, but in this process."""

import contextlib
import io
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from absl import flags

from moe import programs

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """Exit code and output of a program."""

    code: int
    output: str
    errors: str


def run_here(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Ended:
    """Run ``python script arguments`` in this process; ``script`` is relative to the repository, or ``moe COMMAND``."""
    program, *command = script.split()
    path = ROOT / ("moe/__main__.py" if command else script)
    monkeypatch.setattr(sys, "argv", [program, *command, *arguments])
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
    monkeypatch.chdir(ROOT)
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), _handlers(), _programs():
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):  # what the interpreter would print
            return Ended(1, output.getvalue(), errors.getvalue() + end.code)
        return Ended(int(end.code or 0), output.getvalue(), errors.getvalue())
    return Ended(0, output.getvalue(), errors.getvalue())


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    """Signal handlers as before."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _programs() -> Iterator[None]:
    """Programs are imported again and define their flags, which those of programs imported before do not meet."""
    modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("moe.programs.")}
    attributes = {
        name: programs.__dict__.pop(name) for name in list(programs.__dict__) if f"moe.programs.{name}" in modules
    }
    kept = {name: (flags.FLAGS[name], module) for name, module in _defining().items() if _is_own(module, modules)}
    for name in kept:
        delattr(flags.FLAGS, name)
    others = set(flags.FLAGS)
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - others:
            delattr(flags.FLAGS, name)
        for flag, module in kept.values():
            flags.DEFINE_flag(flag, flags.FLAGS, module)
        flags.FLAGS.unparse_flags()
        sys.modules.update(modules)
        programs.__dict__.update(attributes)


def _defining() -> dict[str, str]:
    """Module that defines each flag."""
    return {flag.name: name for name, defined in flags.FLAGS.flags_by_module_dict().items() for flag in defined}


def _is_own(module: str, imported: dict[str, object]) -> bool:
    """Whether a module is a program, or a script, whose name is its path or that of the test which imported it."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return module in imported or file is None or "site-packages" not in file
