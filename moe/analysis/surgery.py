"""Expert surgery on a trained model: fewer experts, finer ones, or finer ones joined again.

Parameters are NumPy trees as :func:`moe.checkpoints.parameters.read_parameters` gives them; nothing is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from moe.config import ConfigError, ModelConfig
from moe.config.layer_kinds import layer_kinds
from moe.config.registry import find_gate
from moe.models.factory import abstract_parameters
from moe.models.segments import restack_layers, unstack_layers
from moe.routing.interface import Selecting
from moe.routing.newer_gates import Cosine, DocumentPools

#: Arrays whose last axis is the hidden units; in ``down`` it is the one before the last.
_INTO = ("up", "gate", "up_bias", "gate_bias")

#: Config, parameters and selection biases.
Model = tuple[ModelConfig, dict[str, Any], dict[str, Any]]


def prune(
    model: ModelConfig,
    parameters: dict[str, Any],
    biases: dict[str, Any],
    kept: np.ndarray,
    *,
    null: bool = False,
    novices: np.ndarray | None = None,
) -> Model:
    """A model of fewer experts: (config, parameters, selection biases).

    Args:
        model: config of a model whose router scores tokens.
        parameters: of the whole model.
        biases: its selection biases; empty without.
        kept: [L,E'] experts of each MoE layer.
        null: the others become zero experts, which are chosen as before and return 0; False: their router columns are
            removed, and their tokens choose among the kept experts.
        novices: [L,E,D]; the others become novices instead, which are chosen as before and return their vector (MoNE
            2025, arXiv 2507.00390).

    Raises:
        ConfigError: too few experts for the gate, or a model that cannot be cut.
    """
    check(model)
    moe = model.moe
    size = model.moe.num_experts
    count = kept.shape[1]
    zero, novice = (size - count if of_kind else 0 for of_kind in (null and novices is None, novices is not None))
    nulls = {"zero_experts": moe.zero_experts + zero, "novice_experts": moe.novice_experts + novice}
    smaller = dataclasses.replace(model, moe=dataclasses.replace(moe, num_experts=count, **nulls))
    columns = {}
    for layer, experts in zip(moe_layers(model), kept, strict=True):
        others = np.setdiff1d(np.arange(size), experts)
        # Among the columns of experts without an FFN, zero experts are first and novices last.
        columns[layer] = np.concatenate([experts, others[:zero], size + np.arange(moe.null_experts), others[:novice]])

    def cut(layer: int, path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
        if path[:2] == ("moe", "router"):
            return array[..., columns[layer]]
        return array[columns[layer][:count]]

    edited = _edited(model, parameters, cut)
    if novices is not None:
        added = {layer: novices[number, columns[layer][-novice:]] for number, layer in enumerate(columns)}
        edited = _with_novices(smaller, edited, added if novice else {})
    return smaller, edited, _edited(model, biases, cut)


def as_one_pool(model: ModelConfig) -> ModelConfig:
    """The config of a model whose experts are one pool of the gate ``emo``: plain top-K of the softmax over them."""
    gate: Any = model.moe.gate
    changed = {"k": gate.k, "renormalise": gate.renormalise, "scale": gate.scale}
    plain = dataclasses.replace(find_gate("deepseek_moe"), **changed)
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, gate=plain, accept_future_leak=False))


def _with_novices(model: ModelConfig, parameters: dict[str, Any], added: dict[int, np.ndarray]) -> dict[str, Any]:
    """Parameters of a model with these vectors [n,D] appended to the novices of each layer."""
    flat, path = unstack_layers(model, parameters), ("moe", "null", "novices")
    for layer, vectors in added.items():
        flat[layer, path] = np.concatenate([flat.get((layer, path), vectors[:0]), vectors]).astype(np.float32)
    return restack_layers(model, nnx.to_pure_dict(abstract_parameters(model)), flat)


def split(model: ModelConfig, parameters: dict[str, Any], biases: dict[str, Any], parts: int) -> Model:
    """The same function with ``parts`` times as many experts and experts per token, each with 1/parts the hidden units.

    The parts of an expert copy its router column, and so are chosen together. A softmax, or renormalisation, gives each
    1/parts of the weight; their down matrices are scaled to make up for it. So are selection biases that are added to a
    softmax.

    Raises:
        ConfigError: parts that do not divide the hidden units, or a model that cannot be split.
    """
    check(model)
    _check_parts(model, parts, "model.moe.d_ff", model.moe.d_ff)
    factor, of_bias = _factors(model, parts)

    def cut(layer: int, path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
        del layer
        if path[:2] == ("moe", "router"):
            repeated = np.repeat(array, parts, axis=-1)
            return repeated / np.float32(of_bias) if path[2] == "bias" else repeated
        if path[-1] == "down_bias":
            return np.repeat(array * np.float32(factor / parts), parts, axis=0)
        axis = -1 if path[-1] in _INTO else 1
        pieces = np.stack(np.split(array, parts, axis=axis), axis=1)  # [E,parts,...]
        pieces = pieces.reshape(-1, *pieces.shape[2:])
        return pieces if path[-1] in _INTO else pieces * np.float32(factor)

    return _resized(model, parts, 1), _edited(model, parameters, cut), _edited(model, biases, cut)


def merge(model: ModelConfig, parameters: dict[str, Any], biases: dict[str, Any], parts: int) -> Model:
    """Undo :func:`split`: each ``parts`` consecutive experts become one, with the mean of their router columns.

    If they are not the parts of one expert, the new expert computes what they would compute if chosen together.

    Raises:
        ConfigError: parts that do not divide E and K, or a model that cannot be merged.
    """
    check(model)
    _check_parts(model, parts, "model.moe.num_experts", model.moe.num_experts)
    _check_parts(model, parts, "model.moe.gate.k", model.moe.experts_per_token)
    factor, of_bias = _factors(model, parts)

    def join(layer: int, path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
        del layer
        if path[:2] == ("moe", "router"):
            mean = array.reshape(*array.shape[:-1], -1, parts).mean(-1, dtype=np.float64)
            return (mean * (of_bias if path[2] == "bias" else 1)).astype(array.dtype)
        groups = array.reshape(-1, parts, *array.shape[1:])
        if path[-1] == "down_bias":
            return groups.sum(1) / np.float32(factor)
        joined = np.concatenate(list(np.moveaxis(groups, 1, 0)), axis=-1 if path[-1] in _INTO else 1)
        return joined if path[-1] in _INTO else joined / np.float32(factor)

    return _resized(model, 1, parts), _edited(model, parameters, join), _edited(model, biases, join)


def order_together(counts: np.ndarray, groups: int) -> np.ndarray:
    """Order [E] of the experts in which those of a group are consecutive: each group begins with the most used expert
    that is left, and adds the one most often chosen together with its members until it has E/groups.

    Args:
        counts: [E,E] of a layer (:func:`moe.analysis.measures.coactivation`).
        groups: number of groups, which divides E.
    """
    size = len(counts)
    left, result = set(range(size)), []
    for _ in range(groups):
        group = [max(left, key=lambda expert: (counts[expert, expert], -expert))]
        left.remove(group[0])
        while len(group) < size // groups:
            group.append(max(left, key=lambda expert: (counts[group, expert].sum(), -expert)))
            left.remove(group[-1])
        result += sorted(group)
    return np.array(result)


def groups_of_tokens(member: np.ndarray, order: np.ndarray, groups: int) -> float:
    """Mean number of groups that hold a token's experts, which is the number of devices that it is sent to.

    Args:
        member: [N,E] bool, experts of tokens (:func:`moe.analysis.measures.membership`).
        order: [E] experts; a group is E/groups consecutive ones.
        groups: number of groups.
    """
    return float(member[:, order].reshape(len(member), groups, -1).any(-1).sum(1).mean())


def experts_left(model: ModelConfig, share: float) -> int:
    """Number of experts without this share of them. Raises a ConfigError where the gate cannot choose among so many."""
    gate: Any = model.moe.gate
    size, groups = model.moe.num_experts, getattr(gate, "groups", 1)
    count = round(share * size)
    left, where = size - count, f"--prune={share:g}"
    if not 0 < count < size:
        raise ConfigError(f"{where}: must leave out 1 to {size - 1} of {size} experts, not {count}")
    if count % groups:
        equally = f"must leave out equally many experts of each of the gate's {groups} groups, not {count} in all"
        raise ConfigError(f"{where}: {equally}")
    if left < (k := gate.experts_per_token(left)):
        smallest = ", the smallest pool of a document" if isinstance(gate, DocumentPools) else ""
        raise ConfigError(f"{where}: must leave the K={k} experts of a token{smallest}, not {left} of {size}")
    return left


def check_groups(model: ModelConfig, groups: int) -> None:
    """Refuse numbers of groups into which the experts cannot be sorted. Raises ConfigError."""
    size, own = model.moe.num_experts, getattr(model.moe.gate, "groups", 1)
    if not 2 <= groups < size or size % groups:
        raise ConfigError(
            f"--regroup={groups}: must divide model.moe.num_experts={size}, and be at least 2 and below it"
        )
    if own > 1:
        raise ConfigError(f"model.moe.gate.groups={own}: regrouping would change the groups that the gate chooses from")


def check(model: ModelConfig) -> None:
    """Refuse a model whose experts cannot be edited. Raises ConfigError."""
    gate = model.moe.gate
    if gate is None or not gate.routes_by_logits or model.moe.layer_gates:
        needed = "surgery needs one gate in all layers, whose router chooses the experts"
        raise ConfigError(f"model.moe.gate={model.moe.gate_name!r}: {needed}")
    if isinstance(gate, Cosine):
        raise ConfigError(f"model.moe.gate={gate.name!r}: surgery does not know the projection of a cosine router")
    if gate.layer is not None:
        name = gate.layer if isinstance(gate.layer, str) else gate.layer.__name__
        own = f"surgery does not know the parameters of a layer of your own, {name}"
        raise ConfigError(f"model.moe.gate={gate.name!r}: {own}")
    if rank := model.moe.expert_rank:
        raise ConfigError(f"model.moe.expert_rank={rank}: surgery needs experts with matrices of their own")
    if model.encoder_layers or model.prediction_layers:
        raise ConfigError("surgery takes decoder-only models without prediction layers")


def _check_parts(model: ModelConfig, parts: int, name: str, value: int) -> None:
    gate: Any = model.moe.gate
    if parts < 1 or value % parts:
        raise ConfigError(f"{name}={value}: must be divisible by {parts}")
    if ":" in gate.name:
        raise ConfigError(f"model.moe.gate={gate.name!r}: a gate of your own may not choose an expert's parts together")
    if model.moe.null_experts or gate.expert_groups > 1 or not gate.sets_k or gate.lists_all:
        raise ConfigError(f"model.moe.gate={gate.name!r}: needs tokens that choose K of all experts, each with an FFN")


def _factors(model: ModelConfig, parts: int) -> tuple[float, float]:
    """Ratios of an expert to each of its parts, which have equal router columns: of the weight, and of what the
    selection bias is added to."""
    gate: Any = model.moe.gate
    softmax = gate.score == "softmax"
    of_weight = parts if softmax or gate.renormalise else 1.0
    biases_scores = isinstance(gate, Selecting) and not gate.biases_logits
    return of_weight, parts if softmax and biases_scores else 1.0


def _resized(model: ModelConfig, times: int, parts: int) -> ModelConfig:
    moe, gate = model.moe, model.moe.gate
    assert gate is not None
    k = moe.experts_per_token * times // parts
    sizes = {"num_experts": moe.num_experts * times // parts, "d_ff": moe.d_ff * parts // times}
    changed: Any = dataclasses.replace(gate, k=k)
    return dataclasses.replace(model, moe=dataclasses.replace(moe, gate=changed, **sizes))


def moe_layers(model: ModelConfig) -> list[int]:
    """Numbers of the MoE layers."""
    return [layer for layer, kind in enumerate(layer_kinds(model)) if kind.sparse]


def _edited(
    model: ModelConfig, tree: dict[str, Any], edit: Callable[[int, tuple[str, ...], np.ndarray], np.ndarray]
) -> dict[str, Any]:
    """Replace each array of routers and experts in a tree by ``edit(layer, path in its block, array)``."""
    if not tree:
        return {}
    flat = {
        (layer, path): edit(layer, path, np.asarray(array))
        if path[:2] in (("moe", "router"), ("moe", "experts"))
        else np.asarray(array)
        for (layer, path), array in unstack_layers(model, tree).items()
    }
    return restack_layers(model, tree, flat)
