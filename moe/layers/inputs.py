"""Inputs of the parts of a block other than activations: the rows of tokens, and dropout."""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


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
    MEMORY_OUTPUT = 10
    SHORTCUT = 11


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
