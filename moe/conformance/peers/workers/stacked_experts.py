"""Experts as transformers has them: stacks, with gate and up in one array.

Layouts: "stacked" [E,2F,D] and [E,D,F]; "transposed" [E,D,2F] and [E,F,D]; "interleaved", the same with gate and up in
turn; "plain", stacked without a gate.
"""

from __future__ import annotations

import torch
from torch import nn


def _joined(layout: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.stack((gate, up), -1).flatten(-2) if layout == "interleaved" else torch.cat((gate, up), -1)


def load(block: nn.Module, layout: str, arrays: dict[str, torch.Tensor]) -> None:
    """Write gate, up [E,D,F] and down [E,F,D], and the biases of all products where a case has them."""
    experts, turned = block.experts, layout in ("transposed", "interleaved")
    if layout == "plain":
        experts.up_proj.copy_(arrays["up"].mT)
    else:
        both = _joined(layout, arrays["gate"], arrays["up"])
        experts.gate_up_proj.copy_(both if turned else both.mT)
    experts.down_proj.copy_(arrays["down"] if turned else arrays["down"].mT)
    if "down_bias" in arrays:
        experts.gate_up_proj_bias.copy_(_joined(layout, arrays["gate_bias"], arrays["up_bias"]))
        experts.down_proj_bias.copy_(arrays["down_bias"])
        block.router.bias.copy_(arrays["router_bias"])


def gradients(layout: str, *, biases: bool) -> dict[str, str]:
    """Expressions of the gradients in ``block``, in the layout of the case."""
    turn = ".mT" if layout in ("stacked", "plain") else ""
    found = {"grad_down": f"block.experts.down_proj.grad{turn}"}
    if layout == "plain":
        return found | {"grad_up": f"block.experts.up_proj.grad{turn}"}
    for number, name in enumerate(("gate", "up")):
        half = f"[..., {number}::2]" if layout == "interleaved" else f".chunk(2, -1)[{number}]"
        found[f"grad_{name}"] = f"block.experts.gate_up_proj.grad{turn}{half}"
        if biases:
            found[f"grad_{name}_bias"] = f"block.experts.gate_up_proj_bias.grad{half}"
    if biases:
        found |= {"grad_router_bias": "block.router.bias.grad"}
        found |= {"grad_down_bias": "block.experts.down_proj_bias.grad"}
    return found
