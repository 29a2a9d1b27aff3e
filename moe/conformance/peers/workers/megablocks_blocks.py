"""megablocks' dropless layer with grouped products, alone and with its experts over four gloo processes.

PyTorch's loops and indexing stand in for its CUDA kernels.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

import row_weights
import torch
from torch import nn
from torch_blocks import NUM_EXPERTS, Block, D, F, main

IMPORTS = """
import sys, types
import torch
for name in ("megablocks_ops", "grouped_gemm"):
    sys.modules[name] = types.SimpleNamespace(ops=types.SimpleNamespace(), backend=None)
from megablocks import grouped_gemm_util, ops
from megablocks.layers import arguments, dmoe
"""
PRODUCTS = """\
def gmm(x, weights, sizes, trans_b=False):
    parts = zip(x.split(sizes.tolist()), weights)
    return torch.cat([part @ (weight.mT if trans_b else weight) for part, weight in parts])
grouped_gemm_util.ops.gmm, ops.gather, ops.scatter, ops.inclusive_cumsum = gmm, gather, scatter, torch.cumsum
ops.sort = lambda x, end_bit: torch.sort(x, stable=True)
ops.histogram = lambda x, size: torch.bincount(x, minlength=size)
ops.replicate = lambda x, bins, size: x.repeat_interleave(bins.diff(prepend=bins.new_zeros(1)), 1)
"""
STANDS_IN = f"{IMPORTS.rstrip()}{row_weights.MOVES}{PRODUCTS}"
LOSSES = """
from megablocks.layers import router
router.clear_router_zloss()
block.router.register_forward_hook(lambda module, given, result: setattr(module, "scores", result[0]))
z_loss = lambda mask: router.batched_router_zloss(block.experts.args).sum()
def balance_loss(mask):
    chosen = block.router.scores.topk(block.experts.args.moe_top_k).indices.flatten()
    return block.experts.load_balancing_loss(torch.bincount(chosen, minlength=8), block.router.scores)
"""
#: Names of the experts' matrices.
NAMES = {"gate": "w1", "up": "v1", "down": "w2"}


@dataclasses.dataclass
class Megablocks(Block):
    """megablocks.layers.dmoe.dMoE."""

    has_balance: bool = True
    has_z: bool = True

    def code(self, k: int) -> str:
        """Arguments, then the layer."""
        settings = {"hidden_size": D, "ffn_hidden_size": F, "moe_num_experts": NUM_EXPERTS, "moe_top_k": k}
        settings |= {"moe_normalize_expert_weights": 1 if self.rule.get("renormalise") else None}
        settings |= {"mlp_type": "glu", "mlp_impl": "grouped", "bias": False, "fp16": False, "device": "cpu"}
        settings |= {"moe_zloss_weight": 1.0}
        return (
            f"{STANDS_IN}block = dmoe.dMoE(arguments.Arguments(activation_fn=torch.nn.functional.silu, **{settings}))"
        )

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """The router, then the three stacks."""
        block.router.layer.weight.copy_(arrays["router"].T)
        row_weights.load(block.experts.mlp, NAMES, arrays)

    def gradients(self) -> dict[str, str]:
        """Gradients of the router and of the three stacks."""
        return row_weights.gradients(NAMES) | {"grad_router": "block.router.layer.weight.grad.mT"}

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """The router's results."""

        def routed(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            _, seen["combine_weights"], seen["expert_index"] = result

        block.router.register_forward_hook(routed)

    def losses(self, k: int) -> str:
        """ParallelMLP.load_balancing_loss and router.batched_router_zloss, of all tokens: they have no mask."""
        return LOSSES


@dataclasses.dataclass
class SpreadMegablocks(Megablocks):
    """Two of eight experts in each of four processes, by moe_expert_model_parallelism."""

    has_balance: bool = False
    has_z: bool = False
    processes: int = 4
    spread_code: str = """
import dataclasses
from torch.distributed.tensor import Shard, distribute_tensor
settings = {"moe_expert_model_parallelism": True, "expert_parallel_group": torch.distributed.group.WORLD}
whole, block = block, dmoe.dMoE(dataclasses.replace(block.experts.args, **settings)).eval()
block.router, mesh = whole.router, torch.distributed.init_device_mesh("cpu", (4,))
for name, weight in whole.experts.mlp.named_parameters():
    part = distribute_tensor(weight.data, mesh, [Shard(0)])
    setattr(block.experts.mlp, name, torch.nn.Parameter(part))
"""

    def gradients(self) -> dict[str, str]:
        """Sums over the processes' losses; the library scales the experts' as the mean (MLP.gradient_scale)."""
        found = super().gradients()
        return {name: text if name == "grad_router" else f"{self.processes} * {text}" for name, text in found.items()}


NO_MASK = {"documented": {"balance_padding": True}, "source": "both losses take no mask: all tokens count"}
ADAPTERS: dict[str, Block] = {
    "dMoE": Megablocks(**NO_MASK),
    "dMoE, normalised": Megablocks(rule={"renormalise": True}, **NO_MASK),
    "dMoE, experts over 4 processes": SpreadMegablocks(),
    "dMoE, normalised, experts over 4 processes": SpreadMegablocks(rule={"renormalise": True}),
}

if __name__ == "__main__":
    main(f"megablocks {importlib.metadata.version('megablocks')}", ADAPTERS)
