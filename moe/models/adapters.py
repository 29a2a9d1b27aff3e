"""Low-rank adapters of matrices (LoRA, Hu et al. 2021): W + alpha / rank · A B, with A and B trained and W fixed.

The sum is made of whole matrices before the model reads them. So every dispatch mode and backend computes with the
same weights as a model into which the adapters were merged, and the gradients of A and B are those of that model's
matrices by the chain rule, dA = alpha / rank · dW Bᵀ and dB = alpha / rank · Aᵀ dW. The price is one more copy of the
adapted matrices, and their gradient, while a step runs.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe.config import LoraConfig
from moe.models.stack import part_of
from moe.parallel.partition_specs import ADAPTER_A, ADAPTER_B, ADAPTER_COMMON_A, INPUT_AXES, PARAMETERS

#: Matrices that can have adapters, by the last two names of their path.
_OWNERS = ("attention", "dense", "experts", "latent")


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Subscripts of a matrix and of its factors: stacked layers, experts, input, output, and z for the rank."""

    layers: str
    experts: str
    inputs: str
    outputs: str

    @property
    def weight(self) -> str:
        return self.layers + self.experts + self.inputs + self.outputs

    def a(self, *, common: bool) -> str:
        """Subscripts of A, which all experts of a layer may have in common."""
        return f"{self.layers}{'' if common else self.experts}{self.inputs}z"

    @property
    def b(self) -> str:
        return f"{self.layers}{self.experts}z{self.outputs}"


def initial_adapters(base: dict[str, Any], config: LoraConfig, key: Array) -> dict[str, Any]:
    """Adapters of a model's parameters: A uniform within ±1/sqrt(fan-in) as in PEFT, B zero; parts that are trained
    whole as they are.

    Args:
        base: nested dict of the parameters.
        config: rank, and what is adapted.
        key: of the random numbers.
    """
    result: dict[str, Any] = {}
    for number, (names, leaf) in enumerate(_leaves(base)):
        if part_of(names) in config.trained:
            _set(result, names, leaf)
        elif part_of(names) in config.parts and (axes := _axes(names, leaf.ndim)) is not None:
            _set(result, names, _factors(leaf, axes, config, jax.random.fold_in(key, number)))
    return result


def _factors(weight: Array, axes: _Axes, config: LoraConfig, key: Array) -> dict[str, Array]:
    sizes = dict(zip(axes.weight, weight.shape, strict=True)) | {"z": config.rank}
    common = config.common_a and bool(axes.experts)
    bound = math.prod(sizes[axis] for axis in axes.inputs) ** -0.5
    shape = tuple(sizes[axis] for axis in axes.a(common=common))
    a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    b = jnp.zeros([sizes[axis] for axis in axes.b], jnp.float32)
    return {ADAPTER_COMMON_A if common else ADAPTER_A: a, ADAPTER_B: b}


def merge(base: dict[str, Any], adapters: dict[str, Any], scale: float) -> dict[str, Any]:
    """Parameters with their adapters added, and those that are trained whole in place of the base's.

    Args:
        base: nested dict of parameters, or a part of it.
        adapters: of :func:`initial_adapters`.
        scale: alpha / rank.
    """
    result: dict[str, Any] = {}
    for names, weight in _leaves(base):
        node: Any = adapters
        for name in names:
            node = node.get(name) if isinstance(node, dict) else None
        if node is None:
            merged = weight
        elif isinstance(node, dict):
            axes = _axes(names, weight.ndim)
            assert axes is not None
            common = ADAPTER_COMMON_A in node
            subscripts = f"{axes.a(common=common)},{axes.b}->{axes.weight}"
            delta = jnp.einsum(subscripts, node[ADAPTER_COMMON_A if common else ADAPTER_A], node[ADAPTER_B])
            merged = weight.astype(jnp.float32) + scale * delta
        else:
            merged = node
        _set(result, names, merged)
    return result


def _axes(names: tuple[str, ...], rank: int) -> _Axes | None:
    """Subscripts of a parameter with this path; None if it is no matrix that can have adapters."""
    if len(names) < 2:
        return None
    owner, name = names[-2:]
    key = f"{owner}.{name}"
    spec = PARAMETERS.get(key)
    if owner not in _OWNERS or spec is None or len(spec) - (owner == "experts") < 2 or name.endswith("bias"):
        return None
    letters = string.ascii_lowercase[:rank]
    layers, rest = letters[: rank - len(spec)], letters[rank - len(spec) :]
    experts, rest = (rest[:1], rest[1:]) if owner == "experts" else ("", rest)
    inputs = INPUT_AXES.get(key, 1)
    return _Axes(layers, experts, rest[:inputs], rest[inputs:])


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(key.key for key in path), leaf


def _set(tree: dict[str, Any], names: tuple[str, ...], value: Any) -> None:
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    tree[names[-1]] = value
