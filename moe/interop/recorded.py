"""Experts that a serving engine recorded (:mod:`moe.data.engines`) as choices to replay, compared with our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from moe.config import ConfigError, ModelConfig
from moe.data.engines import ABSENT, EngineName, read_experts
from moe.models.decoder import Transformer
from moe.routing.routing import Choices, Routing
from moe.system.escaping import markdown_table
from moe.training.losses import cross_entropy

__all__ = ["EngineName", "Mismatch", "ReplayEffect", "mismatch", "read_choices", "replay_effect"]


def read_choices(
    engine: str,
    records: Any,
    model: ModelConfig,
    length: int,
    *,
    tokens: Sequence[int] | None = None,
    starts: int | Sequence[int] = 0,
) -> Choices:
    """Recorded experts of some sequences as choices for ``model(tokens, routing=choices)``, the tokens [B,T].

    Positions without a record have no experts; a token's group is its row. See :func:`moe.data.engines.read_experts`.

    Args:
        engine: see there, as ``records`` and ``model``.
        length: T.
        tokens: number of tokens of each row that are not padding; None: T in all rows.
        starts: position of the first token of all records, or of each.

    Returns:
        Arrays [L,B,T,K] over the MoE layers.

    Raises:
        ConfigError: see there; a record that does not reach its row's last token is refused, since it may be of later
            tokens than it seems.
    """
    records = list(records) if isinstance(records, Iterable) and engine != "tunix" else records
    if tokens is None and isinstance(records, list):
        tokens = [length] * len(records)
    experts = read_experts(engine, records, model, length, starts=starts, tokens=tokens)
    index = np.moveaxis(experts, 2, 0)  # [B,T,L,K] → [L,B,T,K]
    return Choices(jnp.asarray(np.maximum(index, 0)), jnp.asarray(index != ABSENT))


#: Number of equal groups of tokens, by margin, in a report.
MARGIN_GROUPS = 4


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Recorded experts against those that our router chooses for the same tokens.

    Attributes:
        decisions: [L] share of recorded experts of an MoE layer that are not among ours.
        tokens: [L] share of tokens with any such expert.
        margins: [4] upper bounds of groups of equal size, of tokens of all layers by our margin: the probability of
            the least probable expert that we chose, minus that of the most probable other one.
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


@nnx.jit
@nnx.value_and_grad
def _loss_and_gradient(
    model: Transformer, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], choices: Choices | None
) -> Array:
    nll, count = cross_entropy(model(tokens, routing=choices).logits, targets)
    return nll / count


def replay_effect(model: Transformer, tokens: Int[ArrayLike, "B T"], recorded: Choices) -> ReplayEffect:
    """Losses of the next tokens and the gradients' cosine, with our experts and with the recorded ones.

    A position counts if it and the next one have a record: after a sequence its row is padding.

    Raises:
        ConfigError: no two consecutive positions have a record.
    """
    tokens, seen = jnp.asarray(tokens), recorded.chosen.any((0, -1))
    targets = jnp.pad(jnp.where(seen[:, :-1] & seen[:, 1:], tokens[:, 1:], -1), ((0, 0), (0, 1)), constant_values=-1)
    if not (targets >= 0).any():
        raise ConfigError("the records hold no two consecutive tokens")
    plain, gradient = _loss_and_gradient(model, tokens, targets, None)
    replayed, other = _loss_and_gradient(model, tokens, targets, recorded)
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True))
    product, left, right = (float(sum(jnp.vdot(a[i], a[j]) for a in pairs)) for i, j in ((0, 1), (0, 0), (1, 1)))
    return ReplayEffect(float(plain), float(replayed), product / max((left * right) ** 0.5, 1e-30))
