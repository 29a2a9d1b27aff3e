"""Place of every parameter in the tensors of a checkpoint: names, shapes, and copies of parts both ways.

A :class:`Piece` is the part of a parameter that comes from one tensor: one layer, or one expert of one layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, Protocol

import numpy as np
from flax import nnx

from moe.config import ConfigError, ModelConfig
from moe.interop.families.family import Family, Tensor
from moe.models.factory import abstract_model
from moe.models.segments import PREDICTION, stacked_layers
from moe.parallel.parameters import flat_variables


class Reader(Protocol):
    """Source of tensors, such as :class:`moe.interop.tensor_files.TensorFolder`."""

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        """Copy of a part of a tensor."""
        ...


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a parameter.

    Attributes:
        name: of the tensor in the file.
        slot: index in the leading axes of the parameter: (), (layer,) or (layer, expert).
        expert: index in the tensor's leading axis, if that is of experts.
    """

    name: str
    slot: tuple[int, ...]
    expert: int | None = None


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One stacked array of the model.

    Attributes:
        path: keys in the nested dict of parameters.
        shape: of the whole array.
        pieces: all parts, in slot order.
        tensor: place of the pieces in their tensors.
        inputs: number of leading axes of a matrix that are its inputs; 0 for anything but a matrix.
        selection_bias: whether it is a router's selection bias, which checkpoints store separately, always in float32.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    tensor: Tensor
    inputs: int
    selection_bias: bool = False

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """Shape of one piece of the parameter."""
        return self.shape[len(self.pieces[0].slot) :]

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the file."""
        axes_sizes = ([self.slot_shape[axis] for axis in axes] for axes in self._file_axes)
        sizes = [int(np.prod(each)) if each else self.tensor.rows for each in axes_sizes]
        _, size, period = self._turn
        sizes[self._shared_axis] *= period
        sizes[self._shared_axis] //= size
        experts = () if self.pieces[0].expert is None else (self.shape[1],)
        return *experts, *sizes

    @property
    def _file_axes(self) -> list[tuple[int, ...]]:
        """For each axis of the tensor, the axes of the piece that are flattened into it."""
        if self.tensor.axes:
            return list(self.tensor.axes)
        axes = tuple(range(len(self.slot_shape)))
        if self.inputs:
            matrix = [axes[self.inputs :], axes[: self.inputs]]
            return matrix[::-1] if self.tensor.inputs_first else matrix
        return [axes] if self.path[-1].endswith("bias") else [(axis,) for axis in axes]

    @property
    def _shared_axis(self) -> int:
        """Axis of the tensor, not counting that of experts, that its parts divide: the outputs."""
        last = len(self.slot_shape) - 1
        return next(i for i, axes in enumerate(self._file_axes) if last in axes)

    @property
    def _turn(self) -> tuple[int, int, int]:
        """Place of this parameter's outputs on the shared axis: (offset, length of a run of consecutive outputs,
        distance from one run to the next)."""
        outputs = int(np.prod([self.slot_shape[axis] for axis in self._file_axes[self._shared_axis]]))
        sizes = self.tensor.turns or (outputs,) * self.tensor.parts
        return sum(sizes[: self.tensor.part]), sizes[self.tensor.part], sum(sizes)

    def read(self, folder: Reader, piece: Piece, index: tuple[slice, ...]) -> np.ndarray:
        """Copy of a slice of one piece, in the file's dtype.

        Args:
            folder: to read from.
            piece: of this parameter.
            index: a slice per axis of :attr:`slot_shape`.
        """
        reads: list[slice] = []
        cuts: list[slice] = []
        sizes: list[int] = []
        for axes in self._file_axes:
            if not axes:
                reads.append(slice(0, 1))
                continue
            dims = [self.slot_shape[axis] for axis in axes]
            # The outermost of several flattened axes is sliced in the file, the others after reading.
            start, stop, _ = index[axes[0]].indices(dims[0])
            inner = int(np.prod(dims[1:]))
            reads.append(slice(start * inner, stop * inner))
            sizes += [stop - start, *dims[1:]]
            cuts += [slice(None), *(index[axis] for axis in axes[1:])]
        array = self._read_part(folder, piece, reads)
        order = [axis for axes in self._file_axes for axis in axes]
        return array.reshape(sizes)[tuple(cuts)].transpose(np.argsort(order))

    def _read_part(self, folder: Reader, piece: Piece, reads: list[slice]) -> np.ndarray:
        """Read slices whose bounds count within this parameter's part of the tensor."""
        axis, (first, size, period) = self._shared_axis, self._turn
        start, stop = reads[axis].start, reads[axis].stop
        begin, end = start // size, max(-(-stop // size), start // size + 1)  # turns
        inside = slice(start - begin * size, stop - begin * size)
        one = end - begin == 1
        low = begin * period + first + inside.start
        reads[axis] = slice(low, low + stop - start) if one else slice(begin * period, end * period)
        expert = () if piece.expert is None else (piece.expert,)
        array = folder.read(piece.name, (*expert, *reads))
        if one:
            return array
        turns = array.reshape(*array.shape[:axis], end - begin, period, *array.shape[axis + 1 :])
        before = (slice(None),) * axis
        own = turns[(*before, slice(None), slice(first, first + size))]
        return own.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])[(*before, inside)]

    def write(self, tensor: np.ndarray, piece: Piece, values: np.ndarray) -> None:
        """Copy one whole piece to its place in a tensor of :attr:`file_shape`."""
        target = tensor if piece.expert is None else tensor[piece.expert]
        axis, (first, size, period) = self._shared_axis, self._turn
        target = target.reshape(*target.shape[:axis], -1, period, *target.shape[axis + 1 :])  # a view: it is contiguous
        target = target[(slice(None),) * (axis + 1) + (slice(first, first + size),)]
        order = [axis for axes in self._file_axes for axis in axes]
        target[...] = values.transpose(order).reshape(target.shape)


def is_fused(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold all experts of a layer together."""
    return any(name.endswith(".experts.gate_up_proj") for name in names)


def layout(model: ModelConfig, family: Family, *, fused: bool = False, names: Collection[str] = ()) -> list[Parameter]:
    """All parameters of a model with the tensors that hold them, by the family's names.

    Args:
        model: the model that has the parameters.
        family: its names of tensors are used.
        fused: whether the experts of a layer are two tensors, instead of three for each expert.
        names: of the tensors in a file, by which the family's aliases are resolved.

    Raises:
        ConfigError: the family has no tensor for a parameter.
    """
    parameters = []
    for path, variable in flat_variables(nnx.state(abstract_model(model))):
        shape, inputs = variable.shape, variable.get_metadata("inputs")
        stacked = stacked_layers(model, path)
        if stacked is None:
            name = family.outside(model)[".".join(path)]
            parameters.append(Parameter(path, shape, (Piece(name, ()),), Tensor(name), inputs))
            continue
        layers, name = stacked[0], ".".join(stacked[1])
        stack = "encoder" if layers[0] < model.encoder_layers else "decoder"
        if stack == "decoder":  # each stack's layers are numbered from 0 in files
            layers = range(layers.start - model.encoder_layers, layers.stop - model.encoder_layers, layers.step)
        own = family.tensors(model, stack) if callable(family.tensors) else family.tensors
        per_expert = "{expert}" in str(own.get("moe.experts.up"))
        tensors = {**own, **(family.fused if fused and per_expert else {})}
        tensors |= family.prediction if path[0] == PREDICTION else {}
        if name not in tensors:
            raise ConfigError(f"{family.architecture}: has no tensor for {name}")
        found = tensors[name]
        tensor = Tensor(found) if isinstance(found, str) else found
        block = family.block.replace("{stack}", stack)
        if path[0] == PREDICTION and family.prediction_prefixes:
            block = family.prediction_prefixes[name not in family.prediction]
        tensor = _as_named(tensor, block.format(layer=layers[0]), family.aliases, names)
        pieces = _pieces(tensor, block, layers, shape[1] if name.startswith("moe.experts.") else 0)
        parameters.append(Parameter(path, shape, pieces, tensor, inputs, name == "moe.router.bias"))
    return parameters


def _as_named(tensor: Tensor, block: str, aliases: tuple[tuple[str, ...], ...], names: Collection[str]) -> Tensor:
    """The tensor under the alias that a file has; its own name if the file has none."""
    for group in aliases:
        own = next((alias for alias in group if tensor.name.startswith(alias)), "")
        for alias in group if own else ():
            name = alias + tensor.name.removeprefix(own)
            if block + name.format(expert=0) in names:
                return dataclasses.replace(tensor, name=name)
    return tensor


def _pieces(tensor: Tensor, block: str, layers: range, num_experts: int) -> tuple[Piece, ...]:
    stacked = "{expert}" not in tensor.name
    pieces = []
    for i, layer in enumerate(layers):
        name = block.format(layer=layer) + tensor.name
        if num_experts:
            pieces += [
                Piece(name.format(expert=expert), (i, expert), expert if stacked else None)
                for expert in range(num_experts)
            ]
        else:
            pieces.append(Piece(name, (i,)))
    return tuple(pieces)


def by_tensor(parameters: list[Parameter]) -> list[list[Parameter]]:
    """Groups of parameters that share tensors, in order; most groups have one parameter."""
    groups: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.pieces[0].name, []).append(parameter)
    return list(groups.values())


def set_leaf(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    """Put a leaf into a nested dict, making the dicts on its path."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def get_leaf(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at a path."""
    for key in path:
        tree = tree[key]
    return tree
