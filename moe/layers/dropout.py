"""Dropout and its sites."""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


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
