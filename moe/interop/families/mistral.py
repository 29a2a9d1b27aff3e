"""Mistral: dense, grouped-query attention, one window for all layers or, as in Ministral, for those that are listed."""

from moe.config import ModelConfig, layer_kinds
from moe.interop.families.family import ATTENTION, DENSE, Family, read_windows, window_of, write_windows
from moe.interop.schema import Context, Count, Json, OpenConfig, Window


class MistralConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    max_position_embeddings: Context = 131072
    num_key_value_heads: Count | None = 8
    sliding_window: Window = 4096


def read(source: MistralConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    # The library reads a file with layer_types as Ministral, whose other layers have no window.
    kinds = source.layer_types or ["sliding_attention"] * source.num_hidden_layers
    return read_windows(source.sliding_window or 0, kinds), {"gate": "none"}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    one_window = len({kind.window for kind in layer_kinds(model)}) == 1
    return {"sliding_window": window_of(model) or None} if one_window else write_windows(model)


FAMILY = Family("mistral", "MistralForCausalLM", MistralConfig, read, write, ATTENTION | DENSE)
