"""The code of docs/api.md, executed block by block in one namespace."""

import re
from pathlib import Path

import jax
import pytest

API = Path(__file__).parents[1] / "docs" / "api.md"


@pytest.mark.slow
def test_the_code_of_the_api_page_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", API.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names = {}
    for block in blocks:
        exec(compile(block, "api.md", "exec"), names)
    assert names["y"].shape == (8, 128, 512)  # the last one is the mesh's
    assert len(names["y"].sharding.device_set) == len(jax.devices()) == 8
    assert names["output"].logits.shape == (2, 64, 4096)
    writer = names["lines"](tmp_path, {}, 0)
    writer.write(1, "train", {"loss": 2.0})
    writer.write(1, "timing", {"mfu": 0.5})
    writer.close()
    assert (tmp_path / "loss.txt").read_text() == "1 2.0\n"
