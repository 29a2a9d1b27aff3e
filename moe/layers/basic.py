"""Building blocks of layers: parameters, inputs, norms, dropout, dense and expert FFNs, and the token embedding."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe.config import ModelConfig
from moe.dispatch import quantized
from moe.dispatch.ffn import GATED_ACTIVATIONS, ExpertWeights, activate
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import gather_for_matmul, matmul, read_as
from moe.parallel.partition_specs import (
    EXPERT_BIASES,
    EXPERTS_IN,
    EXPERTS_OUT,
    HIDDEN,
    IN,
    KEEP_HIDDEN,
    KEEP_OUTPUTS,
    OUT,
    REPLICATED,
    STORED,
)
from moe.routing.routing import Routing


def parameter[V: nnx.Variable[Any]](value: Array, spec: P, *, kind: type[V] = nnx.Param, inputs: int = 0) -> V:
    """A variable of a model, with its storage as metadata.

    Args:
        spec: in roles of mesh axes, an entry for each axis; :data:`REPLICATED`: every device holds all of it.
        kind: class of the variable.
        inputs: number of input axes of a matrix; 0 for anything but a matrix.
    """
    if spec and len(spec) != value.ndim:
        raise ValueError(f"{spec}: must have an entry for each axis of a parameter of shape {value.shape}")
    return kind(value, spec=tuple(spec) or (None,) * value.ndim, inputs=inputs)


def matrix(
    rngs: nnx.Rngs, shape: tuple[int, ...], spec: P, *, fan_in: int, scale: float, inputs: int = 1
) -> nnx.Param[Array]:
    """Float32 parameter from a truncated normal, sigma = sqrt(scale / fan_in), cut at two sigma (Switch 2021,
    section 2.4)."""
    draw = jax.nn.initializers.truncated_normal((scale / fan_in) ** 0.5)
    return parameter(draw(rngs.params(), shape, jnp.float32), spec, inputs=inputs)


def zeros(shape: tuple[int, ...], spec: P = REPLICATED, *, inputs: int = 0) -> nnx.Param[Array]:
    """Float32 parameter of zeros."""
    return parameter(jnp.zeros(shape, jnp.float32), spec, inputs=inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Inputs that all blocks of a stack share.

    Attributes:
        token_ids: [B,T].
        segment_ids: [B,T] the document of each token; 0 is padding.
        positions: [B,T] within the documents.
        key_segment_ids: [B,T] the document of each token as a key, 0: other tokens do not see it; None: segment_ids.
        prefix: [B,T] 1 for tokens that all tokens of their document see (prefix LM); None: attention is causal.
        encoded: [B,U,D] output of the encoder; None in a decoder-only model and in the encoder.
        encoded_segment_ids: [B,U], of the encoder's tokens.
        bias: [N,P] biases of attention's scores by distance, from 1 - L to L - 1 (T5); None: no such biases.
    """

    token_ids: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    key_segment_ids: Int[Array, "B T"] | None = None
    prefix: Int[Array, "B T"] | None = None
    encoded: Float[Array, "B U D"] | None = None
    encoded_segment_ids: Int[Array, "B U"] | None = None
    bias: Float[Array, "N P"] | None = None

    @property
    def as_keys(self) -> Int[Array, "B T"]:
        """The document of each token as a key; 0 is padding."""
        return self.segment_ids if self.key_segment_ids is None else self.key_segment_ids

    def require_plain(self) -> None:
        """Raise a ValueError for inputs that only grouped-query attention supports."""
        if not (self.prefix is self.key_segment_ids is self.bias is None):
            raise ValueError("only grouped-query attention supports a prefix, position biases and documents of keys")


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + epsilon) · scale over the last axis, computed in float32 (Zhang and Sennrich 2019); 1 + scale
    in place of scale if it is centred at zero."""

    def __init__(self, dim: int, epsilon: float, *, zero_centred: bool = False):
        self.scale = parameter(jnp.full((dim,), 0.0 if zero_centred else 1.0, jnp.float32), REPLICATED)
        self.epsilon = epsilon
        self.zero_centred = zero_centred

    @classmethod
    def of(cls, config: ModelConfig, dim: int = 0) -> RMSNorm:
        """A norm of the model, of ``d_model`` unless another dimension is given."""
        kind = LayerNorm if config.layer_norm else cls
        return kind(dim or config.d_model, config.norm_eps, zero_centred=config.zero_centred_norms)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalise x and return it in its own dtype."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        scale = 1.0 + self.scale[...].astype(jnp.float32) if self.zero_centred else self.scale[...]
        return (x32 * scale).astype(x.dtype)


class LayerNorm(RMSNorm):
    """RMSNorm of x − mean(x), plus a bias (Ba et al. 2016)."""

    def __init__(self, dim: int, epsilon: float, *, zero_centred: bool = False):
        super().__init__(dim, epsilon, zero_centred=zero_centred)
        self.bias = zeros((dim,))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalise x and return it in its own dtype."""
        x32 = x.astype(jnp.float32)
        normalised = super().__call__(x32 - jnp.mean(x32, axis=-1, keepdims=True))
        return (normalised + self.bias[...]).astype(x.dtype)


class Site(enum.Enum):
    """Dropout sites of a block; the value is folded into the layer's key.

    An MoE layer splits the same key in four, which are the keys that 0 to 3 would give.
    """

    ATTENTION_WEIGHTS = 4
    ATTENTION_OUTPUT = 5
    FFN_HIDDEN = 6
    FFN_OUTPUT = 7
    CROSS_WEIGHTS = 8
    CROSS_OUTPUT = 9


class StackSite(enum.Enum):
    """Dropout sites outside the blocks of a stack; the stack has its own key."""

    EMBEDDING = 4
    OUTPUT = 5


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout in one layer (Srivastava et al. 2014); without a key it does nothing.

    Attributes:
        rate: share of numbers set to 0; the others are divided by 1 − rate.
        rng: key of the layer.
        site: where it is applied; sites draw independently.
    """

    rate: float = 0.0
    rng: PRNGKeyArray | None = None
    site: Site | StackSite | None = None

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.rng is not None and self.rate > 0

    def at(self, site: Site | StackSite) -> Dropout:
        """The layer's dropout at a site."""
        return dataclasses.replace(self, site=site)

    def __call__(self, x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Drop numbers of x."""
        if self.rng is None or self.rate == 0:
            return x
        assert self.site is not None
        kept = jax.random.bernoulli(jax.random.fold_in(self.rng, self.site.value), 1.0 - self.rate, x.shape)
        return jnp.where(kept, x.astype(jnp.float32) / (1.0 - self.rate), 0).astype(x.dtype)


#: No dropout.
KEEP_ALL = Dropout()


class DenseFFN(nnx.Module):
    """down(act(gate(x))·up(x)), or down(act(up(x))) for a plain activation. No biases."""

    def __init__(self, config: ModelConfig, d_ff: int, *, rngs: nnx.Rngs):
        d, f = config.d_model, d_ff
        self.activation, self.precision = config.activation, config.low_precision
        gated = self.activation in GATED_ACTIVATIONS
        self.up = matrix(rngs, (d, f), IN, fan_in=d, scale=config.init_scale)
        self.down = matrix(rngs, (f, d), OUT, fan_in=f, scale=config.init_scale)
        self.gate = matrix(rngs, (d, f), IN, fan_in=d, scale=config.init_scale) if gated else None

    def __call__(self, x: Float[Array, "*batch D"], drop: Dropout = KEEP_ALL) -> Float[Array, "*batch D"]:
        """Apply the FFN to every token; hidden activations are dropped."""
        up = checkpoint_name(self._matmul(x, self.up), HIDDEN)
        gate = None if self.gate is None else checkpoint_name(self._matmul(x, self.gate), HIDDEN)
        hidden = drop(activate(self.activation, up, gate))
        return self._matmul(hidden, self.down)

    def _matmul(self, x: Array, weight: nnx.Param[Array]) -> Array:
        return quantized.matmul_in(self.precision, matmul)(x, gather_for_matmul(weight, x.dtype))


class Experts(nnx.Module):
    """E FFNs of one shape, as three stacked matrices."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        e, d, f = config.moe.num_experts, config.expert_dim, config.moe.d_ff
        self.activation, self.precision, self.remat = config.activation, config.low_precision, config.remat
        self.sent_precision = config.sent_precision
        self.up = matrix(rngs, (e, d, f), EXPERTS_IN, fan_in=d, scale=config.init_scale)
        self.down = matrix(rngs, (e, f, d), EXPERTS_OUT, fan_in=f, scale=config.init_scale)
        gated, biased = self.activation in GATED_ACTIVATIONS, config.moe.bias == "all"
        self.gate = matrix(rngs, (e, d, f), EXPERTS_IN, fan_in=d, scale=config.init_scale) if gated else None
        self.up_bias = zeros((e, f), EXPERT_BIASES) if biased else None
        self.gate_bias = zeros((e, f), EXPERT_BIASES) if biased and gated else None
        # The layer adds it: what a device computes is a partial sum.
        self.down_bias = zeros((e, d), P(None, "fsdp")) if biased else None

    @property
    def weights(self) -> ExpertWeights:
        """The parameters but ``down_bias``, as they are stored."""
        gate = None if self.gate is None else self.gate[...]
        gate_bias = None if self.gate_bias is None else self.gate_bias[...]
        biases = None if self.up_bias is None else (self.up_bias[...], gate_bias)
        return ExpertWeights(
            self.up[...],
            gate,
            self.down[...],
            biases,
            activation=self.activation,
            precision=self.precision,
            sent_precision=self.sent_precision,
            keeps_hidden=self.remat in KEEP_HIDDEN,
            keeps_outputs=self.remat in KEEP_OUTPUTS,
        )


class SharedExpert(nnx.Module):
    """FFN applied to every token beside its K experts (DeepSeekMoE 2024, equation 9), optionally weighted by
    sigmoid(x·w) (Qwen2-MoE), which is float32 as the weights of the others."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dense = DenseFFN(config, config.moe.shared_d_ff, rngs=rngs)
        d, scale = config.d_model, config.init_scale
        self.gate = matrix(rngs, (d, 1), REPLICATED, fan_in=d, scale=scale) if config.moe.shared_gate else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the FFN and its weight."""
        y = self.dense(x)
        return y if self.gate is None else (y * jax.nn.sigmoid(x @ self.gate[...])).astype(x.dtype)


#: (rows [G,S,D], routing) → (weighted sum of the experts' outputs, assignments [G,S,K] that were not dropped).
RunExperts = Callable[[Array, Routing], tuple[Array, Array]]


class NullExperts(nnx.Module):
    """Experts without an FFN, computed where their tokens are: no dispatch and no capacity (MoE++ 2024, section 3.1).

    Their columns follow those of the E FFNs: zero experts return 0, copy experts x, constant experts
    α_1·x + α_2·v with α = softmax(W·x), and novices v alone (MoNE 2025, section 3.3). Deviations from MoE++: the
    router does not see the previous layer's logits, and these experts drop nothing.
    """

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


class Latent(nnx.Module):
    """Projections of tokens to ``moe.latent_dim`` before they are dispatched and back after they are combined, so that
    exchanges and experts are smaller; router and shared expert see D (LatentMoE: Nemotron 3 2025, section 2.2)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, latent = config.d_model, config.moe.latent_dim
        self.down = matrix(rngs, (d, latent), P(STORED, None), fan_in=d, scale=config.init_scale)
        self.up = matrix(rngs, (latent, d), P(None, STORED), fan_in=latent, scale=config.init_scale)

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
        """P → D, in the compute dtype."""
        return x.astype(dtype) @ gather_for_matmul(self.up, dtype)


class Embedding(nnx.Module):
    """Table of token vectors; where embeddings are tied, also the output matrix."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape, fan_in = (config.vocab_size, config.d_model), 1 if config.scale_logits else config.d_model
        self.table = matrix(rngs, shape, partition_specs.OUT, fan_in=fan_in, scale=config.init_scale, inputs=0)

    def __call__(self, token_ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """Look up vectors, in this dtype."""
        # With this constraint the table's gradient is scatter-added where the tokens are and then split over D. Given
        # only the final sharding, XLA would send every token's gradient to every device.
        table = constrain(self.matrix(dtype), partition_specs.TABLE)
        # In bfloat16 a sum of equal gradients stops at 256 of them, and frequent tokens occur thousands of times.
        return constrain(read_as(table.astype(jnp.float32)[token_ids], table[token_ids]), partition_specs.BATCH)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "V D"]:
        """The table in this dtype, for tied logits."""
        with jax.named_scope("embedding"):
            return gather_for_matmul(self.table, dtype)


class Unembedding(nnx.Module):
    """Output matrix: hidden states to logits. A bias of the logits is its last row; :func:`with_one` adds its 1."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, scale = config.d_model, config.init_scale
        self.kernel = matrix(rngs, (d, config.vocab_size), partition_specs.IN, fan_in=d, scale=scale)
        self.bias = zeros((config.vocab_size,)) if config.logit_bias else None

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "rows V"]:
        """The matrix in this dtype: [D,V], or [D+1,V] with a bias."""
        with jax.named_scope("embedding"):
            kernel = gather_for_matmul(self.kernel, dtype)
            return kernel if self.bias is None else jnp.concatenate([kernel, self.bias[...].astype(dtype)[None]])


def with_one(x: Float[Array, "*batch D"]) -> Float[Array, "*batch inputs"]:
    """Append a 1 to hidden states, for the bias in the last row of the output matrix."""
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
