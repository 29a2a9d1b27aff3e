"""Section ``model.rope_scaling``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moe.system.fields import Section, setting

RopeScaling = Literal["none", "linear", "dynamic", "yarn", "longrope", "llama3"]

#: Prefix of its fields in messages.
ROPE = "model.rope_scaling."


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig(Section, path=ROPE):
    """Scaling of rotary positions for contexts longer than those of pre-training."""

    #: as in the checkpoint's config; none: unscaled frequencies
    kind: RopeScaling = setting("none", switch=True, page=True)
    factor: float = setting(1.0, least=1)  # longest context over original_length
    original_length: int = setting(0, least=0, unit="tokens")  # context of pre-training; for all kinds but linear
    #: yarn: rotations in the original context above which a pair is not interpolated
    beta_fast: float = setting(32.0, above=0)
    beta_slow: float = setting(1.0, above=0)  # yarn: rotations below which it is interpolated fully
    truncate: bool = True  # yarn: round the two bounds to whole pairs
    #: yarn and longrope: factor of rotated queries and keys; 0: computed
    attention_factor: float = setting(0.0, least=0)
    mscale: float = setting(0.0, least=0)  # yarn: constant of attention_factor's numerator (DeepSeek); 0: not used
    mscale_all_dim: float = setting(0.0, least=0)  # yarn: that of its denominator; scales latent attention's scores too
    #: yarn: β of the factor 1 + β·ln(1 + ⌊position / original_length⌋) of rotated queries (Mistral 4); 0: none
    query_growth: float = setting(0.0, least=0)
    short_factors: tuple[float, ...] = ()  # longrope: divisor of each pair's frequency up to original_length
    long_factors: tuple[float, ...] = ()  # longrope: the same for longer rows
    #: llama3: rotations in the original context below which a pair is interpolated fully
    low_freq_factor: float = setting(1.0, above=0)
    high_freq_factor: float = 4.0  # llama3: rotations above which a pair is not interpolated

    def __post_init__(self) -> None:
        super().__post_init__()
        long = self.original_length >= 2 or self.kind in ("none", "linear")
        self._require("original_length", long, "must be at least 2")
        grows = not self.query_growth or self.kind == "yarn"
        self._require("query_growth", grows, f"must be 0 without {ROPE}kind=yarn")
        low = self.low_freq_factor
        allowed = f"must be above low_freq_factor={low}, which must be positive"
        self._require("high_freq_factor", self.high_freq_factor > low, allowed)

    @property
    def follows_length(self) -> bool:
        """Whether the angles of a text depend on how long it is."""
        return self.kind in ("dynamic", "longrope")
