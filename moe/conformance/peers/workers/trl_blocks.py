"""The balance loss that TRL's trainers add to theirs, of a model whose one MoE layer is Mixtral's of transformers."""

from __future__ import annotations

import dataclasses

import torch
import trl
from torch import nn
from torch_blocks import Block, main
from transformers_adapters import MIXTRAL, Transformers

TRAINER = """
import tempfile, tokenizers, transformers, trl
from datasets import Dataset
words = tokenizers.models.WordLevel({str(word): word for word in range(8)}, unk_token="0")
words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="0", eos_token="1")
model = modeling_mixtral.MixtralForCausalLM(config)
settings = {"output_dir": tempfile.mkdtemp(), "router_aux_loss_coef": 1.0, "use_cpu": True, "bf16": False}
data = Dataset.from_dict({"prompt": ["1 2"], "completion": ["3"], "chosen": ["3"], "rejected": ["4"]})
data = data.remove_columns(UNUSED)
trainer = trl.NAMETrainer(model, args=trl.NAMEConfig(report_to="none", **settings), MORE
    train_dataset=data, processing_class=words)
block = trainer.model.model.layers[0].mlp
"""
#: Difference between the trainer's loss with and without its term, where the layer's input is the case's.
LOSS = """
def first(module, given):
    module.x = getattr(module, "x", given[0])
    return (module.x,)
block.register_forward_pre_hook(first)
def balance_loss(mask):
    ids = torch.arange(mask.numel()).reshape(mask.shape) % 8
    inputs = {"input_ids": ids, "attention_mask": mask.long()} | BATCH
    found = []
    for trainer.aux_loss_enabled in (True, False):
        found.append(trainer.compute_loss(trainer.model, dict(inputs)))
    return (found[0] - found[1]) / K
"""


@dataclasses.dataclass
class Trl(Transformers):
    """A ``trainer``: ``unused`` columns of the data, ``more`` arguments, its ``batch``."""

    trainer: str
    unused: tuple[str, ...] = ()
    more: str = ""
    batch: str = ""

    def code(self, k: int) -> str:
        """The model of one layer, and its trainer."""
        made = super().code(k).rsplit("\n", 1)[0]  # the config; the block is the model's
        trainer = TRAINER.replace("NAME", self.trainer).replace("UNUSED", str(list(self.unused)))
        return made + trainer.replace("MORE", self.more)

    def losses(self, k: int) -> str:
        """router_aux_loss_coef's term of compute_loss."""
        return LOSS.replace("BATCH", self.batch).replace("/ K", f"/ {k}")

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Nothing: the block is transformers'."""


SIZES = {"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
SKIP = dict.fromkeys(("main", "one", "empty", "ties", "parts", "precision"), "the block is transformers'")
CLAIMS = {"settings": SIZES | {"attn_implementation": "eager"}, "skip": SKIP, **MIXTRAL}
PAIRS = '{"completion_mask": mask.long(), "ref_chosen_logps": torch.zeros(2), "ref_rejected_logps": torch.zeros(2)}'
BLOCK = ("mixtral", "MixtralSparseMoeBlock")
ADAPTERS: dict[str, Block] = {
    "SFTTrainer": Trl(*BLOCK, trainer="SFT", unused=("chosen", "rejected"), batch='{"labels": ids}', **CLAIMS),
    "DPOTrainer": Trl(
        *BLOCK, trainer="DPO", unused=("completion",), more="ref_model=type(model)(config),", batch=PAIRS, **CLAIMS
    ),
}

if __name__ == "__main__":
    main(f"TRL {trl.__version__}", ADAPTERS)
