"""Any JAX function in float64, with every stored number rounded at random as its own dtype would round it.

A number of dtype d changes by at most the unit roundoff u(d) of itself when it is stored. Here every result of a
primitive is multiplied by 1 + δ, δ independent and uniform in [−u, u] (Higham and Mary 2019), and a sum of n products
a·b gets an error of u(float32)·√(n Σ (a b)²) for its accumulation. The distribution over draws of what a function
returns is then what rounding alone does to it, through all layers. Loops of fixed length, branches and nested functions
are evaluated; a loop of unknown length is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core
from jax.typing import ArrayLike

from moe.config import ConfigError

#: Results that are some of their arguments' numbers: nothing is rounded.
_EXACT = frozenset(
    {
        *("abs", "neg", "sign", "max", "min", "clamp", "select_n", "reduce_max", "reduce_min", "cummax", "cummin"),
        *("argmax", "argmin", "sort", "top_k", "iota", "copy", "copy_p", "device_put", "stop_gradient"),
        *("broadcast_in_dim", "reshape", "transpose", "squeeze", "rev", "pad", "concatenate", "split", "slice"),
        *("dynamic_slice", "dynamic_update_slice", "gather", "optimization_barrier", "reduce_precision"),
    }
)
_SUMS = frozenset(("reduce_sum", "cumsum", "reduce_window_sum", "scatter-add"))
#: Functions whose float32 results may be several units off.
_FUNCTIONS = frozenset(
    {
        *("exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "rsqrt", "sqrt"),
        *("cos", "sin", "tan", "tanh", "erf", "erf_inv", "lgamma"),
    }
)
_UNITS = 4.0

#: (exact results, dtype, units in the last place, scale of an accumulation or None) → rounded results.
Store = Callable[[Array, Any, float, "Array | None"], Array]


def exact(value: Array, dtype: Any, units: float, accumulated: Array | None) -> Array:
    """No rounding: the function in float64."""
    return value


def unit_roundoff(dtype: Any) -> float:
    """Half of the distance from 1 to the next number."""
    return float(jnp.finfo(dtype).eps) / 2


def at_random(seed: ArrayLike) -> Store:
    """Random rounding; the n-th stored array gets draws of its own, the same for the same seed (a uint32)."""
    count = iter(range(1 << 31))

    def store(value: Array, dtype: Any, units: float, accumulated: Array | None) -> Array:
        if accumulated is not None:
            value = value + unit_roundoff(jnp.float32) * accumulated * _uniform(value.shape, seed, next(count))
        return value * (1.0 + units * unit_roundoff(dtype) * _uniform(value.shape, seed, next(count)))

    return store


def _uniform(shape: tuple[int, ...], seed: ArrayLike, number: int) -> Array:
    """Uniform in [−1, 1): a 32-bit hash of place, seed and number (Wellons 2018, lowbias32), which compiles to few
    instructions where a threefry of each array would take minutes."""
    place = jax.lax.iota(jnp.uint32, _size(shape)).reshape(shape)
    start = jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(number * 0x85EBCA6B % 2**32)
    bits = place * jnp.uint32(0x2545F491) + start
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits ^ (bits >> 16)).astype(jnp.float64) / 2.0**31 - 1.0


def evaluate(
    function: Any, arguments: Sequence[Any], store: Store, named: dict[str, list[Array]] | None = None
) -> list[Array]:
    """Results of a traced function in float64, under ``jax.enable_x64(True)``.

    Args:
        function: ``jax.make_jaxpr(f)(*arguments)``.
        arguments: flat.
        store: :func:`exact` or :func:`at_random`.
        named: gets the values of ``checkpoint_name``, in order, by name.

    Raises:
        ConfigError: a loop of unknown length, or a kernel that is no JAX primitive.
    """
    return _Evaluation(store, {} if named is None else named).run(function, arguments)


def tapped(function: Callable[..., Any], *names: str) -> Callable[..., tuple[list[Array], list[list[Array]]]]:
    """(arguments) → the function's results, flat, and its values of each ``checkpoint_name``, as it computes them."""

    def run(*arguments: Any) -> tuple[list[Array], list[list[Array]]]:
        named: dict[str, list[Array]] = {}
        traced = jax.make_jaxpr(function)(*arguments)
        results = _Evaluation(None, named).run(traced, jax.tree.leaves(arguments))
        return results, [named.get(name, []) for name in names]

    return run


class _Evaluation:
    """Evaluation of a traced function, primitive by primitive.

    Attributes:
        store: how results are rounded, in float64; None: everything as the function computes it.
        named: values of ``checkpoint_name``.
    """

    def __init__(self, store: Store | None, named: dict[str, list[Array]]):
        self.store, self.named = store, named

    def run(self, function: Any, arguments: Sequence[Any]) -> list[Any]:
        """Results of a jaxpr, closed or not."""
        closed = hasattr(function, "consts")
        jaxpr, consts = (function.jaxpr, function.consts) if closed else (function, ())
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(self._wide, consts), strict=True))
        values |= dict(zip(jaxpr.invars, map(self._wide, arguments), strict=True))

        def read(atom: Any) -> Any:
            return self._wide(atom.val) if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, list(map(read, equation.invars)))
            values |= dict(zip(equation.outvars, results, strict=True))
        return list(map(read, jaxpr.outvars))

    def _wide(self, value: Any) -> Any:
        if self.store is None or not _floating(jnp.result_type(value)):
            return value
        return jnp.asarray(value, jnp.float64)

    def _equation(self, equation: Any, inputs: list[Any]) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if name == "name":
            self.named.setdefault(params["name"], []).append(inputs[0])
            return inputs
        inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
        if inner is not None and name not in ("scan", "shard_map", "pallas_call"):
            return self.run(inner, inputs)
        if self.store is None:
            seen = name == "scan" and _has_names(inner)  # its steps are run one by one, so that their values are seen
            return self._scan(equation, inputs) if seen else _bind(equation, inputs, params)
        if name in ("sharding_constraint", "mesh_cast", "reshard"):
            return inputs
        if name == "scan":
            return self._scan(equation, inputs)
        if name == "cond":
            return self.run(params["branches"][int(inputs[0])], inputs[1:])
        if name in ("while", "pallas_call", "shard_map") or name.endswith("callback"):
            raise ConfigError(f"rounding cannot be followed through {name!r}: use model.moe.dispatch=einsum")
        return self._rounded(equation, inputs, _wide_params(params))

    def _rounded(self, equation: Any, inputs: list[Any], params: dict[str, Any]) -> list[Any]:
        """Results of a primitive, rounded to the dtypes that it has in the traced function."""
        assert self.store is not None
        name, results = equation.primitive.name, _bind(equation, inputs, params)
        if name in _EXACT or (name == "convert_element_type" and not _loses(equation)):
            return results
        accumulated, rounded = _accumulated(equation, inputs, params), []
        for value, variable in zip(results, equation.outvars, strict=True):
            dtype = variable.aval.dtype
            units = _UNITS if name in _FUNCTIONS and dtype == jnp.float32 else 1.0
            rounded.append(self.store(value, dtype, units, accumulated) if _floating(dtype) else value)
        return rounded

    def _scan(self, equation: Any, inputs: list[Any]) -> list[Any]:
        """A loop of fixed length, step by step; arguments are constants, then the carry, then rows of each step."""
        params, body = equation.params, equation.params["jaxpr"]
        carried = sum(_same_rank(*pair) for pair in zip(equation.outvars, body.jaxpr.outvars, strict=True))
        whole = sum(_same_rank(*pair) for pair in zip(equation.invars, body.jaxpr.invars, strict=True))
        fixed = inputs[: whole - carried]
        state = inputs[whole - carried : whole]
        rows = inputs[whole:]
        order = range(params["length"])
        stacked: list[list[Any]] = []
        for i in reversed(order) if params["reverse"] else order:
            results = self.run(body, [*fixed, *state, *(row[i] for row in rows)])
            state = results[:carried]
            stacked.append(results[carried:])
        if params["reverse"]:
            stacked.reverse()
        return [*state, *(jnp.stack(column) for column in zip(*stacked, strict=True))]


def _same_rank(outer: Any, inner: Any) -> bool:
    return outer.aval.ndim == inner.aval.ndim


def _has_names(jaxpr: Any) -> bool:
    """Whether a traced function, or one inside of it, has a value of ``checkpoint_name``."""
    inner = [params for equation in jaxpr.eqns for params in equation.params.values() if hasattr(params, "eqns")]
    return any(equation.primitive.name == "name" for equation in jaxpr.eqns) or any(map(_has_names, inner))


def _bind(equation: Any, inputs: list[Any], params: dict[str, Any]) -> list[Any]:
    results = equation.primitive.bind(*inputs, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _floating(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _loses(equation: Any) -> bool:
    """Whether a conversion rounds: to a narrower float."""
    source, result = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
    return _floating(source) and _floating(result) and jnp.finfo(result).nmant < jnp.finfo(source).nmant


def _wide_params(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a primitive on float64 arguments."""
    names = ("new_dtype", "preferred_element_type", "dtype", "out_dtype")
    changed = {name: jnp.float64 for name in names if params.get(name) is not None and _floating(params[name])}
    changed = {name: jnp.dtype(value) for name, value in changed.items()}
    return params | changed | ({"sharding": None} if params.get("sharding") is not None else {})


def _accumulated(equation: Any, inputs: list[Any], params: dict[str, Any]) -> Array | None:
    """√(n Σ (a b)²) of sums of n products, √(n Σ a²) of sums; None for other primitives."""
    name, shape = equation.primitive.name, equation.outvars[0].aval.shape
    if not _floating(equation.outvars[0].aval.dtype):
        return None
    if name in ("dot_general", "ragged_dot_general"):
        (squares,) = _bind(equation, [inputs[0] ** 2, inputs[1] ** 2, *inputs[2:]], params)
        (contracted, _), _ = params["dimension_numbers"] if name == "dot_general" else (((), ()), ())
        count = 1
        for axis in contracted:
            count *= inputs[0].shape[axis]
        return jnp.sqrt(max(count, 1) * squares)
    if name in _SUMS and len(inputs) == 1:
        (squares,) = _bind(equation, [inputs[0] ** 2], params)
        return jnp.sqrt(max(1, inputs[0].size // max(1, _size(shape))) * squares)
    return None


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
