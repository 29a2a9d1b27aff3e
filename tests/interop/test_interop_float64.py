"""Layers of gated DeltaNet on rows of three chunks, against transformers' code with every float32 replaced by float64.

Random wide weights amplify rounding: with each weight rounded once more (by 2⁻²⁵ of it, three draws) the float64 logits
move by 0.5e-5 to 4.9e-5 of the largest, and transformers' own float32 logits are 3.0e-5 (Qwen3-Next) and 2.7e-5
(Qwen3.5) from them. Ours are 8.1e-5 and 1.9e-5 at most, and 2.0e-6 and 0.7e-6 in the root mean square.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe.interop import load_huggingface
from tests.interop.test_interop import HERE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe_text"])
def test_long_rows_against_float64(name):
    with np.load(HERE.parent / "float64" / f"{name}.npz") as file:
        tokens, expected = file["input_ids"].astype(np.int32), file["logits"].astype(np.float64)
    model, _ = load_huggingface(HERE / name)
    logits = np.asarray(jax.jit(lambda tokens: model(tokens).logits)(tokens), np.float64)
    error = np.abs(logits - expected) / np.abs(expected).max()
    assert np.sqrt(np.mean(error**2)) < 5e-6
    assert np.quantile(error, 0.99) < 2e-5
    assert error.max() < 2e-4
