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
from moe.parallel.partition_specs import ROUTER_INPUT
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
    """

    router_input: np.ndarray
    logits: np.ndarray

    def input_bound(self) -> np.ndarray:
        """[L,n]: bound of the norm of the router input's error; at least that of the layer's mean square."""
        floor = np.sqrt(np.mean(self.router_input**2, axis=1, keepdims=True))
        return MULTIPLE * np.maximum(self.router_input, floor)

    def logit_bound(self) -> np.ndarray:
        """[L,n,E]."""
        squares = np.mean(self.logits**2, axis=-1)
        return MULTIPLE * np.sqrt(np.maximum(squares, np.mean(squares, axis=(1, 2), keepdims=True)))

    def pair_bound(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """[L,n]: bound of the error of logit[first] − logit[second]; first, second [L,n] experts."""
        errors = [np.take_along_axis(self.logits, e[..., None, None], axis=2)[:, :, 0] for e in (first, second)]
        squares = np.mean((errors[0] - errors[1]) ** 2, axis=-1)
        floor = 2 * np.mean(self.logits**2, axis=(1, 2, 3))[:, None]
        return MULTIPLE * np.sqrt(np.maximum(squares, floor))


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

    def run(store: rounded.Store) -> tuple[jax.Array, jax.Array]:
        named: dict[str, list[jax.Array]] = {}
        logits = rounded.evaluate(traced, leaves, store, named)[-1]
        return jnp.stack(named[ROUTER_INPUT]), logits

    def errors(number: jax.Array, inputs: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved, perturbed = run(rounded.at_random(number))
        return jnp.sum((moved - inputs) ** 2, axis=-1), perturbed - logits

    with jax.enable_x64(True):
        exact = jax.jit(lambda: run(rounded.exact)).lower().compile(compiler_options=_QUICK)()
        numbers = jnp.arange(seed * draws, (seed + 1) * draws, dtype=jnp.uint32)
        once = jax.jit(errors).lower(numbers[0], *exact).compile(compiler_options=_QUICK)
        found = [jax.device_get(once(number, *exact)) for number in numbers]
    real = np.asarray(batch["segment_ids"]).reshape(-1) > 0
    layers = len(found[0][1])
    norms = np.sqrt(np.mean([squares for squares, _ in found], axis=0)).reshape(layers, -1)[:, real]
    moved = np.stack([logits for _, logits in found], axis=-1)
    return Rounding(norms, moved.reshape(layers, real.size, -1, draws)[:, real])


def joined(parts: list[Rounding]) -> Rounding:
    """Roundings of several batches, joined."""
    return Rounding(
        np.concatenate([part.router_input for part in parts], axis=1),
        np.concatenate([part.logits for part in parts], axis=1),
    )
