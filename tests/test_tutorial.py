"""The tutorial's cells, executed in order."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_cell_runs(tmp_path):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    program = tmp_path / "tutorial.py"
    program.write_text("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    root = str(NOTEBOOK.parents[1])
    environment = os.environ | {"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path), "PYTHONPATH": root}
    environment.pop("XLA_FLAGS", None)  # one device
    result = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "load-balancing loss" in result.stdout
    assert list(tmp_path.glob("*/tutorial.png"))
