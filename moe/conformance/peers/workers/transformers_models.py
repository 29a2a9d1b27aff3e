"""Blocks of transformers made from their models' configs with this project's sizes, and their models' balance loss."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from typing import Any

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


def _module(model: str, kind: str) -> Any:
    return importlib.import_module(f"transformers.models.{model}.{kind}_{model}")


def _config(model: str, block: str, name: str) -> type:
    """The config class of this name; default: of the longest name that the block's name begins with."""
    classes = dict(inspect.getmembers(_module(model, "configuration"), inspect.isclass))
    names = [other for other in classes if other.endswith("Config") and block.startswith(other[:-6])]
    return classes[name or max(names, key=len)]


def _known(rule: dict[str, Any], k: int) -> dict[str, Any]:
    """Fields that configs may have, by their names, for a rule and this project's sizes."""
    values = {name: size for size, names in SIZES.items() for name in names} | dict.fromkeys(K, k)
    values |= dict.fromkeys(SCALE, rule.get("scale", 1.0)) | dict.fromkeys(ACTIVATION, "silu")
    values |= {"norm_topk_prob": rule.get("renormalise", False)}
    return values | {"n_group": rule.get("groups", 1), "topk_group": rule.get("kept_groups", 1)}


@dataclasses.dataclass
class Made(Block):
    """A block that is made from a config.

    Attributes:
        model: folder of transformers.models.
        name: class.
        config: class of the config, where its name does not say it.
        settings: fields of the config besides sizes and what the rule says.
        arguments: further arguments of the class.
        then: line of code after the block is made.
        router: name of the router's matrix.
    """

    model: str
    name: str
    _: dataclasses.KW_ONLY
    config: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    arguments: str = ""
    then: str = ""
    router: str = "gate.weight"

    def given(self, k: int) -> str:
        """Fields of the config."""
        made = _config(self.model, self.name, self.config)()
        values = {name: value for name, value in _known(self.rule, k).items() if hasattr(made, name)}
        return json.dumps(values | self.settings | {"_experts_implementation": "eager"})

    def code(self, k: int) -> str:
        """The config, then the block."""
        config = _config(self.model, self.name, self.config).__name__
        return f"""from transformers.models.{self.model} import configuration_{self.model}, modeling_{self.model}
config = configuration_{self.model}.{config}()
config.update(json.loads(str(given["settings"])))
block = modeling_{self.model}.{self.name}(config{self.arguments})
{self.then}""".rstrip()


@dataclasses.dataclass
class Balanced(Made):
    """A block whose model has load_balancing_loss_func.

    Attributes:
        logits: expression of the router's logits in its ``result``.
        changed: text after the balance loss, which changes it.
    """

    _: dataclasses.KW_ONLY
    logits: str = "result[0] if isinstance(result, tuple) else result"
    changed: str = ""

    def __post_init__(self) -> None:
        self.has_balance = hasattr(_module(self.model, "modeling"), "load_balancing_loss_func")

    def losses(self, k: int) -> str:
        """load_balancing_loss_func, which is K at perfect balance, over K."""
        router = f"block.{self.router.split('.')[0]}"
        logits = f"{router}.logits.reshape(-1, {NUM_EXPERTS})"
        loss = f"modeling_{self.model}.load_balancing_loss_func(({logits},), {NUM_EXPERTS}, {k}, mask.float())"
        return (
            f"{router}.register_forward_hook(lambda module, given, result: setattr(module, 'logits', {self.logits}))\n"
            f"balance_loss = lambda mask: ({loss} / {k}){self.changed}"
        )
