"""Llama: dense, grouped-query attention over the whole context."""

from moe.config import ModelConfig
from moe.interop.families.family import ATTENTION, DENSE, Family, read_bias
from moe.interop.schema import Json, Off, OpenConfig


class LlamaConfig(OpenConfig):
    """Fields of ``config.json`` with the library's defaults."""

    mlp_bias: Off = False


def read(source: LlamaConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    return {"attention_bias": read_bias(source)}, {"gate": "none"}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return {"attention_bias": model.attention_bias == "all", "mlp_bias": False}


FAMILY = Family("llama", "LlamaForCausalLM", LlamaConfig, read, write, ATTENTION | DENSE)
