"""The tutorial: its committed outputs, and its cells executed in order."""

from __future__ import annotations

import os
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def test_the_committed_notebook_was_run_once_from_top_to_bottom():
    """Every cell that prints has its output, from one run from top to bottom; the notebook is valid, as Colab
    requires."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    for cell in cells:
        if "print(" in cell.source.replace("print(result.stderr)", ""):
            assert any(output.output_type == "stream" for output in cell.outputs)
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/markdown"} <= kinds
    assert NOTEBOOK.stat().st_size < 250_000
    assert "/tmp/" not in str(outputs)  # a machine's own paths


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_cell_runs(tmp_path, monkeypatch):
    for name, value in {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = [_text(cell) for cell in notebook.cells[:7]]
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    assert [_text(cell) for cell in notebook.cells[:7]] == committed  # the layer, its routing: seeded
    assert list(tmp_path.glob("*/tutorial.png"))
    assert os.listdir(next(tmp_path.glob("*/analysis")))


def _text(cell: nbformat.NotebookNode) -> list[str]:
    return [output.text for output in cell.get("outputs", []) if output.output_type == "stream"]
