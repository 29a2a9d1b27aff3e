"""Parts of an MoE layer around its FFN experts: experts without an FFN, and latent projections."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moe.config import ModelConfig, MoEConfig
from moe.layers.norms import RMSNorm
from moe.layers.parameter import matrix
from moe.parallel.parameters import gather_for_matmul
from moe.parallel.partition_specs import REPLICATED, STORED
from moe.routing.routing import Routing

#: (rows [G,S,D], routing) → (weighted sum of the experts' outputs, assignments [G,S,K] that were not dropped).
RunExperts = Callable[[Array, Routing], tuple[Array, Array]]


class Wrapper(nnx.Module):
    """Part of an MoE layer around its FFN experts; a layer class lists those that it can have.

    Attributes:
        name: of the part, and of its parameters, in the layer.
    """

    name: ClassVar[str]

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draw the parameters."""

    @classmethod
    def is_in(cls, moe: MoEConfig) -> bool:
        """Whether the layers of this config have the part."""
        raise NotImplementedError

    def around(self, experts: RunExperts) -> RunExperts:
        """Wrap the experts in the part."""
        raise NotImplementedError


class NullExperts(Wrapper):
    """Experts without an FFN, computed where their tokens are: no dispatch and no capacity (MoE++ 2024, section 3.1).

    Their columns follow those of the E FFNs: zero experts return 0, copy experts x, constant experts
    α_1·x + α_2·v with α = softmax(W·x), and novices v alone (MoNE 2025, section 3.3). Deviations from MoE++: the
    router does not see the previous layer's logits, and these experts drop nothing.
    """

    name = "null"

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        moe = config.moe
        d = config.d_model
        constant, novice = moe.constant_experts, moe.novice_experts
        self.first = moe.num_experts
        self.zero = moe.zero_experts
        self.copy = moe.copy_experts
        self.constant = constant
        self.novice = novice
        if constant:
            self.vectors = matrix(rngs, (constant, d), REPLICATED, fan_in=1, scale=1.0, inputs=0)
            self.mix = matrix(rngs, (constant, d, 2), REPLICATED, fan_in=d, scale=config.init_scale, inputs=0)
        if novice:
            self.novices = matrix(rngs, (novice, d), REPLICATED, fan_in=1, scale=1.0, inputs=0)

    @classmethod
    def is_in(cls, moe: MoEConfig) -> bool:
        """With any expert without an FFN."""
        return moe.null_experts > 0

    def without(self, routing: Routing) -> Routing:
        """The assignments to FFNs, for dispatch."""
        real = routing.expert_index < self.first
        return dataclasses.replace(
            routing,
            expert_index=jnp.where(real, routing.expert_index, 0),
            combine_weights=jnp.where(real, routing.combine_weights, 0.0),
            chosen=routing.chosen & real,
            router_logits=routing.router_logits[..., : self.first],
            router_probs=routing.router_probs[..., : self.first],
        )

    def around(self, experts: RunExperts) -> RunExperts:
        """Add these experts to the FFN experts; assignments to these are never dropped."""

        def run(x: Array, routing: Routing) -> tuple[Array, Array]:
            sent = self.without(routing)
            y, kept = experts(x, sent)
            return y + self(x, routing), kept | (routing.chosen & ~sent.chosen)

        return run

    def __call__(self, x: Float[Array, "G S D"], routing: Routing) -> Float[Array, "G S D"]:
        """Weighted sum of the experts without an FFN, in float32."""
        x = x.astype(jnp.float32)
        kinds = self.copy, self.constant, self.novice
        columns = self.first + self.zero + jnp.arange(sum(kinds))
        # [G,S,K,1] against [copy + constant + novice] → [G,S,copy + constant + novice]
        named = routing.expert_index[..., None] == columns
        weights = jnp.sum(jnp.where(named, routing.combine_weights[..., None], 0.0), axis=-2)
        copy, constant, novice = jnp.split(weights, np.cumsum(kinds)[:2], axis=-1)
        of_x, vectors = jnp.sum(copy, axis=-1), jnp.zeros(())
        if self.constant:
            alpha = jax.nn.softmax(jnp.einsum("gsd,nda->gsna", x, self.mix[...]), axis=-1)
            constant = constant[..., None] * alpha
            of_x = of_x + jnp.sum(constant[..., 0], axis=-1)
            vectors = vectors + jnp.einsum("gsn,nd->gsd", constant[..., 1], self.vectors[...])
        if self.novice:
            vectors = vectors + jnp.einsum("gsn,nd->gsd", novice, self.novices[...])
        return of_x[..., None] * x + vectors


class Latent(Wrapper):
    """Projections of tokens to ``moe.latent_dim`` before they are dispatched and back after they are combined, so that
    exchanges and experts are smaller; router and shared expert see D (LatentMoE: Nemotron 3 2025, section 2.2).

    With ``moe.latent_norm`` the combined output is normalised before it is projected back, since its scale varies with
    the experts that are chosen and their weights (normalised LatentMoE: Kimi K3 2026, section 2.3.1, equation 11).
    """

    name = "latent"

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, latent = config.d_model, config.moe.latent_dim
        self.down = matrix(rngs, (d, latent), P(STORED, None), fan_in=d, scale=config.init_scale)
        self.up = matrix(rngs, (latent, d), P(None, STORED), fan_in=latent, scale=config.init_scale)
        self.norm = RMSNorm.of(config, latent) if config.moe.latent_norm else None

    @classmethod
    def is_in(cls, moe: MoEConfig) -> bool:
        """With ``moe.latent_dim``."""
        return moe.latent_dim > 0

    def around(self, experts: RunExperts) -> RunExperts:
        """Wrap the experts in both projections."""

        def run(x: Array, routing: Routing) -> tuple[Array, Array]:
            y, kept = experts(self.project_down(x), routing)
            return self.project_up(y, x.dtype), kept

        return run

    def project_down(self, x: Float[Array, "G S D"]) -> Float[Array, "G S P"]:
        """D → P, the latent dimension."""
        return x @ gather_for_matmul(self.down, x.dtype)

    def project_up(self, x: Float[Array, "G S P"], dtype: jnp.dtype) -> Float[Array, "G S D"]:
        """P → D, in the compute dtype, normalised first with ``moe.latent_norm``."""
        x = x if self.norm is None else self.norm(x)
        return x.astype(dtype) @ gather_for_matmul(self.up, dtype)


class Wrapped(nnx.Module):
    """A layer with parts around its FFN experts that the config may ask for, the innermost first."""

    wrappers: ClassVar[tuple[type[Wrapper], ...]] = (Latent, NullExperts)

    latent: Latent | None
    null: NullExperts | None

    def wrap(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        """Create the parts of a config."""
        for wrapper in self.wrappers:
            setattr(self, wrapper.name, wrapper(config, rngs=rngs) if wrapper.is_in(config.moe) else None)

    def around(self, experts: RunExperts) -> RunExperts:
        """Wrap the FFN experts in the parts that there are."""
        for part in (getattr(self, wrapper.name) for wrapper in self.wrappers):
            experts = experts if part is None else part.around(experts)
        return experts
