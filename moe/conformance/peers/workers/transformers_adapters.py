"""Adapters of the forms that MoE blocks of transformers have."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from typing import Any

import torch
from torch import nn
from torch_blocks import NUM_EXPERTS, Block, D, F

#: Names that configs have for E, D and F, for K, for the routing scale, for the activation.
SIZES = {
    NUM_EXPERTS: ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    D: ("hidden_size",),
    F: ("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"),
}
K = ("num_experts_per_tok", "moe_topk", "moe_top_k")
SCALE = (
    "routed_scaling_factor",
    "route_scale",
    "router_scaling_factor",
    "moe_routed_scaling_factor",
    "moe_router_scaling_factor",
)
ACTIVATION = ("hidden_act", "activation_function", "mlp_hidden_act")
#: Claims of a softmax over the K highest logits.
MIXTRAL = {"rule": {"renormalise": True}}


@dataclasses.dataclass
class Transformers(Block):
    """A block with a router and stacked experts.

    Attributes:
        model: folder of transformers.models.
        name: class.
        router: name of the router's matrix.
        layout: of the experts: "stacked" [E,2F,D]; "transposed" [E,D,2F]; "interleaved", the same with gate and up in
            turn; "plain", without a gate.
        config: class of the config; default: of the longest name that the block's name begins with.
        settings: fields of the config besides sizes and what the rule says.
        arguments: further arguments of the class.
        after: the routing scale multiplies the sum of the experts' outputs instead of the weights.
        then: line of code after the block is made.
        logits: expression of the router's logits in its ``result``.
        changed: text after the balance loss, which changes it.
    """

    model: str
    name: str
    _: dataclasses.KW_ONLY
    router: str = "gate.weight"
    layout: str = "stacked"
    config: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    arguments: str = ""
    after: bool = False
    then: str = ""
    logits: str = "result[0] if isinstance(result, tuple) else result"
    changed: str = ""

    def __post_init__(self) -> None:
        self.has_balance = hasattr(self._module("modeling"), "load_balancing_loss_func")

    def _module(self, kind: str) -> Any:
        return importlib.import_module(f"transformers.models.{self.model}.{kind}_{self.model}")

    def _config(self) -> type:
        classes = dict(inspect.getmembers(self._module("configuration"), inspect.isclass))
        names = [name for name in classes if name.endswith("Config") and self.name.startswith(name[:-6])]
        return classes[self.config or max(names, key=len)]

    def given(self, k: int) -> str:
        """Fields of the config with this project's sizes."""
        values = {name: size for size, names in SIZES.items() for name in names} | dict.fromkeys(K, k)
        values |= dict.fromkeys(SCALE, self.rule.get("scale", 1.0)) | dict.fromkeys(ACTIVATION, "silu")
        values |= {"norm_topk_prob": self.rule.get("renormalise", False)}
        values |= {"n_group": self.rule.get("groups", 1), "topk_group": self.rule.get("kept_groups", 1)}
        made = self._config()()
        values = {name: value for name, value in values.items() if hasattr(made, name)} | self.settings
        return json.dumps(values | {"_experts_implementation": "eager"})

    def code(self, k: int) -> str:
        """The config, then the block."""
        lines = [
            f"from transformers.models.{self.model} import configuration_{self.model}, modeling_{self.model}",
            f"config = configuration_{self.model}.{self._config().__name__}()",
            'config.update(json.loads(str(given["settings"])))',
            f"block = modeling_{self.model}.{self.name}(config{self.arguments})",
        ]
        return "\n".join([*lines, self.then] if self.then else lines)

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """Shared experts get zeros, so that y is the routed experts' sum."""
        for name, value in block.named_parameters():
            if "shared" in name:
                value.zero_()
        dict(block.named_parameters())[self.router].copy_(arrays["router"].T)
        experts, turned = block.experts, self.layout in ("transposed", "interleaved")
        if self.layout == "plain":
            experts.up_proj.copy_(arrays["up"].mT)
        else:
            both = self._joined(arrays["gate"], arrays["up"])
            experts.gate_up_proj.copy_(both if turned else both.mT)
        experts.down_proj.copy_(arrays["down"] if turned else arrays["down"].mT)
        if self.biases:
            experts.gate_up_proj_bias.copy_(self._joined(arrays["gate_bias"], arrays["up_bias"]))
            experts.down_proj_bias.copy_(arrays["down_bias"])
            block.router.bias.copy_(arrays["router_bias"])
        for name, value in (*block.named_parameters(), *block.named_buffers()):
            if self.bias and "bias" in name and value.numel() == NUM_EXPERTS:
                value.copy_(arrays["bias"].reshape(value.shape))

    def _joined(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.stack((gate, up), -1).flatten(-2) if self.layout == "interleaved" else torch.cat((gate, up), -1)

    def gradients(self) -> dict[str, str]:
        """Gradients of the router and of the experts."""
        turn = ".mT" if self.layout in ("stacked", "plain") else ""
        down = f"block.experts.down_proj.grad{turn}"
        found = {"grad_router": f"block.{self.router}.grad.mT", "grad_down": down}
        if self.layout == "plain":
            return found | {"grad_up": f"block.experts.up_proj.grad{turn}"}
        for number, name in enumerate(("gate", "up")):
            half = f"[..., {number}::2]" if self.layout == "interleaved" else f".chunk(2, -1)[{number}]"
            found[f"grad_{name}"] = f"block.experts.gate_up_proj.grad{turn}{half}"
            if self.biases:
                found[f"grad_{name}_bias"] = f"block.experts.gate_up_proj_bias.grad{half}"
        if self.biases:
            found |= {"grad_router_bias": "block.router.bias.grad"}
            found |= {"grad_down_bias": "block.experts.down_proj_bias.grad"}
        return found

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Record what the experts receive."""

        def applied(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            _, index, weights = (*arguments, *keywords.values())[:3]
            scale = self.rule.get("scale", index.shape[-1]) if self.after else 1
            seen["expert_index"], seen["combine_weights"] = index, weights * scale

        block.experts.register_forward_pre_hook(applied, with_kwargs=True)

    def losses(self, k: int) -> str:
        """load_balancing_loss_func, which is K at perfect balance, over K."""
        router = f"block.{self.router.split('.')[0]}"
        logits = f"{router}.logits.reshape(-1, {NUM_EXPERTS})"
        loss = f"modeling_{self.model}.load_balancing_loss_func(({logits},), {NUM_EXPERTS}, {k}, mask.float())"
        return (
            f"{router}.register_forward_hook(lambda module, given, result: setattr(module, 'logits', {self.logits}))\n"
            f"balance_loss = lambda mask: ({loss} / {k}){self.changed}"
        )


class Llama4(Transformers):
    """Llama 4's router returns scores of all experts, 0 where an expert is not chosen."""

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """The scores that are not 0."""

        def routed(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            seen["combine_weights"], seen["expert_index"] = result[0].topk(module.top_k)

        block.router.register_forward_hook(routed)


class Jet(Transformers):
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


class Separate(Transformers):
    """A block with one module for each expert, without a gate: Switch and NLLB."""

    def __post_init__(self) -> None:
        """Their balance losses are computed by the model, from what the router keeps."""

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
