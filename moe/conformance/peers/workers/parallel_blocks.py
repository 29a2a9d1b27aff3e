"""Blocks of transformers under its own tensor and expert parallelism, in two gloo processes that see all tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import nn
from torch_blocks import Block, main
from transformers_adapters import MIXTRAL, Transformers

#: A model of one layer.
ONE = {"num_hidden_layers": 1, "vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
ONE |= {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 1}
#: from_pretrained, given the weights of the model.
SPREAD = """
from transformers.distributed import DistributedConfig
spread = {"distributed_config": DistributedConfig(PLAN), "experts_implementation": "IMPLEMENTATION"}
block = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), **spread).model.layers[0].mlp
"""


@dataclasses.dataclass
class Parallel(Transformers):
    """The block of a model that from_pretrained spreads; ``plan``: arguments of DistributedConfig."""

    _: dataclasses.KW_ONLY
    plan: dict[str, Any]
    implementation: str = "batched_mm"
    processes: int = 2
    splits: bool = False

    def __post_init__(self) -> None:
        """Choices are those of one process's experts, and balance losses those of the model."""
        self.settings = ONE | self.settings
        plan = ", ".join(f"{name}={value!r}" for name, value in self.plan.items())
        self.spread_code = SPREAD.replace("IMPLEMENTATION", self.implementation).replace("PLAN", plan)
        self.skip = {"precision": "choices are not recorded"}

    def code(self, k: int) -> str:
        """The model, then its block."""
        model = self.name.replace("SparseMoeBlock", "ForCausalLM")
        lines = f"model = modeling_{self.model}.{model}(config)\nblock = model.model.layers[0].mlp"
        config = super().code(k).rsplit("\n", 1)[0]
        return f"{config}\n{lines}"

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Nothing: a process sees the choices of its own experts."""


OLMOE = ("olmoe", "OlmoeSparseMoeBlock")
TENSOR = {"tp_size": 2, "tp_plan": "auto"}
EXPERT = {"tp_size": 2, "enable_expert_parallel": True}
ADAPTERS: dict[str, Block] = {
    f"{name}, {how} over 2 processes": Parallel(name, block, plan=plan, **rule)
    for how, plan in (("tensor parallel", TENSOR), ("experts", TENSOR | {"ep_size": 2}))
    for name, block, rule in (
        ("mixtral", "MixtralSparseMoeBlock", MIXTRAL),
        ("qwen3_moe", "Qwen3MoeSparseMoeBlock", MIXTRAL),
        ("olmoe", "OlmoeSparseMoeBlock", {}),
    )
}
#: Its issue 48687 is in 5.17 and mended in 5.18.
CONTROLS: dict[str, Block] = {
    f"olmoe, {implementation}, experts over 2 processes": Parallel(*OLMOE, plan=EXPERT, implementation=implementation)
    for implementation in ("batched_mm", "grouped_mm")
}

if __name__ == "__main__":
    old = transformers.__version__ in ("5.17.0", "5.18.0")
    main(f"transformers {transformers.__version__}", CONTROLS if old else ADAPTERS)
