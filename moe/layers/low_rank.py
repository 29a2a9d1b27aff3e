"""Experts that share their matrices but for a product of low rank: W_e = W + A_e·B_e."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from moe.config import ModelConfig
from moe.dispatch.ffn import GATED_ACTIVATIONS
from moe.layers.ffn import Experts
from moe.layers.parameter import matrix, zeros
from moe.parallel.mesh import constrain
from moe.parallel.partition_specs import EXPERTS_IN, EXPERTS_OUT, IN, OUT


class LowRankExperts(Experts):
    """E FFNs of one shape, each matrix of which is a shared one plus A_e·B_e of rank r = ``moe.expert_rank``, as
    adapters of one FFN (LoRA 2021, section 4.1, whose B starts at zero; without its factor α/r).

    The products are made once for a layer's call, so experts are dispatched and computed as those with matrices of
    their own; parameters, gradients and moments have the small shapes.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d = config.expert_dim
        f = config.moe.d_ff
        e = config.moe.num_experts
        r = config.moe.expert_rank
        self.take_settings(config)
        gated = self.activation in GATED_ACTIVATIONS
        self.up = matrix(rngs, (d, f), IN, fan_in=d, scale=config.init_scale)
        self.down = matrix(rngs, (f, d), OUT, fan_in=f, scale=config.init_scale)
        self.gate = matrix(rngs, (d, f), IN, fan_in=d, scale=config.init_scale) if gated else None
        self.up_bias = self.gate_bias = self.down_bias = None
        shapes = {"up": (d, f), "gate": (d, f), "down": (f, d)}
        pairs = {}
        for name in ("up", "gate", "down") if gated else ("up", "down"):
            size_in, size_out = shapes[name]
            rows, columns = (EXPERTS_OUT if name == "down" else EXPERTS_IN)[1:]
            first = matrix(rngs, (e, size_in, r), P("expert", rows, None), fan_in=size_in, scale=config.init_scale)
            last = zeros((e, r, size_out), P("expert", None, columns), inputs=1)
            pairs |= {f"{name}_first": first, f"{name}_last": last}
        self.pairs = nnx.Dict(pairs)

    def matrices(self, name: str) -> Array | None:
        """W + A_e·B_e of ``up``, ``gate`` or ``down``; None for an absent gate."""
        shared = getattr(self, name)
        if shared is None:
            return None
        first, last = (self.pairs[f"{name}_{part}"][...] for part in ("first", "last"))
        merged = shared[...] + jnp.einsum("eir,ero->eio", first, last)
        return constrain(merged, EXPERTS_OUT if name == "down" else EXPERTS_IN)


def create_experts(config: ModelConfig, rngs: nnx.Rngs) -> Experts:
    """The FFN experts of a config, of low rank with ``moe.expert_rank``."""
    return (LowRankExperts if config.moe.expert_rank else Experts)(config, rngs=rngs)
