"""Weights of the page: int8 rows with a float32 scale each, and a header, in one npz file."""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import pydantic
from flax import nnx

from moe.atomic_files import write_arrays
from moe.config import Config, ConfigError, ModelConfig, to_dict
from moe.config.parse import from_config_dict
from moe.foreign_files import Fields, kept_whole, parse
from moe.models.factory import abstract_parameters, abstract_selection_biases
from moe.models.stack import restack_layers, unstack_layers

#: Path of a parameter in its block, or outside the blocks → its name in the page, and the axes of a row's values.
_NAMES: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {
    ("embedding", "table"): ("embedding", (1,)),
    ("unembedding", "kernel"): ("unembedding", (0,)),
    ("final_norm", "scale"): ("final_norm", (0,)),
    ("attention_norm", "scale"): ("attention_norm", (0,)),
    ("ffn_norm", "scale"): ("ffn_norm", (0,)),
    ("attention", "query"): ("query", (0,)),
    ("attention", "key"): ("key", (0,)),
    ("attention", "value"): ("value", (0,)),
    ("attention", "out"): ("out", (0, 1)),
    ("moe", "router", "kernel"): ("router", (0,)),
    ("moe", "router", "bias"): ("bias", (0,)),
    **{("moe", "experts", name): (f"experts.{name}", (1,)) for name in ("up", "gate", "down")},
    **{("moe", "shared", "dense", name): (f"shared.{name}", (0,)) for name in ("up", "gate", "down")},
    **{("dense", name): (f"dense.{name}", (0,)) for name in ("up", "gate", "down")},
}
#: Kept in float32: norms, and the router, whose choices the page is about.
_WHOLE = ("final_norm", "attention_norm", "ffn_norm", "router", "bias")
_SCALES = ".scales"
_LARGEST = 127  # of int8, symmetric


class _Header(Fields):
    """Fields of a header that the page needs."""

    title: str
    length: Annotated[int, pydantic.Field(ge=1)]
    vocabulary: dict[str, Any]
    examples: list[dict[str, str]]
    model: dict[str, Any]
    sizes: str
    about: str


_HEADER = kept_whole(_Header)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A model for the page.

    Attributes:
        header: JSON: the model's config, its vocabulary, losses and examples.
        arrays: name in the page → int8 rows [R,C], with their scales [R] under ``NAME.scales``; or float32 [R,C].
    """

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def model(self) -> ModelConfig:
        """The model's config."""
        return from_config_dict(to_dict(Config()) | {"model": self.header["model"]}).model


def pack(model: ModelConfig, parameters: dict[str, Any], biases: dict[str, Any], header: dict[str, Any]) -> Packed:
    """Round matrices to int8, each row with a scale of its own.

    Args:
        model: of the parameters.
        parameters: of the whole model.
        biases: selection biases of its routers; empty without.
        header: what the page shows.
    """
    arrays: dict[str, np.ndarray] = {}
    flat = unstack_layers(model, parameters) | (unstack_layers(model, biases) if biases else {})
    for (layer, path), array in flat.items():
        name, inputs = _NAMES[path]
        full = name if layer < 0 else f"{layer}.{name}"
        rows = np.moveaxis(np.asarray(array, np.float32), inputs, range(-len(inputs), 0))
        rows = rows.reshape(-1, int(np.prod(rows.shape[-len(inputs) :])))
        if name in _WHOLE:
            arrays[full] = rows
            continue
        scales = np.maximum(np.abs(rows).max(axis=1), 1e-30) / _LARGEST
        arrays[full] = np.rint(rows / scales[:, None]).astype(np.int8)
        arrays[full + _SCALES] = scales.astype(np.float32)
    return Packed({**header, "model": dataclasses.asdict(model)}, arrays)


def unpack(packed: Packed) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and selection biases that the page computes with, in float32."""
    model = packed.model

    def restored(like: dict[str, Any]) -> dict[str, Any]:
        flat = {}
        for (layer, path), shape in unstack_layers(model, _shapes(like)).items():
            name, inputs = _NAMES[path]
            full = name if layer < 0 else f"{layer}.{name}"
            rows = packed.arrays[full].astype(np.float32)
            if full + _SCALES in packed.arrays:
                rows = rows * packed.arrays[full + _SCALES][:, None]
            sizes = shape.shape
            kept = [size for axis, size in enumerate(sizes) if axis not in inputs]
            array = rows.reshape(*kept, *(sizes[axis] for axis in inputs))
            flat[layer, path] = np.moveaxis(array, range(-len(inputs), 0), inputs)
        return restack_layers(model, like, flat)

    parameters = nnx.to_pure_dict(abstract_parameters(model))
    biases = nnx.to_pure_dict(abstract_selection_biases(model))
    return restored(parameters), restored(biases) if biases else {}


def _shapes(tree: dict[str, Any]) -> dict[str, Any]:
    """Arrays without values of the shapes of a tree, which can be unstacked."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), tree)


def write(path: Path, packed: Packed) -> None:
    """Write an npz file."""
    header = np.frombuffer(json.dumps(packed.header).encode(), np.uint8)
    write_arrays(path, {"header": header, **packed.arrays})


def read(path: Path) -> Packed:
    """Read a file of :func:`write`.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = arrays.pop("header").tobytes()
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: not the weights of a page ({error})") from error
    return Packed(parse(header, _HEADER, f"{path}: not the weights of a page"), arrays)
