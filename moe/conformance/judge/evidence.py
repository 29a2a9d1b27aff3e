"""Results of a layer: arrays by name, as of an npz file, or the run of a JAX function on random weights and inputs."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .diagnosis import QUANTITIES
from .errors import InputError
from .rule import GATED, Layer, Rule

BIASES = ("router_bias", "up_bias", "gate_bias", "down_bias")
INPUTS = ("x", "mask", "router", "router_logits", "up", "gate", "gate_up", "down", "bias", "cotangent", *BIASES)

#: A layer in JAX: (weights by name, x [G,S,D], mask [G,S]) → y, or (y, further quantities by name).
JaxLayer = Callable[[Mapping[str, jax.Array], jax.Array, jax.Array], Any]


def from_arrays(arrays: Mapping[str, np.ndarray], path: str) -> tuple[Layer, dict[str, np.ndarray]]:
    """A layer's weights, inputs and results; ``path`` is their name in messages.

    Arrays: ``x`` [G,S,D] or [S,D], ``router`` [D,E] or ``router_logits`` [G,S,E], ``up`` and ``gate`` [E,D,F] (or
    ``gate_up`` [E,D,2F], the gate's half first), ``down`` [E,F,D]; optionally ``mask``, ``bias`` [E] and
    ``cotangent``, and :data:`BIASES` of the products; and any of :data:`QUANTITIES`.

    Raises:
        InputError: an array that is missing, unknown, or of a wrong shape.
    """
    arrays = dict(arrays)
    for name in arrays:
        if name not in (*INPUTS, *QUANTITIES):
            near = difflib.get_close_matches(name, (*INPUTS, *QUANTITIES), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{path}: unknown array {name!r}; known are {', '.join((*INPUTS, *QUANTITIES))}{hint}")
    if "gate_up" in arrays:
        both = arrays.pop("gate_up")
        if both.ndim != 3 or both.shape[-1] % 2 or {"gate", "up"} & arrays.keys():
            raise InputError(f"{path}: gate_up has the shape {both.shape}, not [E,D,2F], or stands beside gate or up")
        arrays["gate"], arrays["up"] = np.split(both, 2, axis=-1)
    layer = _layer(path, {name: arrays[name] for name in arrays if name in INPUTS})
    results = {name: array for name, array in arrays.items() if name in QUANTITIES}
    if not results:
        raise InputError(f"{path}: nothing to compare; give one of {', '.join(QUANTITIES)}")
    gradients = [name for name in results if name.startswith("grad_")]
    if gradients and layer.cotangent is None:
        raise InputError(f"{path}: {', '.join(gradients)} need the array 'cotangent', the gradient of the loss by y")
    for name in ("y", "expert_index", "combine_weights", "grad_x"):
        if name in results:
            results[name] = _by_token(path, name, results[name], layer.mask.shape)
    return layer, results


def _by_token(path: str, name: str, array: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    """Reshape an array [G,S,n] or [G·S,n] to [G,S,n]. Raises InputError for another shape."""
    if array.shape[:-1] not in (tokens, (math.prod(tokens),)):
        raise InputError(f"{path}: {name} has the shape {array.shape}, for {tokens[0]} x {tokens[1]} tokens")
    return array.reshape(*tokens, -1)


def _layer(path: str, arrays: dict[str, np.ndarray]) -> Layer:
    _refuse_missing(path, arrays)
    arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} holds values that are not finite")
    _check_shapes(path, arrays)
    x = arrays["x"].reshape(-1, *arrays["x"].shape[-2:])
    groups, tokens, d = x.shape
    mask = _by_token(path, "mask", arrays.get("mask", np.ones((groups, tokens)))[..., None], (groups, tokens))[..., 0]
    if not np.isin(mask, (0, 1)).all() or not mask.any():
        raise InputError(f"{path}: mask must be 1 or True for real tokens, at least one, and 0 or False for others")

    def optional(name: str, width: int) -> np.ndarray | None:
        if name not in arrays:
            return None
        array = _by_token(path, name, arrays[name], (groups, tokens))
        if array.shape[-1] != width:
            raise InputError(f"{path}: {name} has the shape {arrays[name].shape}, not [...,{width}]")
        return array

    return Layer(
        x=x,
        mask=mask.astype(bool),
        router=arrays.get("router"),
        logits=optional("router_logits", len(arrays["up"])),
        up=arrays["up"],
        gate=arrays.get("gate"),
        down=arrays["down"],
        bias=arrays.get("bias"),
        cotangent=optional("cotangent", d),
        **{name: arrays[name] for name in BIASES if name in arrays},
    )


def _refuse_missing(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Raise InputError unless the weights and inputs, and one of the router and its logits, are there."""
    for name in ("x", "up", "down"):
        if name not in arrays:
            raise InputError(f"{path}: the array {name!r} is missing")
    if "router" not in arrays and "router_logits" not in arrays:
        raise InputError(f"{path}: the array 'router' [D,E] or 'router_logits' [G,S,E] is missing")
    if "router" in arrays and "router_logits" in arrays:
        raise InputError(f"{path}: has both 'router' and 'router_logits'; give only the one that the layer chose by")


def _check_shapes(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Raise InputError unless D, E and F of the inputs and weights agree."""
    for name, axes, expected in (("x", (2, 3), "[G,S,D] or [S,D]"), ("up", (3,), "[E,D,F]")):
        if arrays[name].ndim not in axes or not arrays[name].size:
            raise InputError(f"{path}: {name} has the shape {arrays[name].shape}, not {expected}")
    d, (num_experts, _, f) = arrays["x"].shape[-1], arrays["up"].shape
    shapes = {
        "router": (d, num_experts),
        "up": (num_experts, d, f),
        "gate": (num_experts, d, f),
        "down": (num_experts, f, d),
        "bias": (num_experts,),
        "router_bias": (num_experts,),
        "up_bias": (num_experts, f),
        "gate_bias": (num_experts, f),
        "down_bias": (num_experts, d),
    }
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            raise InputError(
                f"{path}: {name} has the shape {arrays[name].shape}, not {shape}: D {d}, E {num_experts}, F {f}"
            )


def random_layer(
    rule: Rule, *, groups: int = 4, tokens: int = 16, d: int = 16, f: int = 24, num_experts: int = 8
) -> Layer:
    """Random weights and inputs that expose mistakes: scores far from uniform, about an eighth of tokens padding."""
    rng = np.random.default_rng(0)

    def draw(*shape: int, scale: float) -> np.ndarray:
        return (rng.normal(size=shape) * scale).astype(np.float32).astype(np.float64)

    gated = rule.activation in GATED
    return Layer(
        x=draw(groups, tokens, d, scale=1.0),
        mask=rng.random((groups, tokens)) >= 0.125,
        router=draw(d, num_experts, scale=2 / d**0.5),
        logits=None,
        up=draw(num_experts, d, f, scale=2 / d**0.5),
        gate=draw(num_experts, d, f, scale=2 / d**0.5) if gated else None,
        down=draw(num_experts, f, d, scale=2 / f**0.5),
        cotangent=draw(groups, tokens, d, scale=1.0),
    )


def run(function: JaxLayer, rule: Rule, layer: Layer, mesh: Mesh | None = None) -> dict[str, np.ndarray]:
    """Results of a JAX layer, its gradients included, in float32.

    Args:
        function: the layer.
        rule: weights of its losses.
        layer: weights and inputs.
        mesh: set while the layer is traced and run; None: none.

    Raises:
        InputError: the function fails, or returns something other than y or (y, quantities).
    """
    weights = {name: jnp.asarray(array, jnp.float32) for name, array in layer.weights.items() if name != "x"}
    x, mask = jnp.asarray(layer.x, jnp.float32), jnp.asarray(layer.mask)

    def objective(weights: Mapping[str, jax.Array], x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        output = function(weights, x, mask)
        y, further = output if isinstance(output, tuple) else (output, {})
        results = {"y": jnp.asarray(y), **further}
        total = jnp.sum(results["y"].astype(jnp.float32) * jnp.asarray(layer.cotangent, jnp.float32))
        for name, weight in (("balance_loss", rule.balance_weight), ("z_loss", rule.z_weight)):
            total += weight * results.get(name, 0.0)
        return total, results

    differentiate = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    try:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            gradients, results = differentiate(weights, x)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"the layer cannot be run and differentiated: {type(error).__name__}: {first}") from error
    unknown = sorted(set(results) - set(QUANTITIES))
    if unknown:
        raise InputError(f"the layer returns {', '.join(unknown)}; known quantities are {', '.join(QUANTITIES)}")
    results |= {"grad_x": gradients[1], **{f"grad_{name}": value for name, value in gradients[0].items()}}
    return {name: np.asarray(value, np.float64) for name, value in results.items()}


def arrays_of(layer: Layer, results: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a layer and its results as :func:`from_arrays` takes them."""
    arrays: dict[str, Any] = {**layer.weights, "mask": layer.mask, **results}
    optional = {"router_logits": layer.logits, "bias": layer.bias, "cotangent": layer.cotangent}
    return arrays | {name: array for name, array in optional.items() if array is not None}
