"""Kind of each layer of a model: its token mixer, and whether its FFN is dense or MoE."""

from __future__ import annotations

import functools
import operator
from typing import Literal, NamedTuple

from moe.config.memory_section import Ngrams
from moe.config.mixers import BUILT_IN, Ability, GatedDelta, GroupedQuery, Mixer, attention_of
from moe.config.model_section import ModelConfig, sparse_layers
from moe.config.pattern import Word
from moe.routing.interface import Gate
from moe.system.fields import require

#: Encoder layers attend in both directions; decoder layers of an encoder-decoder also attend to the encoder's output.
Role = Literal["decoder", "encoder", "cross"]

_MODEL = "model."


class LayerKind(NamedTuple):
    """Properties in which layers of one model differ."""

    sparse: bool  # MoE
    mixer: Mixer
    role: Role = "decoder"
    gate: Gate | None = None  # of an MoE layer
    memory: Ngrams | None = None  # of a layer that begins with a look-up of n-grams

    @property
    def window(self) -> int:
        """Tokens that a query attends to, including its own; 0: all, or no attention."""
        return getattr(self.mixer, "window", 0)

    @property
    def parts(self) -> int:
        """Parts that write to the residual stream: memory, mixer, cross-attention, FFN."""
        return 2 + (self.memory is not None) + (self.role == "cross")

    def lacks(self, ability: Ability) -> str:
        """The setting because of which the layer lacks an ability (:meth:`moe.config.mixers.Mixer.lacks`)."""
        forgets = self.memory is None or ability != "drafting"
        return self.mixer.lacks(ability) or ("" if forgets else "memory.layers")


def require_ability(config: ModelConfig, ability: Ability, where: str) -> None:
    """Raise a ConfigError that names the setting because of which a layer lacks an ability.

    Args:
        where: end of the message: what needs the ability.
    """
    for kind in layer_kinds(config):
        if setting := kind.lacks(ability):
            value, default = (operator.attrgetter(setting)(model) for model in (config, type(config)()))
            value = value.name if isinstance(value, Mixer) else value
            require(False, f"{_MODEL}{setting}", value, f"must be {default!r} {where}")


def unread_settings(config: ModelConfig) -> set[str]:
    """Paths of the settings of mixers that no layer reads."""
    read = {name for kind in layer_kinds(config) for name in kind.mixer.settings.values()}
    return {f"{_MODEL}{name}" for cls in BUILT_IN for name in cls.settings.values() if name not in read}


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """Kind of each layer, in layer order."""
    return tuple(kind for kinds in stacks(config).values() for kind in kinds)


@functools.lru_cache
def stacks(config: ModelConfig) -> dict[str, tuple[LayerKind, ...]]:
    """Kinds of the layers of each stack, by the stack's name in the tree of parameters; a decoder-only model has one
    stack, named ""."""
    sparse = sparse_layers(config)
    own = iter((*config.moe.layer_gates, *(config.moe.gate,) * len(sparse)))
    gates = [next(own) if is_sparse else None for is_sparse in sparse]
    if config.encoder_layers:
        kinds = list(zip(sparse, gates, strict=True))
        encoder, decoder = kinds[: config.encoder_layers], kinds[config.encoder_layers :]
        causal, of_source = GroupedQuery.of(config), GroupedQuery.of(config, causal=False)
        return {
            "encoder": tuple(LayerKind(is_sparse, of_source, "encoder", gate) for is_sparse, gate in encoder),
            "decoder": tuple(LayerKind(is_sparse, causal, "cross", gate) for is_sparse, gate in decoder),
        }
    memories = config.memory.hashes(config.vocab_size)
    layers = enumerate(zip(sparse, config.mixer_words, gates, strict=True))
    return {
        "": tuple(
            LayerKind(is_sparse, _mixer(config, word), gate=gate, memory=memories.get(layer))
            for layer, (is_sparse, word, gate) in layers
        )
    }


def _mixer(config: ModelConfig, word: Word) -> Mixer:
    """Token mixer of a layer of a decoder-only model."""
    if word == "delta":
        return GatedDelta.of(config)
    if word == "mixer":
        assert config.mixer is not None
        return config.mixer
    return attention_of(config, windowed=word == "sliding")
