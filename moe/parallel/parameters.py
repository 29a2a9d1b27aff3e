"""Parameters: where they are stored, gathering them for a matmul, and that matmul.

A parameter carries its PartitionSpec from where it is made, as metadata: ``spec``, in roles (Flax's ``out_sharding`` is
in axes of the mesh); a stack of layers adds the leading axis :data:`LAYERS`. A matrix also carries the number of axes
that its input has, ``inputs``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from moe.config import ConfigError
from moe.parallel import target
from moe.parallel.mesh import AXES, axis_of, axis_size, constrain
from moe.parallel.partition_specs import REPLICATED, STORED, shardings

#: The leading axis of parameters of stacked layers.
LAYERS = "layers"

#: Prefix of the named scopes in which weights are gathered, by which the planner finds their exchanges in compiled
#: programs.
WEIGHTS_SCOPE = "weights."


def stacked[M: nnx.Module](create: Callable[..., M], repeats: int, rngs: nnx.Rngs) -> M:
    """Draw every repeat of ``create(rngs=...)`` from its own key and stack them along a new leading axis."""

    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: LAYERS, "spec": LAYERS})
    def one(key: Array) -> M:
        return create(rngs=nnx.Rngs(params=key))

    return one(jax.random.split(rngs.params(), repeats))


def axis_names(axes: Any) -> tuple[str, ...]:
    """Mesh axes in one entry of a PartitionSpec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def fit(spec: P, shape: Sequence[int]) -> P:
    """Storage of a weight; if its D is not divisible by fsdp x expert (1024 over 2048 cores), ``expert`` splits another
    dimension instead, or none."""

    def divides(dim: int, axes: Any) -> bool:
        return dim % axis_size(*axis_names(axes)) == 0

    if STORED not in tuple(spec) or all(divides(dim, axes) for dim, axes in zip(shape, spec, strict=True)):
        return spec
    entries = ["fsdp" if axes == STORED else axes for axes in spec]
    for i, dim in enumerate(shape):
        wider = (*axis_names(entries[i]), "expert")
        if spec[i] not in (STORED, LAYERS) and divides(dim, wider):
            entries[i] = wider
            break
    return P(*entries)


def spec_of(variable: nnx.Variable[Any], name: str = "a parameter") -> P:
    """PartitionSpec of a variable, in roles; without the stack's axis if the variable was sliced to one layer.

    Raises:
        ConfigError: it was made without one, or is a plain array; the message contains ``name``.
    """
    entries = variable.get_metadata("spec", None) if isinstance(variable, nnx.Variable) else None
    if entries is None:
        raise ConfigError(f"{name}: made without a PartitionSpec; use moe.layers.parameter.parameter")
    rank = variable.ndim
    return P(*(None,) * (rank - len(entries)), *entries[max(0, len(entries) - rank) :])


def flat_variables(variables: nnx.State) -> list[tuple[tuple[str, ...], nnx.Variable[Any]]]:
    """Path and variable of each, in the order of the leaves of a nested dict."""
    flat = ((tuple(map(str, path)), variable) for path, variable in nnx.to_flat_state(variables))
    return sorted(flat, key=operator.itemgetter(0))


def parameter_specs(variables: nnx.State) -> dict[str, Any]:
    """PartitionSpecs of a model's variables on the mesh in context, as a nested dict.

    Raises:
        ConfigError: a variable was made without one.
    """
    flat = nnx.to_flat_state(variables)
    return traverse_util.unflatten_dict({path: _storage(each, ".".join(map(str, path))) for path, each in flat})


def _storage(variable: nnx.Variable[Any], name: str = "a parameter") -> P:
    """Storage of a variable on the mesh in context. Over ``pipeline`` a stage stores whole layers if the stages divide
    their number; otherwise a part of each layer, along the first dimension that no other axis splits and the stages
    divide; otherwise everything."""
    shape = variable.shape
    spec = fit(spec_of(variable, name), shape)
    entries, stages = [None if axes == LAYERS else axes for axes in spec], axis_size("pipeline")
    if stages == 1 or LAYERS not in spec:
        return P(*entries)
    for i, dim in enumerate(shape):
        if dim % stages == 0 and axis_size(*axis_names(entries[i])) == 1:
            entries[i] = "pipeline"
            break
    return P(*entries)


def optimizer_specs(parameters: Any, specs: Any, optimizer: Any) -> Any:
    """PartitionSpecs of an optimizer state: those of the parameter for arrays of its shape, such as moments, and those
    of the remaining axes for arrays that lack one, such as Adafactor's factored moments. Counters are replicated.

    Args:
        parameters: nested dict of arrays or ShapeDtypeStructs.
        specs: of the parameters, in the same nested dict.
        optimizer: state whose arrays have paths that end with their parameter's.
    """

    def names(path: tuple[Any, ...]) -> tuple[str, ...]:
        keys = [getattr(key, "key", None) for key in path]
        start = max((i + 1 for i, key in enumerate(keys) if not isinstance(key, str)), default=0)
        return tuple(str(key) for key in keys[start:])

    shapes = {names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    stored = {names(path): spec for path, spec in leaves}

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        shape = shapes.get(names(path), ())
        entries = (*stored.get(names(path), ()), *(None,) * len(shape))[: len(shape)]
        if shape == leaf.shape:
            return P(*entries)
        for axis in range(len(shape)):
            if (*shape[:axis], *shape[axis + 1 :]) == leaf.shape:
                return P(*entries[:axis], *entries[axis + 1 :])
        return REPLICATED

    return jax.tree_util.tree_map_with_path(spec, optimizer)


def parameter_shardings(mesh: Mesh | None, variables: nnx.State, device: Any = None) -> dict[str, Any]:
    """Where each variable of a model is stored: split over the mesh; without one whole on a device, by default this
    process's first."""
    if mesh is None:
        whole = SingleDeviceSharding(device or jax.local_devices()[0])
        return jax.tree.map(lambda _: whole, nnx.to_pure_dict(variables))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return shardings(mesh, parameter_specs(variables))


def take_layer(stacked: nnx.State, index: Array) -> nnx.State:
    """Take one layer from stacked variables that are stored over ``pipeline``: sent by the devices that have it, or in
    parts, which are gathered where the layer is used. XLA by itself would gather all layers."""
    axis = axis_of("pipeline")

    def part(variable: nnx.Variable[Array]) -> nnx.Variable[Array]:
        layer = lax.dynamic_index_in_dim(variable[...], index, keepdims=False)
        return variable.replace(constrain(layer, P(*_storage(variable)[1:])))

    def take(stacked: nnx.State, index: Array) -> nnx.State:
        def one(layers: Array) -> Array:
            layer = lax.dynamic_index_in_dim(layers, index % len(layers), keepdims=False)
            return lax.psum(jnp.where(lax.axis_index(axis) == index // len(layers), layer, 0), axis)

        return jax.tree.map(one, stacked)

    with jax.named_scope(f"{WEIGHTS_SCOPE}layer"):
        if len(jax.tree.leaves(stacked)[0]) % axis_size("pipeline"):
            return jax.tree.map(part, stacked, is_leaf=lambda node: isinstance(node, nnx.Variable))
        spread = jax.shard_map(take, in_specs=(P(axis), P()), out_specs=P(), axis_names={axis}, check_vma=False)
        return spread(stacked, index)


def gather_for_matmul(weights: nnx.Variable[Array], dtype: Any) -> Array:
    """Cast a parameter of one layer and gather its stored shards for a matmul; its gradient is reduce-scattered."""
    return gather_array(weights[...], spec_of(weights), dtype)


def project(x: Float[Array, "*batch inputs"], weights: nnx.Variable[Array]) -> Float[Array, "*batch outputs"]:
    """Multiply by a gathered matrix onto heads or from them: [B,T,D] by [D,N,H] → [B,T,N,H], [B,T,N,H] by [N,H,D] →
    [B,T,D]."""
    shape = weights.shape
    inputs = weights.get_metadata("inputs")
    on_cpu = target.is_cpu()
    head_dim = shape[1] if inputs == 2 else shape[2]
    if head_dim >= target.LANES and not on_cpu:
        return jnp.tensordot(x, gather_for_matmul(weights, x.dtype), inputs)
    by = matmul if on_cpu else functools.partial(_onto, outputs=shape[inputs:])
    return project_joined(x, weights, by)


def project_joined(
    x: Float[Array, "*batch inputs"], weights: nnx.Variable[Array], by: Callable[[Array, Array], Array]
) -> Float[Array, "*batch outputs"]:
    """:func:`project` by a product with a matrix [D,N·H] or [N·H,D], whose result is shaped as the heads."""
    shape = weights.shape
    spec = spec_of(weights)
    inputs = weights.get_metadata("inputs")
    batch, outputs = x.shape[: x.ndim - inputs], shape[inputs:]
    # Of N and H, only N is split over devices.
    joined = P(spec[0], spec[inputs])
    matrix = gather_array(weights[...].reshape(math.prod(shape[:inputs]), -1), joined, x.dtype)
    return by(x.reshape(*batch, -1), matrix).reshape(*batch, *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _onto(
    x: Float[Array, "*batch D"], matrix: Float[Array, "D F"], outputs: tuple[int, ...]
) -> Float[Array, "*batch outputs"]:
    """Matmul whose result has the axes ``outputs``, which are joined only in the gradients.

    With heads of 64, which fill half the lanes, XLA for TPUs takes twice as long for the gradient of [D,N,H] as for
    that of [D,N·H] (compiled for v5p). If the result were joined, XLA would not fuse the product with what follows.
    With heads of 128 nothing is joined: Mixtral-8x7B's planned step took a hundredth longer with it.
    """
    return jnp.tensordot(x, matrix.reshape(-1, *outputs), 1)


def _onto_bwd(outputs, residuals, gradient):
    x, matrix = residuals
    rows = tuple(range(x.ndim - 1))
    gradient = gradient.reshape(*x.shape[:-1], -1)
    return gradient @ matrix.T, jnp.tensordot(x, gradient, (rows, rows))


_onto.defvjp(lambda x, matrix, outputs: (_onto(x, matrix, outputs), (x, matrix)), _onto_bwd)


def gather_array(weights: Array, spec: P, dtype: Any) -> Array:
    """Cast and gather, as :func:`gather_for_matmul`, an array that is stored as this spec says.

    The shardings are explicit because XLA might otherwise move tokens instead of weights.
    """
    stored = fit(spec, weights.shape)
    # One axis at a time: for both at once, XLA for TPUs emits an all-reduce of the zero-padded weight, and another for
    # the gradient, which doubles the traffic and compiles slowly.
    specs = [stored]
    for axis in reversed(STORED) if STORED in spec else ("fsdp",):
        specs.append(P(*(tuple(kept for kept in axis_names(axes) if kept != axis) for axes in specs[-1])))

    @jax.custom_vjp
    def gather(weights: Array) -> Array:
        return functools.reduce(constrain, specs[1:], weights)

    gather.defvjp(
        lambda weights: (gather(weights), None),
        lambda _, gradient: (functools.reduce(constrain, specs[-2::-1], gradient),),
    )
    with jax.named_scope(f"{WEIGHTS_SCOPE}whole"):
        return gather(weights.astype(dtype))


def gather_shard(shard: Array, dim: int) -> Array:
    """Gather a weight over ``fsdp`` from each device's shard, within ``shard_map``; its gradient is reduce-scattered.

    Args:
        shard: of one device, in the dtype of the products.
        dim: the dimension that is split.
    """
    with jax.named_scope(f"{WEIGHTS_SCOPE}shards"):
        for groups in _hops(axis_size("fsdp"), shard.shape[dim], _TILE_BYTES // shard.dtype.itemsize):
            shard = jax.lax.all_gather(shard, axis_of("fsdp"), axis=dim, tiled=True, axis_index_groups=groups)
    return shard


#: Bytes of one column of a tile in a TPU's memory: 16 rows of bfloat16 numbers.
_TILE_BYTES = 32


def _hops(size: int, rows: int = 16, tile_rows: int = 16) -> list[list[list[int]] | None]:
    """Groups of consecutive all-gathers: one over all devices, or two where the axis spans a 3D torus.

    XLA for TPUs has no all-gather over three torus dimensions: it adds up arrays padded with zeros, at twice the bytes
    and a write of each array. So the last dimension is gathered first, then the plane of the other two. In slices of
    the default shapes (4x4x4, 4x4x8, ... 8x16x16) the last dimension is the cube root of the chips, rounded up.

    If that leaves rows that do not fill whole tiles (2880 / 64 of each of 4 chips), the second hop would write whole
    matrices that must then be copied. In that case the plane of the last two dimensions is gathered first, and the
    first dimension after it, which takes longer on the network.

    Args:
        size: chips of the axis.
        rows: of a chip, in the dimension that is gathered.
        tile_rows: of a tile in a TPU's memory.
    """
    if size < 2:
        return []
    if size < 16 or not target.current().kind.has_3d_torus or size * axis_size("data") < axis_size(*AXES):
        return [None]
    side = 2 ** math.ceil(math.log2(size) / 3)
    if size % side:
        return [None]
    if rows * side % tile_rows:
        side = size // 2 ** math.floor(math.log2(size) / 3)
    places = np.arange(size).reshape(-1, side)
    return [places.tolist(), places.T.tolist()]


@jax.custom_vjp
def read_as(x: Array, cast: Array) -> Array:
    """Return ``cast``, which is x in another dtype; its gradient goes to x."""
    del x
    return cast


read_as.defvjp(
    lambda x, cast: (cast, jnp.zeros((), x.dtype)),
    lambda like, gradient: (gradient.astype(like.dtype), None),  # None: no work is done on zeros
)


def times(x: Float[Array, "*batch"], factor: float) -> Float[Array, "*batch"]:
    """Multiply by a number in float32, rounding once. JAX would round the number to x's dtype first, in bfloat16 by up
    to 2⁻⁸ of it, and so scale all of x by another number."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def matmul(x: Float[Array, "*batch D"], matrix: Float[Array, "D F"]) -> Float[Array, "*batch F"]:
    """``x @ matrix``; both have one dtype."""
    return _cpu_matmul(x, matrix) if target.is_cpu() else x @ matrix


@jax.custom_vjp
def _cpu_matmul(x: Array, matrix: Array) -> Array:
    return x @ matrix


def _gradients(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """Gradients of x and of the matrix.

    XLA's CPU folds a transposition into the matmul, whose kernel for a transposed left operand takes a tenth longer; in
    bfloat16 it has none and uses float32 at half the speed. A requested layout is not folded: [...,D] → [D,...] is
    written out. Without the barrier the computation of x is fused into that and runs column by column.
    """
    x, matrix = residuals
    rows = x.ndim - 1
    left = lax.optimization_barrier(x).transpose(rows, *range(rows))
    left = with_layout_constraint(left, Layout(major_to_minor=tuple(range(x.ndim))))
    d_x = lax.dot_general(gradient, matrix, (((rows,), (1,)), ((), ())))
    return d_x, lax.dot_general(left, gradient, ((tuple(range(1, x.ndim)), tuple(range(rows))), ((), ())))


_cpu_matmul.defvjp(lambda x, matrix: (x @ matrix, (x, matrix)), _gradients)
