"""Inputs and choices of a model's routers on given text, of any program, commit, mesh or serving engine."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import ConfigError, ModelConfig
from moe.conformance.divergence import rounded
from moe.conformance.divergence.ranking import Ranking
from moe.parallel.partition_specs import ROUTER_INPUT
from moe.routing.interface import SELECTION_SCORES, Gate, Selecting
from moe.routing.routing import Choices
from moe.system.npz_files import read_arrays, write_arrays
from moe.training.batches import forward, place
from moe.training.step import Program

#: Arrays that a trace must have, and those that it may have.
REQUIRED = ("expert_index",)
OPTIONAL = ("tokens", "chosen", "router_input", "router_logits", "scores", "precision", "parameters")
#: Bits of a mantissa → dtype of activations.
DTYPES = {int(jnp.finfo(name).nmant): name for name in ("bfloat16", "float16", "float32")}


@dataclasses.dataclass(frozen=True)
class Trace:
    """Routing of n tokens in L MoE layers.

    Attributes:
        expert_index: [L,n,K] int.
        chosen: [L,n,K] bool, False for padding and assignments that the gate declines.
        tokens: [n] int, token ids; None: not recorded.
        router_input: [L,n,D]; None: not recorded.
        router_logits: [L,n,E] float32; None: not recorded.
        scores: [L,n,E] float32, which rank the experts with the selection bias; None: the logits rank them, or they
            were not recorded.
        precision: [L] int, bits of the mantissa in which each layer's router input was computed; the input itself is
            stored in float32, which holds it exactly; None: not recorded.
        parameters: 32 bytes, a hash of the model's parameters; None: not recorded.
    """

    expert_index: np.ndarray
    chosen: np.ndarray
    tokens: np.ndarray | None = None
    router_input: np.ndarray | None = None
    router_logits: np.ndarray | None = None
    scores: np.ndarray | None = None
    precision: np.ndarray | None = None
    parameters: np.ndarray | None = None

    @property
    def ranked(self) -> np.ndarray:
        """[L,n,E]: what ranks the experts, of a trace with logits."""
        ranked = self.router_logits if self.scores is None else self.scores
        assert ranked is not None
        return ranked

    @property
    def dtype(self) -> str | None:
        """Dtype of the activations, the narrowest of any layer; None: not recorded."""
        return None if self.precision is None else DTYPES[int(self.precision.min())]

    def write(self, path: Path) -> None:
        """Write the arrays to an npz file."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        write_arrays(path, {name: array for name, array in arrays.items() if array is not None})


def read(path: str) -> Trace:
    """Read a trace, or choices that a serving engine recorded.

    Raises:
        ConfigError: an array is missing, unknown or of another shape.
    """
    arrays = read_arrays(path, path)
    unknown = sorted(set(arrays) - {*REQUIRED, *OPTIONAL})
    if unknown or "expert_index" not in arrays:
        raise ConfigError(
            f"{path}: needs 'expert_index' [L,n,K]; may have {', '.join(OPTIONAL)}; has {', '.join(arrays)}"
        )
    index = arrays.pop("expert_index")
    if index.ndim != 3 or index.dtype.kind not in "iu":
        raise ConfigError(f"{path}: expert_index is {index.dtype} {index.shape}, not integers [L,n,K]")
    for name, array in arrays.items():
        shapes = {"tokens": index.shape[1:2], "chosen": index.shape, "precision": index.shape[:1]}
        expected = shapes.get(name, index.shape[:2])
        if name != "parameters" and array.shape[: len(expected)] != expected:
            raise ConfigError(f"{path}: {name} has the shape {array.shape}, for expert_index {index.shape}")
    unknown = sorted(set(np.ravel(arrays.get("precision", ())).tolist()) - set(DTYPES))
    if unknown:
        known = ", ".join(f"{bits} ({name})" for bits, name in DTYPES.items())
        raise ConfigError(f"{path}: precision has {unknown[0]} bits of a mantissa, must be {known}")
    chosen = arrays.pop("chosen", np.ones(index.shape, bool))
    return Trace(index.astype(np.int64), chosen.astype(bool), **arrays)


def fingerprint(variables: Mapping[str, Any]) -> np.ndarray:
    """32 bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


class Routed:
    """A model's forward pass that returns what its routers saw and chose.

    Attributes:
        program: the model's, whose layers are not scanned, so that each router is seen.
        names: of the values that each router is asked for: its input, and its scores where its logits do not rank the
            experts.
    """

    def __init__(self, program: Program):
        """Build it; compiled at the first call."""
        self.program = program
        by_logits = all(map(ranks_by_logits, program.config.model.moe.gates))
        self.names = (ROUTER_INPUT,) if by_logits else (ROUTER_INPUT, SELECTION_SCORES)
        self._run = jax.jit(rounded.tapped(self.forward, *self.names))

    def forward(self, variables: Any, batch: Any, replay: Choices | None) -> tuple[Any, Any, Any]:
        """(expert_index, chosen [L,G,S,K], router_logits [L,G,S,E])."""
        routing: Any = forward(self.program.model(variables), batch, routing=replay, return_routing=True).routing
        return routing.expert_index, routing.chosen, routing.router_logits

    def placed(self, batch: Mapping[str, np.ndarray]) -> Any:
        """The batch on the program's mesh."""
        return place({"targets": batch["tokens"], **batch}, self.program.mesh)

    def __call__(self, variables: Any, batch: Mapping[str, np.ndarray], replay: Choices | None = None) -> Trace:
        """Routing of the real tokens of one batch, with the replayed experts where they are given."""
        with jax.set_mesh(self.program.mesh):
            (index, chosen, logits), named = jax.device_get(self._run(variables, self.placed(batch), replay))
        real = np.asarray(batch["segment_ids"]).reshape(-1) > 0
        layers, width = len(index), real.size
        inputs = named[0]
        widened = [np.stack([np.asarray(part, np.float32) for part in parts]) for parts in named]
        arrays = (index, chosen, logits, *widened)
        flat = [np.reshape(array, (layers, width, -1))[:, real] for array in arrays]
        return Trace(
            flat[0].astype(np.int64),
            flat[1].astype(bool),
            tokens=np.asarray(batch["tokens"]).reshape(-1)[real],
            router_logits=flat[2],
            precision=np.array([jnp.finfo(part.dtype).nmant for part in inputs]),
            **dict(zip(("router_input", "scores"), flat[3:], strict=False)),
        )


def joined(traces: list[Trace], parameters: np.ndarray | None) -> Trace:
    """Traces of several batches as one."""
    arrays: dict[str, Any] = {}
    for field in dataclasses.fields(Trace):
        parts = [getattr(trace, field.name) for trace in traces]
        if field.name == "precision":
            arrays["precision"] = parts[0]
        elif parts[0] is not None:
            arrays[field.name] = np.concatenate(parts, axis=0 if field.name == "tokens" else 1)
    return Trace(**arrays, parameters=parameters)


def ranks_by_logits(gate: Gate) -> bool:
    """Whether the K highest logits are chosen: scores that rise with them, without a bias."""
    return gate.balancing is None


def ranking(model: ModelConfig) -> Ranking:
    """How the tokens of a model choose.

    Raises:
        ConfigError: it is dense, is an encoder-decoder, or has a gate that does not take the K highest scores, or gates
            of different groups.
    """
    found = set()
    for gate in model.moe.gates or (None,):
        if not isinstance(gate, Selecting) or gate.looks_ahead:
            raise ConfigError(f"model.moe.gate={gate}: diverge compares gates that take the K highest scores")
        found.add(Ranking(gate.groups, gate.kept_groups, gate.scores_per_group))
    if model.encoder_layers:
        raise ConfigError("model.encoder_layers: diverge compares decoder-only models")
    if len(found) > 1:
        raise ConfigError("model.moe.layer_gates: diverge compares gates of equal groups, kept_groups and so on")
    return found.pop()


def round_alike(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether one rounding bounds both models: they compute the same in the same dtypes, apart from how rows move."""
    return without_loops(one) == without_loops(other)


def without_loops(model: ModelConfig) -> ModelConfig:
    """The model with rows moved by products, and where it is dropless with a capacity that drops nothing: the same
    function, without a loop of unknown length."""
    moe = model.moe.with_dispatch("einsum")
    if model.moe.dispatch == "dropless":
        capacity = dataclasses.replace(moe.capacity, eval=moe.num_experts / moe.experts_per_token)
        moe = dataclasses.replace(moe, capacity=capacity)
    return dataclasses.replace(model, moe=moe)


def replayed(
    recorded: Trace | None, batch: Mapping[str, np.ndarray], start: int, routed: Routed, variables: Any
) -> tuple[Choices, int]:
    """The experts under which both sides run one batch: recorded ones from token ``start`` on, or the first run's own.

    Raises:
        ConfigError: the recorded trace has fewer tokens, or other layers.
    """
    real = np.asarray(batch["segment_ids"]) > 0
    tokens = int(real.sum())
    if recorded is None:
        own = routed(variables, batch)
        index, chosen = own.expert_index, own.chosen
    else:
        part = slice(start, start + tokens)
        index, chosen = recorded.expert_index[:, part], recorded.chosen[:, part]
        if index.shape[1] != tokens:
            raise ConfigError(
                f"the recorded trace has {recorded.expert_index.shape[1]} tokens, the text more: use --tokens"
            )
    wide = [np.zeros((len(index), real.size, index.shape[-1]), array.dtype) for array in (index, chosen)]
    for array, part in zip(wide, (index, chosen), strict=True):
        array[:, real.reshape(-1)] = part
    group = routed.program.config.model.moe.group_size or real.shape[1]
    shape = (len(index), -1, group, index.shape[-1])
    return Choices(jnp.asarray(wide[0].reshape(shape), jnp.int32), jnp.asarray(wide[1].reshape(shape))), start + tokens
