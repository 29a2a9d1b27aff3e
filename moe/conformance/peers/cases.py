"""Weights and inputs on which blocks of other libraries are compared with the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from moe.conformance.judge import evidence
from moe.conformance.judge.rule import GATED, Layer, Rule

#: E, D, F of every case.
NUM_EXPERTS = 8
D = 16
F = 24
#: Weight of the balance loss in what is differentiated.
BALANCE_WEIGHT = 10.0
#: Weight of the z-loss in what is differentiated.
Z_WEIGHT = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One check of a block.

    Attributes:
        name: of the file and the column.
        what: what it shows.
        change: layer → the layer of this case.
        k: K; None: the block's.
        parts: microbatches whose gradients are added.
        balance: the balance loss is differentiated too.
        z: the z-loss is differentiated too.
        dtype: of the block.
        forward_only: nothing is differentiated.
        tokens: S.
        quantities: compared; empty: all that are recorded.
    """

    name: str
    what: str
    change: Callable[[Layer], Layer] = lambda layer: layer
    k: int | None = None
    parts: int = 1
    balance: bool = False
    z: bool = False
    dtype: str = "float32"
    forward_only: bool = False
    tokens: int = 16
    quantities: tuple[str, ...] = ()


def _empty(layer: Layer) -> Layer:
    """No token chooses expert 3: its logit is 30 lower for every token."""
    x, router = layer.x.copy(), np.array(layer.router)
    x[..., 0], router[0] = 1.0, np.where(np.arange(NUM_EXPERTS) == 3, -30.0, router[0])
    bias = None if layer.bias is None else np.where(np.arange(NUM_EXPERTS) == 3, -2.0, layer.bias)
    return dataclasses.replace(layer, x=x, router=router, bias=bias)


def _tied(layer: Layer) -> Layer:
    """Experts 2 and 5 are equal, and so are their scores: either may be chosen, the output is the same."""
    names = [name for name in ("gate", "up", "down", "up_bias", "gate_bias", "down_bias", "router_bias", "bias")]
    arrays = {name: np.array(getattr(layer, name)) for name in names if getattr(layer, name) is not None}
    for array in arrays.values():
        array[5] = array[2]
    router = np.array(layer.router)
    router[:, 5] = router[:, 2]
    return dataclasses.replace(layer, router=router, **arrays)


def _padded(layer: Layer) -> Layer:
    """An eighth of the tokens is padding."""
    return dataclasses.replace(layer, mask=np.random.default_rng(1).random(layer.mask.shape) >= 0.125)


def _negative(layer: Layer) -> Layer:
    """All biased scores are negative, which changes no order."""
    return layer if layer.bias is None else dataclasses.replace(layer, bias=layer.bias - 3.0)


def _twins(layer: Layer) -> Layer:
    """Experts 2j and 2j + 1 have router columns one bfloat16 step apart, and all inputs are exact in bfloat16.

    A token's best expert is then one of two whose logits differ by less than bfloat16 resolves.
    """
    arrays = {name: np.array(getattr(layer, name)).astype(ml_dtypes.bfloat16) for name in ("x", "router")}
    steps = np.random.default_rng(3).choice([-1, 1], size=(D, NUM_EXPERTS // 2)).astype(np.int16)
    arrays["router"][:, 1::2] = (arrays["router"][:, ::2].view(np.int16) + steps).view(ml_dtypes.bfloat16)
    bias = None if layer.bias is None else np.repeat(layer.bias[::2], 2)
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    none = None if layer.router_bias is None else np.zeros(NUM_EXPERTS)
    return dataclasses.replace(layer, **exact, bias=bias, router_bias=none)


CASES = (
    Case("main", "choice, weights, output and gradients"),
    Case("one", "K = 1", k=1),
    Case("empty", "an expert without tokens", _empty),
    Case("ties", "equal scores", _tied, quantities=("y", "grad_x")),
    Case("negative", "a selection bias below 0", _negative, forward_only=True),
    Case("balance", "balance loss and its gradient, padding left out", _padded, balance=True),
    Case("z", "z-loss and its gradient, padding left out", _padded, z=True),
    Case("parts", "gradients of two microbatches, added", parts=2),
    Case("precision", "choices of a bfloat16 block", _twins, k=1, dtype="bfloat16", forward_only=True, tokens=256),
)


def layer_of(case: Case, rule: Rule, *, bias: bool, biases: bool) -> Layer:
    """The layer of a case, for a block of this rule with or without a selection bias and biases of its products."""
    layer = evidence.random_layer(rule, groups=4, tokens=case.tokens, d=D, f=F, num_experts=NUM_EXPERTS)
    rng = np.random.default_rng(2)
    shapes = {"router_bias": (NUM_EXPERTS,), "up_bias": (NUM_EXPERTS, F), "down_bias": (NUM_EXPERTS, D)}
    if rule.activation in GATED:
        shapes["gate_bias"] = (NUM_EXPERTS, F)
    added = {"bias": rng.normal(size=NUM_EXPERTS) * 0.1} if bias else {}
    if biases:
        added |= {name: rng.normal(size=shape) * 0.5 for name, shape in shapes.items()}
    added = {name: array.astype(np.float32).astype(np.float64) for name, array in added.items()}
    return case.change(dataclasses.replace(layer, mask=np.ones_like(layer.mask), **added))
