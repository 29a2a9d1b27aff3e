"""Adapters of the forms that MoE blocks of transformers have: where their weights are, and what to watch."""

from __future__ import annotations

import dataclasses
from typing import Any

import stacked_experts
import torch
from torch import nn
from torch_blocks import NUM_EXPERTS
from transformers_models import Balanced, Made

#: Claims of a softmax over the K highest logits.
MIXTRAL = {"rule": {"renormalise": True}}


@dataclasses.dataclass
class Transformers(Balanced):
    """A block with a router and stacked experts, whose ``layout`` is one of stacked_experts.

    ``after``: the routing scale multiplies the sum of the experts' outputs instead of the weights.
    """

    _: dataclasses.KW_ONLY
    layout: str = "stacked"
    after: bool = False

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """Shared experts get zeros, so that y is the routed experts' sum."""
        parameters, buffers = dict(block.named_parameters()), dict(block.named_buffers())
        for name, value in parameters.items():
            if "shared" in name:
                value.zero_()
        parameters[self.router].copy_(arrays["router"].T)
        stacked_experts.load(block, self.layout, arrays)
        for name, value in (parameters | buffers).items():
            if self.bias and "bias" in name and value.numel() == NUM_EXPERTS:
                value.copy_(arrays["bias"].reshape(value.shape))

    def gradients(self) -> dict[str, str]:
        """Gradients of the router and of the experts."""
        experts = stacked_experts.gradients(self.layout, biases=self.biases)
        return {"grad_router": f"block.{self.router}.grad.mT"} | experts

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Record what the experts receive."""

        def applied(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            _, index, weights = (*arguments, *keywords.values())[:3]
            scale = self.rule.get("scale", index.shape[-1]) if self.after else 1
            seen["expert_index"], seen["combine_weights"] = index, weights * scale

        block.experts.register_forward_pre_hook(applied, with_kwargs=True)


class Llama4(Transformers):
    """Llama 4's router returns scores of all experts, 0 where an expert is not chosen."""

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """The scores that are not 0."""

        def routed(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            seen["combine_weights"], seen["expert_index"] = result[0].topk(module.top_k)

        block.router.register_forward_hook(routed)


class Jet(Balanced):
    """JetMoE's two stacks of linear layers."""

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """Its output bias gets zeros."""
        block.bias.zero_()
        block.router.layer.weight.copy_(arrays["router"].T)
        block.input_linear.weight.copy_(torch.cat((arrays["gate"], arrays["up"]), -1).mT)
        block.output_linear.weight.copy_(arrays["down"].mT)

    def gradients(self) -> dict[str, str]:
        """Gradients of both stacks."""
        both = "block.input_linear.weight.grad.mT.chunk(2, -1)"
        found = {"grad_gate": f"{both}[0]", "grad_up": f"{both}[1]", "grad_down": "block.output_linear.weight.grad.mT"}
        return found | {"grad_router": "block.router.layer.weight.grad.mT"}

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Nothing: choices are sorted by expert inside the block."""


class Separate(Made):
    """A block with one module for each expert, without a gate: Switch and NLLB.

    Their balance losses are computed by the model, from what the router keeps.
    """

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """Biases get zeros."""
        block.router.classifier.weight.copy_(arrays["router"].T)
        for number in range(NUM_EXPERTS):
            first, second = self._pair(block, number)
            first.weight.copy_(arrays["up"][number].T)
            second.weight.copy_(arrays["down"][number].T)
            for linear in (first, second):
                if linear.bias is not None:
                    linear.bias.zero_()

    def _pair(self, block: nn.Module, number: int) -> tuple[nn.Linear, nn.Linear]:
        found = [module for module in block.experts[f"expert_{number}"].modules() if isinstance(module, nn.Linear)]
        return found[0], found[1]

    def gradients(self) -> dict[str, str]:
        """0 for an expert that no token reached."""
        first, second = ("wi", "wo") if self.model == "switch_transformers" else ("fc1", "fc2")
        layers = "(e.{}.weight for name, e in block.experts.items() if name.startswith('expert'))"
        stack = f"torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in {layers}]).mT"
        found = {"grad_up": stack.format(first), "grad_down": stack.format(second)}
        return found | {"grad_router": "block.router.classifier.weight.grad.mT"}

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Nothing: drops are inside the router."""
