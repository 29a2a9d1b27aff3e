"""Qwen3: dense, QK-norm per head, windows in the upper layers."""

from moe.config import ModelConfig
from moe.interop.families.family import ATTENTION, DENSE, Family, read_bias, window_of, write_windows
from moe.interop.families.qwen_layers import UpperWindowsConfig, read_upper_windows
from moe.interop.schema import Count, Json


class Qwen3Config(UpperWindowsConfig):
    """Fields of ``config.json`` with the library's defaults."""

    head_dim: Count | None = 128


def read(source: Qwen3Config) -> tuple[Json, Json]:
    """See :class:`Family`."""
    model = {"qk_norm": "head", "attention_bias": read_bias(source)}
    return model | read_upper_windows(source), {"gate": "none"}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    windows = {"use_sliding_window": window_of(model) > 0} | write_windows(model)
    return {"attention_bias": model.attention_bias == "all"} | windows


FAMILY = Family("qwen3", "Qwen3ForCausalLM", Qwen3Config, read, write, ATTENTION | DENSE)
