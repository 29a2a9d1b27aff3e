"""Weights, input, output and gradients of an MoE block in PyTorch, as arrays that the judge reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

#: (block, get) → weights by name, of what ``get`` returns for a parameter: itself, or its gradient.
Weights = Callable[[Any, Callable[[Any], Any]], Mapping[str, Any]]
#: Names of gate, up and down projections of experts that are modules.
_MODULES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def weights_of(block: Any, get: Callable[[Any], Any]) -> dict[str, Any]:
    """Weights of the blocks of transformers: router [D,E], gate and up [E,D,F], down [E,F,D].

    Raises:
        TypeError: another layout; pass ``weights=`` to :func:`record`.
    """
    router, experts = getattr(block, "gate", None) or getattr(block, "router", None), getattr(block, "experts", None)
    if router is None or experts is None:
        raise TypeError(f"{type(block).__name__}: has no gate (or router) and experts; pass weights= to record")
    found = {"router": get(router.weight).T}
    if getattr(experts, "gate_up_proj", None) is not None:  # [E,2F,D] and [E,D,F] in one parameter each
        gate, up = get(experts.gate_up_proj).transpose(1, 2).chunk(2, -1)
        return found | {"gate": gate, "up": up, "down": get(experts.down_proj).transpose(1, 2)}
    for names in _MODULES:
        if all(hasattr(experts[0], name) for name in names):
            stacks = ([get(getattr(expert, name).weight).T for expert in experts] for name in names)
            return found | dict(zip(("gate", "up", "down"), (_stack(stack) for stack in stacks), strict=True))
    raise TypeError(f"{type(block).__name__}: experts of an unknown layout; pass weights= to record")


def _stack(tensors: list[Any]) -> Any:
    import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  # the caller's

    return torch.stack(tensors)


def record(
    block: Any, x: Any = None, *, weights: Weights = weights_of, cotangent: Any = None, dim: int = 0
) -> dict[str, np.ndarray]:
    """Run a block forward and backward; its parameters' gradients are set to None before and after.

    Args:
        block: module whose call returns y [B,T,D], or a tuple that begins with it.
        x: input [B,T,D]; None: 2 rows of 16 random tokens.
        weights: its weights by name; default: :func:`weights_of`.
        cotangent: gradient of the loss by y; None: random.
        dim: D of the random input; 0: that of the router.
    """
    import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  # the caller's

    own = weights(block, lambda parameter: parameter)
    like = next(iter(own.values()))
    draw = {"dtype": like.dtype, "device": like.device}
    generator = torch.Generator().manual_seed(0)
    if x is None:
        x = torch.randn(2, 16, dim or own["router"].shape[0], generator=generator).to(**draw)
    x = x.detach().clone().requires_grad_(True)
    block.zero_grad(set_to_none=True)
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    if cotangent is None:
        cotangent = torch.randn(y.shape, generator=generator).to(**draw)
    (y * cotangent).sum().backward()

    def gradient(parameter: Any) -> Any:  # None where no gradient arrives, as in an expert without tokens
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    arrays = {"x": x, "y": y, "cotangent": cotangent, "grad_x": gradient(x)} | dict(own)
    arrays |= {f"grad_{name}": array for name, array in weights(block, gradient).items()}
    recorded = {name: array.detach().float().cpu().numpy().copy() for name, array in arrays.items()}
    block.zero_grad(set_to_none=True)
    return recorded
