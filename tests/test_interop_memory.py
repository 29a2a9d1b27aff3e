"""Memory of importing layers of Mixtral-8x7B's size: one tensor at a time, never the model."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe.checkpoints.workdir import read_config
from moe.interop.config_json import read_config as read_open_config
from moe.interop.families import FAMILIES
from moe.interop.layout import layout

LIMIT = 6 * 1024**3  # bytes
CONFIG = {
    **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096},
    **{"intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-05, "rope_theta": 1e6},
    **{"max_position_embeddings": 32768, "torch_dtype": "bfloat16"},
}


def _write_checkpoint(folder: Path, num_files: int) -> int:
    """A sharded bfloat16 checkpoint of noise; returns its bytes."""
    # Without the highest bits of sign and exponent: numbers from 0 to 2, all finite.
    noise = np.random.default_rng(0).integers(0, 1 << 14, 1 << 24, np.uint16).tobytes()
    tensors = {
        piece.name: parameter.file_shape
        for parameter in layout(read_open_config(CONFIG).model, FAMILIES["mixtral"])
        for piece in parameter.pieces
    }
    weight_map, total, names = {}, 0, list(tensors)
    for number in range(num_files):
        header, offset = {}, 0
        for name in names[number::num_files]:
            size = 2 * int(np.prod(tensors[name]))
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = f"model-{number}.safetensors"
        text = json.dumps(header).encode()
        with open(folder / f"model-{number}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, offset, len(noise)):
                file.write(noise[: offset - start])
        total += offset
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return total


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_layers_of_mixtral_8x7b_under_6_gib(tmp_path):
    (tmp_path / "source").mkdir()
    written = _write_checkpoint(tmp_path / "source", num_files=4)
    assert written > 6e9
    script = Path(__file__).parents[1] / "scripts" / "import_hf.py"
    command = [sys.executable, str(script), f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    assert process.returncode == 0
    assert "3,1" in output  # 3.1 billion parameters
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak {peak / 1024**3:.2f} GiB for {written / 1024**3:.2f} GiB of weights")
    assert peak < LIMIT
    assert read_config(tmp_path / "out").model.num_layers == 2
    stored = sum(os.path.getsize(path) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert stored > 0.5 * written
