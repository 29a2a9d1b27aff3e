"""Section ``model.memory``: layers that look up vectors of n-grams."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

from moe.system.fields import LARGEST, Section, require, setting

#: Prefix of its fields in messages.
MEMORY = "model.memory."

#: Rows of a layer's table are a multiple of this, so that any mesh of a power of two splits them.
_ROWS_MULTIPLE = 1024
#: Distance between the seeds of two layers' multipliers in the published code.
_SEED_STEP = 10007


@dataclasses.dataclass(frozen=True)
class Ngrams:
    """Hashes of one layer's n-grams: multiplicative, joined by exclusive or, modulo a prime (Engram 2026, equation 2).

    Attributes:
        orders: the n of the n-grams.
        multipliers: of a token, and of those before it, the nearest first; odd, below 2^63 / V.
        sizes: for each order the rows of each head, different primes.
    """

    orders: tuple[int, ...]
    multipliers: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        """Rows of the layer's table, with unused ones at its end."""
        return -(-sum(map(sum, self.sizes)) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each head of each order, in order."""
        sizes = list(itertools.chain(*self.sizes))
        return tuple(itertools.accumulate(sizes[:-1], initial=0))


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Section, path=MEMORY):
    """Memory of n-grams (Engram: Cheng et al. 2026, arXiv 2601.07372): these layers begin by adding vectors of the last
    tokens, looked up by hashes of their ids and gated by the hidden state."""

    #: layers that have one, from 0 (the published code: 1, 15); empty: no memory
    layers: tuple[int, ...] = setting((), switch=True, page=True)
    orders: tuple[int, ...] = (2, 3)  # n of the n-grams, each with its own hashes
    heads: int = setting(8, least=1, most=2**10)  # hashes of each order, each into rows of its own
    dim: int = setting(512, least=1, most=2**20)  # of one order's vectors, those of its heads joined; heads divides it
    #: rows of each head at least; a head has the next prime that none has yet (the published code: 5 V)
    rows: int = setting(20_480, least=2, most=2**30)
    conv_width: int = setting(4, least=1, most=64)  # W of the convolution, over every n-th token for the largest n
    pad_id: int = setting(0, least=0, most=2**24)  # id that stands for the tokens before a document

    def __post_init__(self) -> None:
        super().__post_init__()
        rise = all(low < high for low, high in itertools.pairwise((1, *self.orders)))
        fits = bool(self.orders) and rise and self.orders[-1] <= 16
        self._require("orders", fits, "must be increasing numbers from 2 to 16")
        divides = self.dim % self.heads == 0
        self._require("dim", divides, f"must be a multiple of heads={self.heads}")

    @property
    def head_dim(self) -> int:
        """Dimension of one head's vectors."""
        return self.dim // self.heads

    @property
    def joined_dim(self) -> int:
        """Dimension of all vectors that a token reads, joined."""
        return len(self.orders) * self.dim

    @property
    def reach(self) -> int:
        """Tokens before the current one that the convolution sees at most."""
        return (self.conv_width - 1) * self.orders[-1]

    def hashes(self, vocab_size: int) -> dict[int, Ngrams]:
        """Hashes of each layer with a memory.

        Raises:
            ConfigError: a layer has more rows than an index can count.
        """
        found = _hashes(self, vocab_size)
        for ngrams in found.values():
            allowed = f"makes a table of {ngrams.rows} rows, must make one of at most {LARGEST}"
            require(ngrams.rows <= LARGEST, f"{MEMORY}rows", self.rows, allowed)
        return found


@functools.lru_cache
def _hashes(memory: MemoryConfig, vocab_size: int) -> dict[int, Ngrams]:
    """Multipliers and primes as the published code draws them (engram_demo_v1.py, NgramHashMapping)."""
    bound = max(1, np.iinfo(np.int64).max // vocab_size // 2)
    taken: set[int] = set()
    found = {}
    for layer in memory.layers:
        draws = np.random.default_rng(_SEED_STEP * layer).integers(bound, size=memory.orders[-1], dtype=np.int64)
        sizes = []
        for _ in memory.orders:
            primes = (prime for prime in _primes(memory.rows) if prime not in taken)
            sizes.append(tuple(itertools.islice(primes, memory.heads)))
            taken.update(sizes[-1])
        found[layer] = Ngrams(memory.orders, tuple(int(draw) * 2 + 1 for draw in draws), tuple(sizes))
    return found


def _primes(least: int) -> Iterator[int]:
    """Primes from a number on."""
    return (
        number
        for number in itertools.count(max(least, 2))
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
    )
