"""Low-rank adapters of matrices (LoRA, Hu et al. 2021): W + alpha / rank · A B, with A and B trained and W fixed.

The sum is computed on whole matrices before the model reads them. So every dispatch mode and backend computes with the
same weights as a model into which the adapters were merged, and the gradients of A and B are those of that model's
matrices by the chain rule, dA = alpha / rank · dW Bᵀ and dB = alpha / rank · Aᵀ dW. The price is one more copy of the
adapted matrices, and their gradient, while a step runs.
"""

from __future__ import annotations

import math
import string
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from moe.config import LoraConfig
from moe.config.mixers import PATHS
from moe.layers.parameter import parameter
from moe.models.segments import part_of
from moe.parallel.parameters import LAYERS, flat_variables, spec_of
from moe.system.fields import require

#: Modules whose matrices can have adapters.
_OWNERS = (*PATHS, "dense", "experts", "latent")

#: Names of a matrix's factors: A, or one A for all experts of a layer, and B.
LORA_A = "lora_a"
LORA_COMMON_A = "lora_common_a"
LORA_B = "lora_b"


def initial_adapters(base: nnx.State, config: LoraConfig, key: Array) -> nnx.State:
    """Adapters of a model's parameters: A uniform within ±1/sqrt(fan-in) as in PEFT, B zero; parts that are trained
    in full are copied.

    Args:
        config: rank, and what is adapted.

    Raises:
        ConfigError: the model has none of the parts.
    """
    adapters: dict[tuple[Any, ...], Any] = {}
    for number, (path, weight) in enumerate(flat_variables(base)):
        if part_of(path) in config.trained:
            adapters[path] = weight
        elif part_of(path) in config.parts and path[-2] in _OWNERS and weight.get_metadata("inputs"):
            factors = _factors(weight, path[-2] == "experts", config, jax.random.fold_in(key, number))
            adapters |= {(*path, name): factor for name, factor in factors.items()}
    require(bool(adapters), "lora.parts", config.parts, "must name a part that has matrices in this model")
    return nnx.from_flat_state(adapters)


def _factors(weight: nnx.Variable[Any], of_experts: bool, config: LoraConfig, key: Array) -> dict[str, Any]:
    """A [layers, experts, *inputs, rank] and B [layers, experts, rank, *outputs] of a matrix [layers, experts, *inputs,
    *outputs], each split over devices along the axes that it shares with the matrix."""
    shape = weight.shape
    spec = tuple(spec_of(weight))
    rank = config.rank
    layers = spec.count(LAYERS)
    first = layers + of_experts
    last = first + weight.get_metadata("inputs")
    common = config.common_a and of_experts
    leading = layers if common else first
    bound = math.prod(shape[first:last]) ** -0.5
    a = jax.random.uniform(key, (*shape[:leading], *shape[first:last], rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*shape[:first], rank, *shape[last:]), jnp.float32)
    return {
        LORA_COMMON_A if common else LORA_A: parameter(a, P(*spec[:leading], *spec[first:last], None)),
        LORA_B: parameter(b, P(*spec[:first], None, *spec[last:])),
    }


def merge(base: Any, adapters: Any, scale: float) -> Any:
    """Parameters with their adapters added; those that are trained in full replace the base's.

    Args:
        base: nested dict of parameters, or a part of it.
        adapters: nested dict of :func:`initial_adapters`, or the same part of it.
        scale: alpha / rank.
    """
    if not isinstance(adapters, dict):
        return adapters
    if LORA_B in adapters:
        return base.astype(jnp.float32) + scale * _product(base.ndim, adapters)
    return {name: merge(weight, adapters[name], scale) if name in adapters else weight for name, weight in base.items()}


def _product(rank: int, factors: dict[str, Any]) -> Array:
    """A B, with the axes of a matrix of this rank."""
    common, b = LORA_COMMON_A in factors, factors[LORA_B]
    a = factors[LORA_COMMON_A if common else LORA_A]
    axes = string.ascii_lowercase[:rank]
    first = a.ndim + common + b.ndim - 2 - rank  # first axis of the input, after layers and experts
    last = first + a.ndim - 1 - (first - common)
    subscripts = f"{axes[: first - common]}{axes[first:last]}z,{axes[:first]}z{axes[last:]}->{axes}"
    # By default TPUs multiply float32 matrices in bfloat16 passes, and merged weights would be others.
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)
