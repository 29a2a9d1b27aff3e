"""Public bugs planted in blocks of transformers, and the blocks with their fixes: a bug must deviate, a fix not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import nn
from torch_blocks import Block, main
from transformers_blocks import MIXTRAL, Transformers


@dataclasses.dataclass
class Detached(Transformers):
    """NeMo Automodel 1408: the tensor that carries the balance loss's gradient is discarded."""

    def balance(self, router_logits: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
        """The loss without its gradient."""
        return super().balance(router_logits, mask, k).detach()


@dataclasses.dataclass
class DoubleSoftmax(Transformers):
    """transformers 45111: routers returned probabilities as logits, and the balance loss took their softmax again."""

    def balance(self, router_logits: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
        """The loss of the probabilities."""
        return super().balance(router_logits.softmax(-1), mask, k)


@dataclasses.dataclass
class PerChoice(Transformers):
    """minimind 797 and this project's own table of factors: the loss is K at perfect balance."""

    def balance(self, router_logits: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
        """The loss times K."""
        return super().balance(router_logits, mask, k) * k


@dataclasses.dataclass
class OneRank(Transformers):
    """transformers 48687, torchtitan 2416: the router's gradient is that of the experts of one of two devices."""

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Gradients of the weights of experts 4 to 7 are lost."""
        super().watch(block, seen)

        def local(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x, index, weights = arguments
            mine = (index < 4).to(weights.dtype)
            return x, index, weights * mine + (weights * (1 - mine)).detach()

        block.experts.register_forward_pre_hook(local)


@dataclasses.dataclass
class ScaledExperts(Transformers):
    """PyTorch 160285: gradients of experts that are spread over two devices are doubled."""

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Twice the gradient."""
        super().watch(block, seen)
        for parameter in block.experts.parameters():
            parameter.register_hook(lambda gradient: 2 * gradient)


QWEN = ("qwen3_moe", "Qwen3MoeSparseMoeBlock")
MIX = ("mixtral", "MixtralSparseMoeBlock")
ADAPTERS: dict[str, Block] = {
    # At K = 1 a rule that keeps the probability as weight, as Switch's, is what trains the router.
    "minimind 858": Transformers(*QWEN, k=1, settings={"norm_topk_prob": True}),
    "minimind 858, fixed": Transformers(*QWEN, k=1),
    "Automodel 1408": Detached(*MIX, **MIXTRAL),
    "Automodel 1408, fixed": Transformers(*MIX, **MIXTRAL),
    "transformers 45111": DoubleSoftmax(*MIX, **MIXTRAL),
    "minimind 797": PerChoice(*MIX, **MIXTRAL),
    "transformers 48687, torchtitan 2416": OneRank(*MIX, **MIXTRAL),
    "PyTorch 160285": ScaledExperts(*MIX, **MIXTRAL),
}

if __name__ == "__main__":
    main(f"planted in transformers {transformers.__version__}", ADAPTERS)
