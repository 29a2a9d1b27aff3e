"""The diagnosis of torchtitan's layer: it conforms, and a planted bug is named."""

import numpy as np
import pytest

from moe.conformance import evidence
from moe.conformance.diagnosis import diagnose, page
from moe.conformance.rule import Rule

pytestmark = pytest.mark.transformers

D, F, E = 8, 6, 4


def _layer(rule, layer):
    """torchtitan's layer with these weights, in double precision: its experts would round to bfloat16."""
    torch = pytest.importorskip("torch")
    common = pytest.importorskip("torchtitan.models.common.moe")
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    class Experts(common.GroupedExperts):
        def _grouped_mm(self, *, A, B_t, offs):
            parts = torch.tensor_split(A, offs[:-1].long())
            return torch.cat([rows @ matrix for rows, matrix in zip(parts, B_t, strict=True)])

    config = common.MoE.Config(
        num_experts=E,
        routed_experts=common.RoutedExperts.Config(
            inner_experts=common.GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=rule.k),
        ),
        router=common.TokenChoiceTopKRouter.Config(
            num_experts=E,
            gate=Linear.Config(in_features=D, out_features=E),
            top_k=rule.k,
            score_func=rule.score,
            route_norm=rule.renormalise,
            route_scale=rule.scale,
        ),
        load_balance_coeff=None,
    )
    block = common.MoE(config).double()
    experts = block.routed_experts.inner_experts
    experts.__class__ = Experts
    gate, up, down = (torch.from_numpy(np.swapaxes(w, 1, 2)) for w in (layer.gate, layer.up, layer.down))
    with torch.no_grad():
        block.router.gate.weight.copy_(torch.from_numpy(layer.router.T))
        experts.w1_EFD.copy_(gate)
        experts.w3_EFD.copy_(up)
        experts.w2_EDF.copy_(down)
    return block


def _record(block, layer, monkeypatch):
    """Output and gradients; the layer has no padding mask, and outputs of padding are ignored."""
    import torch

    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    x = torch.from_numpy(layer.x).requires_grad_(True)
    y = block(x) * torch.from_numpy(layer.mask)[..., None]
    (y * torch.from_numpy(layer.cotangent)).sum().backward()
    experts = block.routed_experts.inner_experts
    found = {
        "y": y,
        "grad_x": x.grad,
        "grad_router": block.router.gate.weight.grad.T,
        "grad_gate": experts.w1_EFD.grad.transpose(1, 2),
        "grad_up": experts.w3_EFD.grad.transpose(1, 2),
        "grad_down": experts.w2_EDF.grad.transpose(1, 2),
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
    """A mutant: what torchtitan did with ``score_before_experts``."""
    import torch

    rule = Rule(k=2, renormalise=True)
    layer = evidence.random_layer(rule, groups=2, tokens=12, d=D, f=F, num_experts=E)
    block = _layer(rule, layer)
    reorder = block.routed_experts.token_dispatcher._local_reorder

    def weighted(*arguments):
        rows, places, scores = reorder(*arguments)
        return rows * scores[:, None], places, torch.ones_like(scores)

    block.routed_experts.token_dispatcher._local_reorder = weighted
    found = diagnose(rule, layer, _record(block, layer, monkeypatch), devices=(2, 4))
    assert not found.conforms
    assert "the weight multiplies an expert's input" in page(rule, found)
