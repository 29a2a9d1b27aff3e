"""Qwen2 and Qwen2.5: dense, biases of queries, keys and values, windows in the upper layers."""

from moe.config import ModelConfig
from moe.interop.families.family import ATTENTION, DENSE, Family, window_of, write_windows
from moe.interop.families.qwen_layers import UpperWindowsConfig, read_upper_windows
from moe.interop.schema import Json


def read(source: UpperWindowsConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    return {"attention_bias": "qkv"} | read_upper_windows(source), {"gate": "none"}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return {"use_sliding_window": window_of(model) > 0} | write_windows(model)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", UpperWindowsConfig, read, write, ATTENTION | DENSE)
