"""Granite-MoE with a shared expert."""

import dataclasses

from moe.config import ModelConfig
from moe.interop.families import granitemoe
from moe.interop.families.family import Tensor
from moe.interop.schema import Json, OptionalCount


class GraniteSharedConfig(granitemoe.GraniteConfig):
    """Fields of ``config.json`` with the library's defaults."""

    shared_intermediate_size: OptionalCount = 0


def read(source: GraniteSharedConfig) -> tuple[Json, Json]:
    """See :class:`Family`."""
    model, moe = granitemoe.read(source)
    return model, moe | {"shared_d_ff": source.shared_intermediate_size}


def write(model: ModelConfig) -> Json:
    """See :class:`Family`."""
    return granitemoe.write(model) | {"shared_intermediate_size": model.moe.shared_d_ff}


SHARED = {
    "moe.shared.dense.gate": Tensor("shared_mlp.input_linear.weight", 0, 2),
    "moe.shared.dense.up": Tensor("shared_mlp.input_linear.weight", 1, 2),
    "moe.shared.dense.down": Tensor("shared_mlp.output_linear.weight"),
}
FAMILY = dataclasses.replace(
    granitemoe.FAMILY,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    schema=GraniteSharedConfig,
    read=read,
    write=write,
    tensors=granitemoe.TENSORS | SHARED,
)
