"""The diagnosis of the transformers library's blocks: they conform, and planted bugs are named."""

import numpy as np
import pytest

from moe.conformance.judge import evidence
from moe.conformance.judge.checking import check
from moe.conformance.judge.diagnosis import diagnose, page
from moe.conformance.judge.rule import Rule
from moe.conformance.judge.torch_recorder import record

pytestmark = pytest.mark.transformers

RULE = Rule(k=2, renormalise=True, balance_weight=10.0)
LAYER = evidence.random_layer(RULE, groups=2, tokens=12, d=8, f=6, num_experts=4)
E = LAYER.num_experts


def _block(name, **config):
    """A block of the library with the layer's weights."""
    import torch
    from transformers.models import mixtral, qwen3_moe

    sizes = {"hidden_size": 8, "num_experts_per_tok": config.pop("k", 2)}
    if name == "mixtral":
        kind = mixtral.modeling_mixtral.MixtralSparseMoeBlock
        settings = mixtral.MixtralConfig(**sizes, intermediate_size=6, num_local_experts=E, **config)
    else:
        kind = qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock
        settings = qwen3_moe.Qwen3MoeConfig(**sizes, moe_intermediate_size=6, num_experts=E, **config)
    settings._experts_implementation = "eager"
    block = kind(settings).double()
    gate, up, down = (torch.from_numpy(np.swapaxes(w, 1, 2)) for w in (LAYER.gate, LAYER.up, LAYER.down))
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(LAYER.router.T))
        block.experts.gate_up_proj.copy_(torch.cat([gate, up], dim=1))
        block.experts.down_proj.copy_(down)
    return block


def _record(block, *, balance=None):
    """Results of a block: output, balance loss and gradients.

    Args:
        block: of the library.
        balance: (logits [T,E], mask [T]) → balance loss, 1 at perfect balance; None: the library's over K.
    """
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    x = torch.from_numpy(LAYER.x).requires_grad_(True)
    mask = torch.from_numpy(LAYER.mask)
    logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), block.gate.weight)
    y = block(x)
    y = (y[0] if isinstance(y, tuple) else y) * mask[..., None]
    if balance is None:
        loss = load_balancing_loss_func((logits,), E, RULE.k, mask.double()) / RULE.k
    else:
        loss = balance(logits, mask.reshape(-1).double())
    ((y * torch.from_numpy(LAYER.cotangent)).sum() + RULE.balance_weight * loss).backward()
    up_gate = block.experts.gate_up_proj.grad.transpose(1, 2).chunk(2, dim=-1)
    found = {
        "y": y,
        "balance_loss": loss,
        "grad_x": x.grad,
        "grad_router": block.gate.weight.grad.T,
        "grad_gate": up_gate[0],
        "grad_up": up_gate[1],
        "grad_down": block.experts.down_proj.grad.transpose(1, 2),
    }
    return {name: value.detach().double().numpy() for name, value in found.items()}


def _diagnosis(results):
    return diagnose(RULE, LAYER, results, devices=(2, 4, 8))


def test_blocks_of_transformers_conform():
    results = _record(_block("mixtral"))
    found = _diagnosis(results)
    assert found.conforms, page(RULE, found)
    assert {check.quantity for check in found.checks} >= {"y", "balance_loss", "grad_router", "grad_x", "grad_down"}
    found = _diagnosis(_record(_block("qwen3", norm_topk_prob=True)))
    assert found.conforms, page(RULE, found)
    found = check(record(_block("mixtral").float()), "mixtral", k=RULE.k)
    assert {check.quantity for check in found.checks} >= {"y", "grad_router", "grad_x", "grad_gate", "grad_down"}


def _with_router(change):
    """A Mixtral block whose router's (logits, weights, index) are changed."""

    def run():
        block = _block("mixtral")
        forward = block.gate.forward
        block.gate.forward = lambda x: change(block, x, *forward(x))
        return _record(block)

    return run


def _with_gradient(factor):
    def run():
        block = _block("mixtral")
        for parameter in block.experts.parameters():
            parameter.register_hook(lambda gradient: factor * gradient)
        return _record(block)

    return run


def _rolled(block, x, logits, weights, index):
    return logits, weights, (index + 1) % E


def _detached_denominator(block, x, logits, weights, index):
    chosen = logits.softmax(-1).gather(-1, index)
    return logits, chosen / chosen.sum(-1, keepdim=True).detach(), index


def _sigmoid(block, x, logits, weights, index):
    chosen, index = logits.sigmoid().topk(RULE.k)
    return logits, chosen / chosen.sum(-1, keepdim=True), index


def _weighs_input():
    import torch

    block = _block("mixtral")
    forward = block.experts.forward

    def weighted(x, index, weights):
        parts = [forward(x * weights[:, [i]], index[:, [i]], torch.ones_like(weights[:, [i]])) for i in range(RULE.k)]
        return sum(parts)

    block.experts.forward = weighted
    return _record(block)


def _swapped():
    block = _block("mixtral")
    experts = block.experts
    experts.gate_up_proj.data = experts.gate_up_proj.data.roll(6, dims=1)
    results = _record(block)
    return results | {"grad_gate": results["grad_up"], "grad_up": results["grad_gate"]}


def _gelu():
    import torch

    block = _block("mixtral")
    block.experts.act_fn = torch.nn.GELU(approximate="tanh")
    return _record(block)


def _balance(*, first=False, padding=False, times=1.0, shards=1):
    """A balance loss with a bug: first choices only, padding counted, a factor, a mean over shards."""

    def loss(logits, mask):
        import torch

        probs, total = logits.softmax(-1), 0.0
        mask = torch.ones_like(mask) if padding else mask
        for part, real in zip(probs.chunk(shards), mask.chunk(shards), strict=True):
            index = part.topk(1 if first else RULE.k).indices
            chosen = torch.nn.functional.one_hot(index, E).sum(1) * real[:, None]
            total = total + E * (chosen.sum(0) / chosen.sum() * (part * real[:, None]).sum(0) / real.sum()).sum()
        return times * total / shards

    return lambda: _record(_block("mixtral"), balance=loss)


#: Bug → (results, words that name it).
MUTANTS = {
    "not renormalised": (
        lambda: _record(_block("qwen3", norm_topk_prob=False)),
        "softmax before the top-k without renormalising",
    ),
    "one expert too many": (lambda: _record(_block("mixtral", k=3)), "3 experts per token instead of 2"),
    "sigmoid": (_with_router(_sigmoid), "scores are sigmoid instead of softmax"),
    "experts off by one": (_with_router(_rolled), "expert e + 1 is applied where e was chosen"),
    "gate and up swapped": (_swapped, "gate and up projections are swapped"),
    "another activation": (_gelu, "the activation is geglu instead of swiglu"),
    "weights on the input": (_weighs_input, "the weight multiplies an expert's input"),
    "weights detached": (
        _with_router(lambda block, x, logits, weights, index: (logits, weights.detach(), index)),
        "the combine weights pass no gradient to the router",
    ),
    "denominator detached": (_with_router(_detached_denominator), "the denominator of the renormalisation"),
    "expert gradients divided by TP": (_with_gradient(0.25), "0.25 times the expected value = 1/E or 1/4 devices"),
    "expert gradients multiplied by EP": (_with_gradient(8.0), "8 times the expected value = 8 devices"),
    "balance loss times K": (_balance(times=RULE.k), "2 times the expected value = K"),
    "balance loss of first choices": (_balance(first=True), "counts first choices only"),
    "padding in the balance loss": (_balance(padding=True), "padding counts in the losses"),
    "balance loss a mean over devices": (_balance(shards=2), "a mean over 2 shards"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_named(name):
    results, words = MUTANTS[name]
    found = _diagnosis(results())
    assert not found.conforms
    assert words in page(RULE, found)
