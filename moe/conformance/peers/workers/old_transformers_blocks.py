"""Blocks of a release of transformers before the fix of its issue 45111: the balance loss took a softmax twice."""

from __future__ import annotations

import transformers
from torch_blocks import main
from transformers_adapters import MIXTRAL, Transformers

ADAPTERS = {
    "mixtral": Transformers("mixtral", "MixtralSparseMoeBlock", **MIXTRAL),
    "qwen3_moe": Transformers("qwen3_moe", "Qwen3MoeSparseMoeBlock", **MIXTRAL),
    "olmoe": Transformers("olmoe", "OlmoeSparseMoeBlock"),
}

if __name__ == "__main__":
    main(f"transformers {transformers.__version__}", ADAPTERS)
