"""torchtitan's MoE layer in four of its settings, and over four gloo processes: its experts, or its matrices."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from typing import Any

import torch
import torch.distributed.tensor.parallel
from torch import distributed, nn
from torch_blocks import NUM_EXPERTS, Block, D, F, main
from torchtitan.distributed import expert_parallel
from torchtitan.models.moe import kernels, utils

#: PyTorch's histc of integers has no CPU kernel.
COUNTS = """from torchtitan.models.moe.moe import MoE, MoEArgs
torch.histc = lambda x, bins, min, max: torch.bincount(x.view(-1), minlength=bins)
"""


@dataclasses.dataclass
class Titan(Block):
    """torchtitan.models.moe.MoE with its loop over experts; ``before``: score_before_experts."""

    before: bool = False

    def code(self, k: int) -> str:
        """MoEArgs, then the layer."""
        rule = self.rule
        settings = {"num_experts": NUM_EXPERTS, "num_shared_experts": 0, "top_k": k, "use_grouped_mm": False}
        settings |= {"score_func": rule.get("score", "softmax"), "route_norm": rule.get("renormalise", False)}
        settings |= {"route_scale": rule.get("scale", 1.0), "score_before_experts": self.before}
        if "groups" in rule:
            settings |= {"num_expert_groups": rule["groups"], "num_limited_groups": rule["kept_groups"]}
        settings |= {"load_balance_coeff": 1e-3 if self.bias else None}
        return f"{COUNTS}block = MoE(MoEArgs(**{settings}), {D}, {F})"

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """w1 is the gate, w3 the up projection, w2 the down projection."""
        block.tokens_per_expert.zero_()
        block.router.gate.weight.copy_(arrays["router"].T)
        for name, source in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            getattr(block.experts, name).copy_(arrays[source].mT)
        if self.bias:
            block.expert_bias.copy_(arrays["bias"])

    def gradients(self) -> dict[str, str]:
        """Gradients of the router and of the three stacks."""
        names = {"gate": "w1", "up": "w3", "down": "w2"}
        found = {f"grad_{name}": f"block.experts.{weight}.grad.mT" for name, weight in names.items()}
        return found | {"grad_router": "block.router.gate.weight.grad.mT"}

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """The router's results."""

        def routed(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            seen["combine_weights"], seen["expert_index"] = result[:2]

        block.router.register_forward_hook(routed)


@dataclasses.dataclass
class SpreadTitan(Titan):
    """Two of eight experts in each of four processes, by torchtitan.distributed.expert_parallel.ExpertParallel."""

    processes: int = 4

    def spread(self, scope: dict[str, Any]) -> nn.Module:
        """The plan of apply_moe_ep_tp for experts alone; rows are sorted by the form of its kernel for processors."""
        mesh = distributed.init_device_mesh("cpu", (self.processes,), mesh_dim_names=("ep",))
        utils.generate_permute_indices = functools.partial(kernels.generate_permute_indices, use_cpu=True)
        plan = expert_parallel.ExpertParallel()
        distributed.tensor.parallel.parallelize_module(scope["block"].experts, mesh, plan)
        return scope["block"]


#: The plan of its models, whose layers take and return parts of the sequence; here every process has all of it.
TENSOR = """
from torchtitan.models.llama4.infra.parallelize import apply_moe_ep_tp
mesh, layer = torch.distributed.init_device_mesh("cpu", (4,)), torch.nn.ModuleDict({"moe": block})
layer.moe_enabled, layer.layers = True, {"0": layer}
apply_moe_ep_tp(layer, mesh, None, None, None)
local, split = torch.distributed.tensor.DTensor.from_local, [torch.distributed.tensor.Shard(1)]
block.register_forward_pre_hook(lambda _, x: (local(x[0], mesh).redistribute(mesh, split),), prepend=True)
block.register_forward_hook(lambda _, x, y: local(y, mesh, split).full_tensor())
"""
SHARES: dict[str, Any] = {"processes": 4, "splits": False, "spread_code": TENSOR}
READ = "gradients of scores, and by them of tokens, are those of a process's share of the width (its pull request 2416)"
V3 = {"score": "sigmoid", "renormalise": True, "scale": 2.5, "groups": 4, "kept_groups": 3, "scores_per_group": 2}
ADAPTERS: dict[str, Block] = {
    "softmax, normalised": Titan(rule={"renormalise": True}),
    "softmax": Titan(),
    "deepseek_v3": Titan(rule=V3, bias=True),
    "softmax, experts over 4 processes": SpreadTitan(rule={"renormalise": True}),
    "deepseek_v3, experts over 4 processes": SpreadTitan(rule=V3, bias=True),
    "softmax, tensor parallel over 4 processes": Titan(rule={"renormalise": True}, read=READ, **SHARES),
    "deepseek_v3, tensor parallel over 4 processes": Titan(rule=V3, bias=True, read=READ, **SHARES),
    "default (llama4)": Titan(
        rule={"score": "sigmoid"},
        before=True,
        documented={"weighs_input": True},
        source="MoEArgs.score_before_experts multiplies an expert's input by its score",
    ),
}

if __name__ == "__main__":
    main(f"torchtitan {importlib.metadata.version('torchtitan')}", ADAPTERS)
