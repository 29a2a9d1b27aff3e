"""scripts/gpu_report.py without a GPU: it refuses, and its dry run cannot be taken for a result."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import gpu_report

ROOT = Path(__file__).parents[1]


def _run(*flags):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "scripts/gpu_report.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def test_without_a_gpu_nothing_is_written():
    before = sorted((ROOT / "docs" / "results" / "gpu").iterdir())
    done = _run()
    assert done.returncode == 1
    assert done.stderr.startswith("error: gpu_report: needs a GPU")
    assert sorted((ROOT / "docs" / "results" / "gpu").iterdir()) == before


def test_a_section_that_fails_is_named_and_the_others_are_written(monkeypatch):
    def broken(sizes):
        yield "first line"
        raise AssertionError("a layer differs from the oracle")

    monkeypatch.setattr(gpu_report, "SECTIONS", {"One": broken, "Two": lambda sizes: iter(["fine"])})
    lines, failed = gpu_report.report(gpu_report.TINY, lambda text: None)
    assert failed == ["One"]
    assert lines[-5:] == ["**Failed**: AssertionError: a layer differs from the oracle", "", "## Two", "", "fine"]


@pytest.mark.slow
def test_a_dry_run_prints_a_page_without_numbers():
    before = sorted((ROOT / "docs" / "results" / "gpu").iterdir())
    done = _run("--dry", "--calls=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# DRY RUN of gpu_report: no result\n")
    assert not re.search(r"\d", done.stdout)
    for title in gpu_report.SECTIONS:
        assert f"## {title}" in done.stdout
    assert "FAIL" not in done.stdout
    assert sorted((ROOT / "docs" / "results" / "gpu").iterdir()) == before
