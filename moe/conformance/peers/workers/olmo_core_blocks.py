"""OLMo-core's dropless MoE layer, alone and with its experts spread over four gloo processes.

PyTorch's indexing stands in for its Triton kernels that move rows.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import row_weights
import torch
from torch import nn
from torch_blocks import NUM_EXPERTS, Block, D, F, main

IMPORTS = "from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType, parallel_mlp"
STANDS_IN = f"{IMPORTS}{row_weights.MOVES}parallel_mlp.ops.gather, parallel_mlp.ops.scatter = gather, scatter\n"
#: Both losses, of all tokens: they have no mask.
LOSSES = """
from olmo_core.nn.moe import loss
block.router.register_forward_hook(lambda module, given, result: setattr(module, "x", given[0]))
z_loss = lambda mask: loss.router_z_loss(expert_logits=block.router.get_expert_logits(block.router.x))
def balance_loss(mask):
    scores = torch.softmax(block.router.get_expert_logits(block.router.x), -1)
    counts = torch.nn.functional.one_hot(scores.topk(block.router.top_k).indices, 8).sum((1, 2))
    sizes = {"num_experts": 8, "top_k": block.router.top_k, "expert_scores": scores}
    sizes |= {"batch_size_per_expert": counts.sum(0), "batched_batch_size_per_expert": counts}
    return loss.load_balancing_loss(**sizes, granularity=loss.MoELoadBalancingLossGranularity.local_batch)
"""
#: Names of the experts' matrices.
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclasses.dataclass
class Olmo(Block):
    """olmo_core.nn.moe.DroplessMoE."""

    has_balance: bool = True
    has_z: bool = True

    def code(self, k: int) -> str:
        """MoEConfig, then the layer."""
        router = {"top_k": k, "gating_function": self.rule.get("score", "softmax")}
        router |= {"normalize_expert_weights": 1.0 if self.rule.get("renormalise") else None}
        router |= {"bias_gamma": 0.001 if self.bias else None}
        layer = {"num_experts": NUM_EXPERTS, "hidden_size": F}
        made = f"MoEConfig(name=MoEType.dropless, router=MoERouterConfig(**{router}), **{layer}).build({D}, n_layers=1)"
        return f"{STANDS_IN}block = {made}"

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """The router, then the three stacks."""
        block.router.weight.copy_(arrays["router"].T.reshape(block.router.weight.shape))
        row_weights.load(block.experts.mlp, NAMES, arrays)
        if self.bias:
            block.router.score_bias.copy_(arrays["bias"])

    def gradients(self) -> dict[str, str]:
        """Gradients of the router and of the three stacks."""
        router = f"block.router.weight.grad.reshape({NUM_EXPERTS}, {D}).mT"
        return row_weights.gradients(NAMES) | {"grad_router": router}

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """The router's results, where its tokens are those of ``x``."""

        def routed(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            seen["combine_weights"], seen["expert_index"] = (array.flatten(0, 1) for array in result[:2])

        if self.splits:
            block.router.register_forward_hook(routed)

    def losses(self, k: int) -> str:
        """olmo_core.nn.moe.loss."""
        return LOSSES


@dataclasses.dataclass
class SpreadOlmo(Olmo):
    """Two of eight experts in each of four processes, by apply_ep, or by apply_tp, where choices are of parts."""

    has_balance: bool = False
    has_z: bool = False
    processes: int = 4
    spread_code: str = """
mesh = torch.distributed.init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
block.apply_ep(mesh)
"""


#: Its tensor parallelism: processes have parts of the sequence, and of the experts.
TENSOR = """
mesh, whole = torch.distributed.init_device_mesh("cpu", (4,)), torch.distributed.tensor.Replicate()
block.apply_tp(mesh, input_layout=whole, output_layout=whole)
"""
SHARES: dict[str, Any] = {"splits": False, "spread_code": TENSOR, "skip": {"precision": "choices are not recorded"}}
READ = "MoELinearRouter's weight, alike in all processes, has in each the gradient of its part of the sequence alone"
NO_MASK = {"documented": {"balance_padding": True}, "source": "both losses take no mask: all tokens count"}
ADAPTERS: dict[str, Block] = {
    "softmax": Olmo(**NO_MASK),
    "softmax, normalised": Olmo(rule={"renormalise": True}, **NO_MASK),
    "sigmoid, bias": Olmo(rule={"score": "sigmoid"}, bias=True, has_balance=False, **NO_MASK),
    "softmax, experts over 4 processes": SpreadOlmo(),
    "sigmoid, bias, experts over 4 processes": SpreadOlmo(rule={"score": "sigmoid"}, bias=True),
    "softmax, tensor parallel over 4 processes": SpreadOlmo(read=READ, **SHARES),
}

if __name__ == "__main__":
    main(f"OLMo-core {importlib.metadata.version('ai2-olmo-core')}", ADAPTERS)
