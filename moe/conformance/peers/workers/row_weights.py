"""Experts as megablocks and OLMo-core have them: matrices stored as rows [E·F,D], and kernels that move rows."""

from __future__ import annotations

import torch
from torch import nn
from torch_blocks import NUM_EXPERTS, D, F

#: Moves of rows by PyTorch's indexing, which stand in for both libraries' kernels.
MOVES = """
def gather(x, indices, bin_ids, bins, top_k):
    return x[indices.long() // top_k]
def scatter(x, indices, bin_ids, weights, bins, top_k):
    y = torch.zeros_like(x).index_copy(0, indices.long(), x)
    return y if weights is None else (y.view(-1, top_k, x.shape[-1]) * weights.view(-1, top_k, 1)).sum(1)
"""


def load(mlp: nn.Module, names: dict[str, str], arrays: dict[str, torch.Tensor]) -> None:
    """Write gate, up [E,D,F] and down [E,F,D] into the matrices of these names."""
    for name, theirs in names.items():
        getattr(mlp, theirs).copy_((arrays[name] if name == "down" else arrays[name].mT).reshape(-1, D))


def gradients(names: dict[str, str]) -> dict[str, str]:
    """Expressions of the gradients in ``block``, in the layout of the case."""
    found = {f"grad_{name}": f"block.experts.mlp.{theirs}.grad" for name, theirs in names.items()}
    found = {name: f"{text}.reshape({NUM_EXPERTS}, {F}, {D})" for name, text in found.items()}
    return {name: text if name == "grad_down" else f"{text}.mT" for name, text in found.items()}
