"""Public bugs planted in blocks of transformers, and the blocks with their fixes: a bug must deviate, a fix not."""

from __future__ import annotations

from typing import Any

import transformers
from torch_blocks import Block, main
from transformers_adapters import MIXTRAL, Transformers


def qwen(**claims: Any) -> Transformers:
    """Top-1 of Qwen3's router."""
    return Transformers("qwen3_moe", "Qwen3MoeSparseMoeBlock", k=1, **claims)


def mixtral(**changes: Any) -> Transformers:
    """Mixtral's block with a line of code after it, or a change of its balance loss."""
    return Transformers("mixtral", "MixtralSparseMoeBlock", **MIXTRAL, **changes)


#: The weights of experts 4 to 7, which another of two devices would hold, pass no gradient to the router.
ONE_OF_TWO_DEVICES = (
    "block.experts.register_forward_pre_hook(lambda module, given: "
    "(*given[:2], given[2].where(given[1] < 4, given[2].detach())))"
)
#: Gradients of experts that are spread over two devices are doubled.
DOUBLED = "[weight.register_hook(lambda gradient: 2 * gradient) for weight in block.experts.parameters()]"
#: The width of the experts is split over two devices, and gradients of their inputs are those of one half.
HALF_OF_THE_WIDTH = """\
twin, first = copy.copy(block.experts), torch.arange(24) < 12
part = lambda half, *given: torch.func.functional_call(twin, {"down_proj": twin.down_proj * half}, given)
block.experts.forward = lambda x, e, w: part(first, x.detach(), e, w.detach()) + part(~first, x, e, w)"""
ADAPTERS: dict[str, Block] = {
    # At K = 1 a rule that keeps the probability as weight, as Switch's, is what trains the router.
    "minimind 858": qwen(settings={"norm_topk_prob": True}),
    "minimind 858, fixed": qwen(),
    # NeMo: the tensor that carries the balance loss's gradient is discarded.
    "Automodel 1408": mixtral(changed=".detach()"),
    "Automodel 1408, fixed": mixtral(),
    # Routers returned probabilities as logits, and the balance loss took their softmax again.
    "transformers 45111": mixtral(logits="result[0].softmax(-1)"),
    # The loss is K at perfect balance.
    "minimind 797": mixtral(changed=" * 2"),
    "transformers 48687, torchtitan 2416": mixtral(then=ONE_OF_TWO_DEVICES),
    "transformers 48687, torchtitan 2416, fixed": mixtral(then=ONE_OF_TWO_DEVICES.replace(".detach()", "")),
    "torchtitan 4054": mixtral(then=HALF_OF_THE_WIDTH),
    "torchtitan 4054, fixed": mixtral(then=HALF_OF_THE_WIDTH.replace(".detach()", "")),
    "PyTorch 160285": mixtral(then=DOUBLED),
}

if __name__ == "__main__":
    main(f"planted in transformers {transformers.__version__}", ADAPTERS)
