"""Mistral: dense, grouped-query attention, one window for all layers."""

from moe.config import ModelConfig
from moe.interop.families.family import ATTENTION, DENSE, Family, window_of
from moe.interop.schema import Context, Count, Json, OpenConfig, Window


class MistralConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    max_position_embeddings: Context = 131072
    num_key_value_heads: Count | None = 8
    sliding_window: Window = 4096


def read(source: MistralConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    return {"sliding_window": source.sliding_window or 0}, {"gate": "none"}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return {"sliding_window": window_of(model) or None}


FAMILY = Family("mistral", "MistralForCausalLM", MistralConfig, read, write, ATTENTION | DENSE)
