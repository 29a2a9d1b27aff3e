"""The call that passes down to the parts of a block, and the report that they return."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray

from moe.layers.inputs import KEEP_ALL, Dropout, Rows

_NOTHING: Mapping[str, Any] = types.MappingProxyType({})

#: (layer, its input [B,T,D], its state) → (heads [B,T,N,H] or output [B,T,D], its new state)
Mix = Callable[[Any, Array, Any], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything but activations that the parts of a layer read.

    Attributes:
        rows: the tokens' documents and positions, and the encoder's output.
        train: use training capacity factors and dropout.
        rng: key of routing noise and dropout: of the run, and for the parts of a layer of that layer; None:
            deterministic.
        drop: dropout of the layer.
        signals: names of the signals to report; a part gives those that it has.
        replayed: routing, or choices, of the layer to use instead of the router's own.
        gate: further inputs of the layer's gate, by the names of :class:`moe.routing.interface.GateInputs`.
        read: the same with an entry for each token, [B,T,...].
        handed: what the layers below hand on, by name.
        generating: gates that draw or count tokens do so by a token's position, so that no row depends on the others.
        mix: how parts with a state mix tokens in generation; None: whole rows, without a state.
        state: of the layer's parts in generation, by part.
    """

    rows: Rows
    train: bool = False
    rng: PRNGKeyArray | None = None
    drop: Dropout = KEEP_ALL
    signals: tuple[str, ...] = ("layers",)
    replayed: Any = None
    gate: Mapping[str, Any] = _NOTHING
    read: Mapping[str, Any] = _NOTHING
    handed: Mapping[str, Any] = _NOTHING
    generating: bool = False
    mix: Mix | None = None
    state: Mapping[str, Any] = _NOTHING

    def replace(self, **changes: Any) -> Call:
        """The call with other values."""
        return dataclasses.replace(self, **changes)

    def mixed(self, part: str, layer: Any, x: Array, drop: Dropout) -> tuple[Array, dict[str, Any]]:
        """Output of a layer's ``prefill``, or in generation of :attr:`mix`, and the part's state by its name."""
        if self.mix is None:
            return layer.prefill(x, self.rows, drop)[0], {}
        y, state = self.mix(layer, x, self.state[part])
        return y, {part: state}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """Report of a part, of a block, and stacked over the layers of a stack or a model, each a dict by name.

    Attributes:
        losses: weighted; the train step adds them to the objective.
        metrics: logged under their names, [rows,...]: most parts have one row, one with several routers a row for each.
        signals: what was asked for (``Call.signals``): ``layers``, the :class:`moe.routing.balancing.LayerReport` that
            balancing rules read, ``routing``, and others that mixers have.
        handed: for the layers above, and for the objective from the last one.
        state: of the parts in generation.
    """

    losses: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    signals: dict[str, Any] = dataclasses.field(default_factory=dict)
    handed: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __or__(self, other: Report) -> Report:
        """Entries of both; where both have one, the other's."""
        return Report(**{name: getattr(self, name) | getattr(other, name) for name in _FIELDS})

    def replace(self, **changes: Any) -> Report:
        """The report with other values."""
        return dataclasses.replace(self, **changes)

    def asked(self, signals: tuple[str, ...]) -> Report:
        """The report with these signals only."""
        return self.replace(signals={name: value for name, value in self.signals.items() if name in signals})

    def entries(self) -> set[tuple[str, str]]:
        """(attribute, name) of everything that is reported."""
        return {(field, name) for field in _FIELDS for name in getattr(self, field)}

    @classmethod
    def by_entry(cls, read: Callable[[str, str], Any], entries: set[tuple[str, str]]) -> Report:
        """A report with ``read(attribute, name)`` for each of these."""
        fields: dict[str, dict[str, Any]] = {field: {} for field in _FIELDS}
        for field, name in sorted(entries):
            fields[field][name] = read(field, name)
        return cls(**fields)


_FIELDS = tuple(field.name for field in dataclasses.fields(Report))
