"""How far rounding alone moves what a model's routers see, token by token and layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.conformance.divergence import rounded
from moe.conformance.divergence.trace import Routed
from moe.routing.routing import Choices

#: Root mean squares within which an error is called rounding: a normal error is larger once in 5e8.
MULTIPLE = 6.0
#: The programs run a few times and take longer to compile than to run.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Deviations from float64 under random rounding, for n tokens.

    Attributes:
        router_input: [L,n] root mean square over draws of the norm of the error.
        logits: [L,n,E,draws] error of every logit.
        scores: [L,n,E,draws] error of every score that ranks the experts; None: the logits rank them.
    """

    router_input: np.ndarray
    logits: np.ndarray
    scores: np.ndarray | None = None

    @property
    def ranked(self) -> np.ndarray:
        """[L,n,E,draws] error of what ranks the experts."""
        return self.logits if self.scores is None else self.scores

    def input_bound(self) -> np.ndarray:
        """[L,n]: bound of the norm of the router input's error; at least that of the layer's mean square."""
        floor = np.sqrt(np.mean(self.router_input**2, axis=1, keepdims=True))
        return MULTIPLE * np.maximum(self.router_input, floor)


def bound_each(errors: np.ndarray) -> np.ndarray:
    """[L,n,E]: bounds of errors [L,n,E,draws]."""
    squares = np.mean(errors**2, axis=-1)
    return MULTIPLE * np.sqrt(np.maximum(squares, np.mean(squares, axis=(1, 2), keepdims=True)))


def bound_pairs(errors: np.ndarray, mean_square: np.ndarray | float) -> np.ndarray:
    """[...]: bounds of differences of two numbers.

    Args:
        errors: [...,draws] of the differences.
        mean_square: [...] of the error of one number of the layer, below which no bound falls.
    """
    return MULTIPLE * np.sqrt(np.maximum(np.mean(errors**2, axis=-1), 2 * mean_square))


def rounding(
    routed: Routed, variables: Any, batch: Mapping[str, np.ndarray], replay: Choices, *, draws: int, seed: int = 0
) -> Rounding:
    """Evaluate the model in float64, then ``draws`` times with random rounding; the experts are replayed.

    Raises:
        ConfigError: the model runs something that cannot be evaluated (:mod:`.rounded`).
    """
    with jax.set_mesh(routed.program.mesh):
        arguments = jax.device_get((variables, routed.placed(batch), replay))
        traced = jax.make_jaxpr(routed.forward)(*arguments)
    leaves = jax.tree.leaves(arguments)

    def run(store: rounded.Store, leaves: list[Any]) -> tuple[jax.Array, ...]:
        named: dict[str, list[jax.Array]] = {}
        logits = rounded.evaluate(traced, leaves, store, named)[-1]
        inputs, *scores = (jnp.stack(named[name]) for name in routed.names)
        return (inputs, logits, *scores)

    def evaluated(leaves: list[Any]) -> tuple[jax.Array, ...]:
        return run(rounded.exact, leaves)

    def errors(number: jax.Array, leaves: list[Any], inputs: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
        moved, *perturbed = run(rounded.at_random(number), leaves)
        differences = (one - other for one, other in zip(perturbed, others, strict=True))
        return (jnp.sum((moved - inputs) ** 2, axis=-1), *differences)

    # The weights are arguments: XLA would evaluate products of constants while it compiles.
    with jax.enable_x64(True):
        exact = jax.jit(evaluated).lower(leaves).compile(compiler_options=_QUICK)(leaves)
        numbers = jnp.arange(seed * draws, (seed + 1) * draws, dtype=jnp.uint32)
        once = jax.jit(errors).lower(numbers[0], leaves, *exact).compile(compiler_options=_QUICK)
        found = [jax.device_get(once(number, leaves, *exact)) for number in numbers]
    real = np.asarray(batch["segment_ids"]).reshape(-1) > 0
    layers = len(found[0][1])
    squares, *moved = zip(*found, strict=True)
    norms = np.sqrt(np.mean(squares, axis=0)).reshape(layers, -1)[:, real]
    stacked = (np.stack(parts, axis=-1).reshape(layers, real.size, -1, draws)[:, real] for parts in moved)
    return Rounding(norms, *stacked)


def joined(parts: list[Rounding]) -> Rounding:
    """Roundings of several batches, joined."""
    scores = [part.scores for part in parts if part.scores is not None]
    return Rounding(
        np.concatenate([part.router_input for part in parts], axis=1),
        np.concatenate([part.logits for part in parts], axis=1),
        np.concatenate(scores, axis=1) if scores else None,
    )
