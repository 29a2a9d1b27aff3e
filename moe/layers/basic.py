"""Norms, dropout, the dense FFN, and the token embedding."""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe.config import ModelConfig
from moe.dispatch import quantized
from moe.dispatch.ffn import GATED_ACTIVATIONS, activate
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import gather_for_matmul, matmul, matrix, parameter, zeros
from moe.parallel.partition_specs import HIDDEN, IN, OUT, REPLICATED


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
    """Places of a block that drop, by the number that is folded into the layer's key.

    An MoE layer splits the same key in four, which are the keys that 0 to 3 would give.
    """

    ATTENTION_WEIGHTS = 4
    ATTENTION_OUTPUT = 5
    FFN_HIDDEN = 6
    FFN_OUTPUT = 7
    CROSS_WEIGHTS = 8
    CROSS_OUTPUT = 9


class StackSite(enum.Enum):
    """Places outside the blocks of a stack, which has a key of its own."""

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
        return jnp.where(kept, x / (1.0 - self.rate), 0).astype(x.dtype)


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
        gathered = gather_for_matmul(weight, x.dtype)
        return matmul(x, gathered) if self.precision == "none" else quantized.matmul(x, gathered, self.precision)


class Embedding(nnx.Module):
    """Table of token vectors; where embeddings are tied, also the output matrix."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        fan_in = 1 if config.scale_logits else config.d_model
        shape = config.vocab_size, config.d_model
        self.table = matrix(rngs, shape, partition_specs.OUT, fan_in=fan_in, scale=config.init_scale, inputs=0)

    def __call__(self, token_ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """Look up vectors, in this dtype."""
        # With this constraint the table's gradient is scatter-added where the tokens are and then split over D. Given
        # only the final sharding, XLA would send every token's gradient to every device.
        table = constrain(self.matrix(dtype), partition_specs.TABLE)
        return constrain(table[token_ids], partition_specs.BATCH)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "V D"]:
        """The table in this dtype, for tied logits."""
        with jax.named_scope("embedding"):
            return gather_for_matmul(self.table, dtype)


class Unembedding(nnx.Module):
    """Output matrix: hidden states to logits. A bias of the logits is its last row, which :func:`with_one` meets."""

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
    """Hidden states with a 1 after them, for the bias in the last row of the output matrix."""
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
