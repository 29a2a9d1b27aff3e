"""PEFT's adapters of stacked experts, beside and merged into the experts of a block of transformers."""

from __future__ import annotations

import dataclasses

import peft
import torch
from torch import nn
from torch_blocks import Block, main
from transformers_adapters import MIXTRAL, Transformers


@dataclasses.dataclass
class Adapted(Transformers):
    """LoRA of both expert matrices, whose sum with the base's weights is the case's; ``merged``: into the base."""

    _: dataclasses.KW_ONLY
    merged: bool = False

    def code(self, k: int) -> str:
        """The block with adapters of rank 2."""
        names = ["experts.gate_up_proj", "experts.down_proj"]
        lines = f"import peft\nlora = peft.LoraConfig(r=2, lora_alpha=6, target_parameters={names})"
        return f"{super().code(k)}\n{lines}\nblock = peft.inject_adapter_in_model(lora, block)"

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """The base has the case's weights less the adapters' product."""
        wrappers = [module for module in block.modules() if isinstance(module, peft.tuners.lora.layer.ParamWrapper)]
        wrapped, block.experts = block.experts, wrappers[-1].base_layer
        super().load(block, arrays)
        block.experts = wrapped
        draw = torch.Generator().manual_seed(0)
        for wrapper in wrappers:
            for part in (wrapper.lora_A, wrapper.lora_B):
                weight = part["default"].weight
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.3)
            getattr(wrappers[-1].base_layer, wrapper.parameter_name).sub_(wrapper.get_delta_weight("default"))
        if self.merged:
            for wrapper in reversed(wrappers):
                wrapper.merge()
            for parameter in block.parameters():
                parameter.requires_grad_(True)
        dict(block.named_parameters())[self.router].requires_grad_(True)

    def gradients(self) -> dict[str, str]:
        """Gradients of the router, and of the experts where the adapters are merged."""
        found = super().gradients() if self.merged else {"grad_router": f"block.{self.router}.grad.mT"}
        return {
            name: text.replace("block.experts.", "block.experts.base_layer.base_layer.") for name, text in found.items()
        }


ADAPTERS: dict[str, Block] = {
    f"{model} experts, {name}": Adapted(model, block, **MIXTRAL, merged=merged)
    for model, block in (("mixtral", "MixtralSparseMoeBlock"), ("qwen3_moe", "Qwen3MoeSparseMoeBlock"))
    for name, merged in (("adapters", False), ("merged", True))
}

if __name__ == "__main__":
    main(f"PEFT {peft.__version__}", ADAPTERS)
