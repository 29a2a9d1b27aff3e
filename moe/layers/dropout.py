"""Dropout."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout in one layer (Srivastava et al. 2014); without a key it does nothing.

    Attributes:
        rate: share of numbers set to 0; the others are divided by 1 − rate.
        rng: key of the layer.
        first: number of place 0.
    """

    rate: float = 0.0
    rng: PRNGKeyArray | None = None
    first: int = 0

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.rng is not None and self.rate > 0

    def __call__(self, x: Float[Array, "*batch"], place: int = 0) -> Float[Array, "*batch"]:
        """Drop numbers of x; places of one layer draw independently."""
        if self.rng is None or self.rate == 0:
            return x
        # An MoE layer splits the same key in four, which are the keys that 0 to 3 would fold into it.
        kept = jax.random.bernoulli(jax.random.fold_in(self.rng, 4 + self.first + place), 1.0 - self.rate, x.shape)
        return jnp.where(kept, x / (1.0 - self.rate), 0).astype(x.dtype)


#: No dropout.
KEEP_ALL = Dropout()
