"""Experts that a serving engine recorded while it generated, read as choices to replay, and how far ours differ.

Every engine gives the experts of all tokens that went through its model: all but the last one sampled. Expert ids are
the model's own, before any copying of experts to balance devices. What differs is the order of the axes, and which
layers are there:

====================  ==========================================================================  ==================
engine                one sequence                                                                padding
====================  ==========================================================================  ==================
``vllm``              ``CompletionOutput.routed_experts``, int16 [tokens - 1, layers, K]          none
``sglang``            ``meta_info["routed_experts"]``, base64 of int32 [tokens - 1, layers, K]    -1: no experts
``tensorrt_llm``      ``CompletionOutput.routed_experts``, int [tokens - 1, MoE layers, K]        none
``tunix``             one array for all sequences, int [batch, layers, length, K]                 -1
====================  ==========================================================================  ==================

Layers are all of the model or its MoE layers alone; which one is seen by their number.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from moe.config import ConfigError, ModelConfig, sparse_layers
from moe.escaping import markdown_table
from moe.models.decoder import Transformer
from moe.routing.routing import Choices, Routing
from moe.training.losses import cross_entropy

Engine = Literal["vllm", "sglang", "tensorrt_llm", "tunix"]
#: Entry of a token or layer without recorded experts.
ABSENT = -1


def read_choices(engine: str, records: Any, model: ModelConfig, length: int) -> Choices:
    """Recorded experts of some sequences as choices for ``model(tokens, routing=choices)``, the tokens [B,T].

    Args:
        engine: a name of :data:`Engine`.
        records: one for each sequence, in order, as the engine gives it; for ``tunix`` the array of all.
        model: resolved; its layers, experts and K must be those of the model that was served.
        length: T; sequences start at position 0, and positions without a record have no experts.

    Returns:
        Arrays [L,B,T,K] over the MoE layers; a token's group is its row.

    Raises:
        ConfigError: an unknown engine, a record of another shape, or an expert that the model does not have.
    """
    if engine not in get_args(Engine):
        raise ConfigError(f"engine={engine!r}: must be one of {', '.join(get_args(Engine))}")
    k, sparse = model.moe.experts_per_token, sparse_layers(model)
    if engine == "tunix":
        rows = _as_integers(records, "the record")
        if rows.ndim != 4:
            raise ConfigError(f"the record has shape {list(rows.shape)}, must be [batch, layers, length, {k}]")
        sequences = [row.swapaxes(0, 1) for row in rows]
    elif engine == "sglang":
        sequences = [_decoded(record, i, len(sparse), sum(sparse), k) for i, record in enumerate(records)]
    else:
        sequences = [_as_integers(record, f"record {i}") for i, record in enumerate(records)]
    index = np.full((len(sequences), length, sum(sparse), k), ABSENT, np.int32)
    for i, sequence in enumerate(sequences):
        experts = _moe_layers(sequence, i, sparse, k)
        index[i, : len(experts)] = _within(experts, i, length)
    _check_ids(index, model.moe.num_experts)
    index = np.moveaxis(index, 2, 0)  # [B,T,L,K] → [L,B,T,K]
    return Choices(jnp.asarray(np.maximum(index, 0)), jnp.asarray(index != ABSENT))


def _as_integers(record: Any, name: str) -> np.ndarray:
    array = np.asarray(record)
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{name} is of type {array.dtype}, must be integers")
    return array


def _decoded(record: Any, number: int, layers: int, moe_layers: int, k: int) -> np.ndarray:
    """An SGLang record, base64 of a flat array, as [tokens, layers, K]; arrays are taken as they are."""
    if not isinstance(record, str | bytes):
        return _as_integers(record, f"record {number}")
    try:
        flat = np.frombuffer(base64.b64decode(record, validate=True), "<i4")
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"record {number}: is no base64 of int32: {error}") from error
    for count in (layers, moe_layers):
        if count and flat.size % (count * k) == 0:
            return flat.reshape(-1, count, k)
    raise ConfigError(f"record {number}: {flat.size} experts are no multiple of {layers} or {moe_layers} layers of {k}")


def _moe_layers(sequence: np.ndarray, number: int, sparse: Sequence[bool], k: int) -> np.ndarray:
    """[tokens, MoE layers, K]."""
    counts = sorted({len(sparse), sum(sparse)})
    if sequence.ndim != 3 or sequence.shape[1] not in counts or sequence.shape[2] != k:
        layers = " or ".join(map(str, counts))
        raise ConfigError(f"record {number} has shape {list(sequence.shape)}, must be [tokens, {layers} layers, {k}]")
    return sequence[:, np.asarray(sparse)] if sequence.shape[1] == len(sparse) else sequence


def _within(experts: np.ndarray, number: int, length: int) -> np.ndarray:
    beyond = experts[length:]
    if (beyond != ABSENT).any():
        raise ConfigError(f"record {number} has {len(experts)} tokens, the rows {length}")
    return experts[:length]


def _check_ids(index: np.ndarray, num_experts: int) -> None:
    wrong = np.argwhere((index < ABSENT) | (index >= num_experts))
    if len(wrong):
        row, token, layer, choice = (int(at) for at in wrong[0])
        expert = int(index[row, token, layer, choice])
        raise ConfigError(
            f"record {row}: expert {expert} at token {token}, MoE layer {layer}: must be below {num_experts}"
        )
    ordered = np.sort(index, axis=-1)
    twice = np.argwhere((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != ABSENT))
    if len(twice):
        row, token, layer, _ = (int(at) for at in twice[0])
        raise ConfigError(f"record {row}: one expert twice at token {token}, MoE layer {layer}")


# --- How far ours differ ---------------------------------------------------------------------------------------------
#: Number of equal groups of tokens, by margin, in a report.
MARGIN_GROUPS = 4


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Recorded experts against those that our router chooses for the same tokens.

    Attributes:
        decisions: [L] share of recorded experts of an MoE layer that are not among ours.
        tokens: [L] share of tokens with any such expert.
        margins: [4] upper bounds of equal groups of tokens of all layers, by our margin: the probability of the least
            probable expert that we chose less that of the most probable other.
        by_margin: [4] share of tokens with any difference in each group.
    """

    decisions: np.ndarray
    tokens: np.ndarray
    margins: np.ndarray
    by_margin: np.ndarray

    def as_markdown(self) -> str:
        """Two tables, in per cent."""
        found = zip(100 * self.decisions, 100 * self.tokens, strict=True)
        layers = [(layer, f"{decisions:.2f}", f"{tokens:.2f}") for layer, (decisions, tokens) in enumerate(found)]
        margins = [(f"{m:.4f}", f"{100 * share:.2f}") for m, share in zip(self.margins, self.by_margin, strict=True)]
        by_layer = markdown_table(("MoE layer", "experts that differ, %", "tokens with any, %"), layers)
        return f"{by_layer}\n\n{markdown_table(('our margin up to', 'tokens with any, %'), margins)}\n"


def mismatch(recorded: Choices, own: Routing) -> Mismatch:
    """Compare choices with a routing of the same tokens, both [L,G,S,...]; tokens without a record do not count.

    Raises:
        ConfigError: nothing was recorded.
    """
    probs = np.asarray(own.router_probs, np.float32)
    there = _one_hot(recorded.expert_index, recorded.chosen, probs.shape[-1])
    ours = _one_hot(own.expert_index, own.chosen, probs.shape[-1])
    seen = there.any(-1)
    if not seen.any():
        raise ConfigError("the records hold no experts")
    differing = (there & ~ours).sum(-1)
    margin = np.where(ours, probs, np.inf).min(-1) - np.where(ours, -np.inf, probs).max(-1)
    order = np.argsort(margin[seen], kind="stable")
    groups = [group for group in np.array_split(order, MARGIN_GROUPS) if group.size]
    any_difference = (differing > 0)[seen]
    return Mismatch(
        decisions=differing.sum((1, 2)) / np.maximum(there.sum((1, 2, 3)), 1),
        tokens=(differing > 0).sum((1, 2)) / np.maximum(seen.sum((1, 2)), 1),
        margins=np.array([margin[seen][group[-1]] for group in groups]),
        by_margin=np.array([any_difference[group].mean() for group in groups]),
    )


def _one_hot(index: Any, chosen: Any, num_experts: int) -> np.ndarray:
    """[...,E] whether each expert is among those of a token."""
    index, chosen = np.asarray(index), np.asarray(chosen)
    return ((index[..., None] == np.arange(num_experts)) & chosen[..., None]).any(-2)


@dataclasses.dataclass(frozen=True)
class ReplayEffect:
    """Effect of replaying recorded experts on a training step.

    Attributes:
        loss: mean cross-entropy with our own experts.
        replayed_loss: the same with the recorded ones.
        gradient_cosine: cosine between the two gradients of all parameters.
    """

    loss: float
    replayed_loss: float
    gradient_cosine: float


def replay_effect(model: Transformer, tokens: Int[ArrayLike, "B T"], recorded: Choices) -> ReplayEffect:
    """Losses of the next tokens and the gradients' cosine, with our experts and with the recorded ones.

    Tokens without a record have no experts when replayed: the last position of each row, whose target is not there.
    """
    tokens = jnp.asarray(tokens)
    targets = jnp.concatenate([tokens[:, 1:], jnp.full((len(tokens), 1), -1)], axis=1)

    def loss(model: Transformer, choices: Choices | None) -> Array:
        nll, count = cross_entropy(model(tokens, routing=choices).logits, targets)
        return nll / count

    step = nnx.jit(nnx.value_and_grad(loss))
    (plain, gradient), (replayed, other) = step(model, None), step(model, recorded)
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True))
    product, left, right = (float(sum(jnp.vdot(a[i], a[j]) for a in pairs)) for i, j in ((0, 1), (0, 0), (1, 1)))
    return ReplayEffect(float(plain), float(replayed), product / max((left * right) ** 0.5, 1e-30))
