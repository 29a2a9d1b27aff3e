"""Weights of the page: int8 rows with a float32 scale each, and a header, in one npz file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import pydantic
from flax import nnx

from moe.config import Config, ConfigError, ModelConfig, to_dict
from moe.config.parse import from_workdir_dict
from moe.models.factory import abstract_parameters, abstract_selection_biases
from moe.models.segments import restack_layers, unstack_layers
from moe.playground import supported
from moe.system.foreign_files import Amount, Fields, kept_whole, parse
from moe.system.npz_files import read_arrays, write_arrays

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
#: Largest number of tokens of a text, since the page computes all attention scores.
LONGEST = 512


_Id = Annotated[int, pydantic.Field(ge=0, lt=1 << 24)]


class _Vocabulary(Fields):
    pieces: Annotated[list[str], pydantic.Field(min_length=1)]
    kinds: Annotated[str, pydantic.Field(pattern="^[ncub]*$")]
    bos: _Id

    @pydantic.model_validator(mode="after")
    def _fits(self) -> _Vocabulary:
        if len(self.kinds) != len(self.pieces) or self.bos >= len(self.pieces):
            raise ValueError("vocabulary must have a kind for each piece, and bos among them")
        return self


class _Example(Fields):
    name: str
    text: str


class _Header(Fields):
    """Content of the page other than the arrays."""

    model: dict[str, Any]
    title: str
    length: Annotated[int, pydantic.Field(ge=2, le=LONGEST)]
    vocabulary: _Vocabulary
    examples: list[_Example]
    losses: dict[str, dict[str, Amount]]
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
        return from_workdir_dict(to_dict(Config()) | {"model": self.header["model"]}).model


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
        full, inputs, shape = _place(layer, path, np.shape(array))
        rows = np.moveaxis(np.asarray(array, np.float32), inputs, range(-len(inputs), 0)).reshape(shape)
        if _NAMES[path][0] in _WHOLE:
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
            full, inputs, _ = _place(layer, path, shape.shape)
            rows = packed.arrays[full].astype(np.float32)
            if full + _SCALES in packed.arrays:
                rows = rows * packed.arrays[full + _SCALES][:, None]
            sizes = shape.shape
            kept = [size for axis, size in enumerate(sizes) if axis not in inputs]
            array = rows.reshape(*kept, *(sizes[axis] for axis in inputs))
            flat[layer, path] = np.moveaxis(array, range(-len(inputs), 0), inputs)
        return restack_layers(model, like, flat)

    parameters, biases = _abstract(model)
    return restored(parameters), restored(biases) if biases else {}


def _abstract(model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of the parameters and selection biases."""
    return nnx.to_pure_dict(abstract_parameters(model)), nnx.to_pure_dict(abstract_selection_biases(model))


def _place(layer: int, path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Name in the page of a parameter, the axes of a row's values, and the shape [R,C] there."""
    name, inputs = _NAMES[path]
    columns = int(np.prod([shape[axis] for axis in inputs]))
    return name if layer < 0 else f"{layer}.{name}", inputs, (int(np.prod(shape)) // columns, columns)


def _shapes(tree: dict[str, Any]) -> dict[str, Any]:
    """Arrays of zeros, which take no memory, in the shapes of a tree, so that it can be unstacked."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), tree)


def write(path: Path, packed: Packed) -> None:
    """Write an npz file."""
    header = np.frombuffer(json.dumps(packed.header).encode(), np.uint8)
    write_arrays(path, {"header": header, **packed.arrays})


def read(path: Path) -> Packed:
    """Read a file of :func:`write`.

    Raises:
        ConfigError: the file is not one of :func:`write`, or its arrays do not fit its model.
    """
    arrays = read_arrays(path)
    if "header" not in arrays:
        raise ConfigError(f"{path}: not the weights of a page: it has no header")
    where = f"{path}: header"
    packed = Packed(parse(arrays.pop("header").tobytes(), _HEADER, where), arrays)
    try:
        model = packed.model
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if len(packed.header["vocabulary"]["pieces"]) > model.vocab_size:
        raise ConfigError(f"{where}: vocabulary has more than model.vocab_size={model.vocab_size} pieces")
    supported.check(model)
    _check_arrays(path, packed, model)
    return packed


def _check_arrays(path: Path, packed: Packed, model: ModelConfig) -> None:
    """Check names, shapes and numbers of the arrays. Raises ConfigError for the first that is not the model's."""
    wanted: dict[str, tuple[tuple[int, ...], str]] = {}
    for like in _abstract(model):
        for (layer, place), shape in unstack_layers(model, _shapes(like)).items() if like else ():
            full, _, rows = _place(layer, place, shape.shape)
            whole = _NAMES[place][0] in _WHOLE
            wanted[full] = rows, "float32" if whole else "int8"
            wanted |= {} if whole else {full + _SCALES: (rows[:1], "float32")}
    for name in sorted(wanted.keys() ^ packed.arrays.keys()):
        raise ConfigError(f"{path}: {name} is {'missing' if name in wanted else 'not an array of its model'}")
    for name, array in packed.arrays.items():
        if (array.shape, str(array.dtype)) != wanted[name] or not np.isfinite(array).all():
            raise ConfigError(f"{path}: {name} must be finite {wanted[name][1]} of shape {list(wanted[name][0])}")
