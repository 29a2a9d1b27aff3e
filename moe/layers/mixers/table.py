"""The layer of every token mixer."""

from __future__ import annotations

import types
from collections.abc import Mapping

from moe.config.mixers import GatedDelta, GroupedQuery, Mixer, MultiHeadLatent
from moe.layers.mixers.attention import Attention
from moe.layers.mixers.delta_net import GatedDeltaNet
from moe.layers.mixers.interface import MixerLayer
from moe.layers.mixers.latent import LatentAttention

#: Layer by the class of its mixer.
LAYERS: Mapping[type[Mixer], type[MixerLayer]] = types.MappingProxyType(
    {GroupedQuery: Attention, MultiHeadLatent: LatentAttention, GatedDelta: GatedDeltaNet}
)


def layer_class(mixer: Mixer) -> type[MixerLayer]:
    """Class of a mixer's layer."""
    return LAYERS[type(mixer)]
