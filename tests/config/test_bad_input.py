"""Refusal of wrong input: a nonzero exit code, one sentence naming the field and the allowed values, no files left.

A case executes an entry point as `python main.py ...` does, but in this process; a few use a process of their own.
`python -m pytest tests/config/test_bad_input.py -s` prints the number of cases.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe.config import Config, ConfigError, to_dict
from moe.config.parse import from_config_dict
from moe.data import pipeline
from moe.interop import import_checkpoint
from tests.bad_input_cases import CASES, SLOW_CASES
from tests.bad_input_helpers import Case, value
from tests.helpers import slow_case
from tests.program_helpers import ROOT, run_here
from tests.tiny_text import build

OPEN = Path(__file__).parents[1] / "data" / "checkpoints" / "mixtral"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared text, with the tokenizer that TINY asks for."""
    folder = build(tmp_path_factory.mktemp("data"))
    tree = to_dict(Config())
    tree["data"] |= {"dataset": "tiny_text/split", "directory": str(folder), "sequence_length": 16}
    pipeline.prepare(from_config_dict(tree).data, 400, progress=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("imported") / "run"
    import_checkpoint(OPEN, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.copy(next((data / "tokenizers").iterdir()), folder / "tokenizer.model")
    return folder


def tree_of(*folders: Path) -> dict[str, bytes | None]:
    """All folders and files in these, except the bytecode that Python keeps beside a user's module."""
    paths = (path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def without_stages(errors: str) -> str:
    """Lines of stderr without those that report the progress of a start or what it waits for."""
    told = r"\[ *\d+\.\d s\] |waiting for "
    return "".join(line for line in errors.splitlines(keepends=True) if not re.match(told, line))


def prepare(case: Case, folder: Path, data: Path, imported: Path) -> list[str]:
    """Fill the case's folder and return its arguments."""
    text = " ".join(case.arguments)
    if "{run}" in text:
        shutil.copytree(imported, folder / "run")
    if "{open}" in text:
        shutil.copytree(OPEN, folder / "open")
    if case.break_it:
        case.break_it(folder)
    places = {"new": folder, "data": data, "run": folder / "run", "open": folder / "open"}
    return [argument.format(**places) for argument in case.arguments]


@pytest.mark.parametrize(
    "case", [*CASES, *map(slow_case, SLOW_CASES)], ids=lambda case: f"{case.script} {' '.join(case.arguments[-1:])}"
)
def test_wrong_input_is_refused_in_one_sentence(case, data, imported, tmp_path, monkeypatch):
    arguments = prepare(case, tmp_path, data, imported)
    before = tree_of(tmp_path, data)
    code, _, errors = run_here(case.script, arguments, monkeypatch)
    assert code != 0, "accepted"
    errors = without_stages(errors)
    for word in case.says:
        assert word in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert tree_of(tmp_path, data) == before


def test_an_error_is_raised_with_traceback(data, imported, tmp_path, monkeypatch):
    case = value("model.moe.num_experts", "0", "at least 1")
    with pytest.raises(ConfigError, match="at least 1"):
        run_here(case.script, [*prepare(case, tmp_path, data, imported), "--traceback"], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "traceback"),
    [
        (value("model.moe.num_experts", "0", "at least 1"), False),
        (value("model.moe.num_experts", "0", "at least 1"), True),
        (value("data.dataset", "/nowhere/at/all", "no such folder"), False),
    ],
)
def test_wrong_input_is_refused_in_a_separate_process(case, data, imported, tmp_path, traceback):
    arguments = prepare(case, tmp_path, data, imported)
    result = subprocess.run(
        [sys.executable, str(ROOT / case.script), *arguments, *(["--traceback"] if traceback else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert not list(tmp_path.iterdir())
    assert ("Traceback" in result.stderr) == traceback
    for word in case.says:
        assert word in result.stderr
    if not traceback:
        errors = without_stages(result.stderr)
        assert errors.startswith("error: ")
        assert len(errors.strip().splitlines()) == 1


def test_there_are_at_least_80_different_cases():
    print(f"\n{len(CASES)} wrong inputs")
    assert len(set(CASES)) == len(CASES) >= 80
