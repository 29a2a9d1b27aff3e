"""Exchange of tokens between the devices that experts are split over, by dropless dispatch."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """Rows go to the devices of their experts, and outputs come back.

    Attributes:
        chunks: parts of each group's tokens that are dispatched one after the other.
        hosts: number that the expert axis spans; above 1, a token is sent at most once to each.
    """

    chunks: int = 1
    hosts: int = 1


@dataclasses.dataclass(frozen=True)
class AllGather:
    """Every device gathers the tokens of all of them, and returns sums over its experts.

    Attributes:
        chunks: as of :class:`AllToAll`.
    """

    chunks: int = 1
