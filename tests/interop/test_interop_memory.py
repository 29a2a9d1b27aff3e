"""Memory of importing layers of published sizes: one tensor at a time, never the model."""

from __future__ import annotations

import json
import os
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
#: DeepSeek-V3 as published, but for the number of layers: one dense, one MoE.
DEEPSEEK_V3 = {
    **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280},
    **{"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 2},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 1},
    **{"max_position_embeddings": 163840, "torch_dtype": "bfloat16", "num_nextn_predict_layers": 0},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}


def _write_checkpoint(folder: Path, num_files: int) -> int:
    """Write a sharded bfloat16 checkpoint of noise and return its size in bytes."""
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


def _peak(folder: Path, parameters: str, *flags: str) -> int:
    """Peak memory in bytes of importing folder/source; checks that the output contains the number of parameters."""
    command = [
        sys.executable,
        "-m",
        "moe",
        "import",
        f"--source={folder / 'source'}",
        f"--out={folder / 'out'}",
        *flags,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as lines:
        output = lines.read()
    _, status, usage = os.wait4(process.pid, 0)  # of this child process only
    assert status == 0
    assert parameters in output
    assert read_config(folder / "out").model.num_layers == 2
    peak = usage.ru_maxrss * 1024
    print(f"peak {peak / 1024**3:.2f} GiB")
    return peak


def _write_fp8(folder: Path) -> int:
    """Write a checkpoint of zeros as a sparse file, which takes no disk space; return its apparent size in bytes."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for parameter in layout(read_open_config(DEEPSEEK_V3).model, FAMILIES["deepseek_v3"]):
        shape = parameter.file_shape
        for piece in parameter.pieces:
            quantised = "_proj" in piece.name
            tensors[piece.name] = ("F8_E4M3" if quantised else "F32" if parameter.selection_bias else "BF16", shape)
            if quantised:
                tensors[f"{piece.name}_scale_inv"] = ("F32", tuple(-(-size // 128) for size in shape))
    header, offset = {}, 0
    for name, (kind, shape) in tensors.items():
        size = {"F8_E4M3": 1, "BF16": 2, "F32": 4}[kind] * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    return offset


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_layers_of_deepseek_v3_in_fp8_under_6_gib(tmp_path):
    """13.1 billion parameters; the largest tensors are the embedding and the unembedding, 1.73 GiB each in bfloat16."""
    (tmp_path / "source").mkdir()
    assert _write_fp8(tmp_path / "source") > 15e9
    assert _peak(tmp_path, "13,", "--dtype=bfloat16") < LIMIT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_layers_of_mixtral_8x7b_under_6_gib(tmp_path):
    (tmp_path / "source").mkdir()
    written = _write_checkpoint(tmp_path / "source", num_files=4)
    assert written > 6e9
    assert _peak(tmp_path, "3,1") < LIMIT  # 3.1 billion parameters
    stored = sum(os.path.getsize(path) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert stored > 0.5 * written
