"""The diagnosis of torchtitan's layer: it conforms, and a planted bug is named."""

import numpy as np
import pytest

from moe.conformance.judge import evidence
from moe.conformance.judge.diagnosis import diagnose, page
from moe.conformance.judge.rule import Rule

pytestmark = pytest.mark.transformers

D, F, E = 8, 6, 4


def _layer(rule, layer, *, before=False):
    """torchtitan's layer with these weights, in double precision, with its loop over experts: its grouped products
    round to bfloat16. ``before``: the weights multiply the inputs of experts, as by default."""
    import torch
    from torchtitan.models.moe.moe import MoE, MoEArgs

    settings = MoEArgs(
        num_experts=E,
        num_shared_experts=0,
        top_k=rule.k,
        score_func=rule.score,
        route_norm=rule.renormalise,
        route_scale=rule.scale,
        score_before_experts=before,
        use_grouped_mm=False,
        load_balance_coeff=None,
    )
    block = MoE(settings, D, F).double()
    block.tokens_per_expert.zero_()
    with torch.no_grad():
        block.router.gate.weight.copy_(torch.from_numpy(layer.router.T))
        for name, matrices in (("w1", layer.gate), ("w3", layer.up), ("w2", layer.down)):
            getattr(block.experts, name).copy_(torch.from_numpy(np.swapaxes(matrices, 1, 2)))
    return block


def _record(block, layer, monkeypatch):
    """Output and gradients; the layer has no padding mask, and outputs of padding are ignored."""
    import torch

    # histc of integers has no kernel for processors.
    monkeypatch.setattr(torch, "histc", lambda x, bins, min, max: torch.bincount(x.reshape(-1), minlength=bins))
    x = torch.from_numpy(layer.x).requires_grad_(True)
    y = block(x) * torch.from_numpy(layer.mask)[..., None]
    (y * torch.from_numpy(layer.cotangent)).sum().backward()
    found = {
        "y": y,
        "grad_x": x.grad,
        "grad_router": block.router.gate.weight.grad.T,
        "grad_gate": block.experts.w1.grad.mT,
        "grad_up": block.experts.w3.grad.mT,
        "grad_down": block.experts.w2.grad.mT,
    }
    return {name: value.detach().double().numpy() for name, value in found.items()}


@pytest.mark.parametrize(
    "rule",
    [
        Rule(k=2, renormalise=True),
        Rule(k=1),
        Rule(k=3, score="sigmoid", renormalise=True, scale=2.5),
    ],
    ids=["mixtral", "top-1", "deepseek"],
)
def test_the_layer_conforms(rule, monkeypatch):
    layer = evidence.random_layer(rule, groups=2, tokens=12, d=D, f=F, num_experts=E)
    found = diagnose(rule, layer, _record(_layer(rule, layer), layer, monkeypatch), devices=(2, 4))
    assert found.conforms, page(rule, found)
    assert {check.quantity for check in found.checks} >= {"y", "grad_router", "grad_x", "grad_gate", "grad_down"}


def test_weights_applied_to_the_inputs_of_experts_are_named(monkeypatch):
    """The layer's own default, ``score_before_experts``."""
    rule = Rule(k=2, renormalise=True)
    layer = evidence.random_layer(rule, groups=2, tokens=12, d=D, f=F, num_experts=E)
    found = diagnose(rule, layer, _record(_layer(rule, layer, before=True), layer, monkeypatch), devices=(2, 4))
    assert not found.conforms
    assert "the weight multiplies an expert's input" in page(rule, found)
