"""EasyDeL's MoE blocks with their experts, or each expert's matrices, over four fake devices."""

from __future__ import annotations

import importlib.metadata
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

from easydel_blocks import MIXTRAL, NORMALISED, QWEN, SOFTMAX, WIDTHS, easydel
from jax_blocks import main

#: XLA for processors has no ragged all-to-all, by which it exchanges tokens otherwise.
RING = {"use_ring_of_experts": True}
ROWS = {"read": "_sparse_call takes a slice whose length is traced"}
EXPERTS, TENSOR = (1, 1, 4, 1, 1), (1, 1, 1, 4, 1)
MIXTRAL_BLOCK = ("mixtral", "Mixtral", "MixtralSparseMoeBlock")
ADAPTERS = {
    "mixtral, ring of experts, 4 devices": easydel(
        *MIXTRAL_BLOCK, **MIXTRAL | {"settings": MIXTRAL["settings"] | RING}, axes=EXPERTS, skip=NORMALISED, **ROWS
    ),
    "mixtral, tensor parallel, 4 devices": easydel(*MIXTRAL_BLOCK, **MIXTRAL, axes=TENSOR, skip=NORMALISED),
    "qwen3_moe, ring of experts, 4 devices": easydel(*QWEN, WIDTHS | RING, axes=EXPERTS, skip=SOFTMAX, **ROWS),
    "qwen3_moe, tensor parallel, 4 devices": easydel(*QWEN, WIDTHS, axes=TENSOR, skip=SOFTMAX),
}

if __name__ == "__main__":
    main(f"EasyDeL {importlib.metadata.version('easydel')}", ADAPTERS)
