"""The experts' FFN: its weights, its activations, and its two halves, which every backend computes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int, PRNGKeyArray

from moe.dispatch import quantized
from moe.parallel.mesh import axis_of
from moe.parallel.parameters import gather_array, times
from moe.parallel.partition_specs import EXPERT_BIASES, EXPERTS_IN, EXPERTS_OUT, GROUPS, HIDDEN, REPLICATED

#: Slope of the sigmoid, and bound of both inputs, in gpt-oss.
SWIGLU_SLOPE, SWIGLU_LIMIT = 1.702, 7.0


def _clamped_swiglu(gate: Array, up: Array) -> Array:
    gate, up = jnp.minimum(gate, SWIGLU_LIMIT), jnp.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * jax.nn.sigmoid(times(gate, SWIGLU_SLOPE)) * (up + 1)


#: (rows, matrices) → rows times their experts' matrices; takes ``transposed=True`` where ``down`` may be transposed.
Matmul = Callable[..., Array]

#: (gate, up) → hidden activation. geglu uses the tanh approximation, as T5 does; geglu_exact the error function.
GATED_ACTIVATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
    "swiglu_clamped": _clamped_swiglu,
    "geglu": lambda gate, up: jax.nn.gelu(gate) * up,
    "geglu_exact": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "reglu": lambda gate, up: jax.nn.relu(gate) * up,
}


PLAIN_ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}


def activate(
    activation: str, up: Float[Array, "*batch F"], gate: Float[Array, "*batch F"] | None
) -> Float[Array, "*batch F"]:
    """Hidden activation of an FFN: act(gate)·up where gated (Shazeer 2020), act(up) otherwise."""
    if gate is not None:
        return GATED_ACTIVATIONS[activation](gate, up)
    return PLAIN_ACTIVATIONS[activation](up)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertDropout:
    """Dropout of the experts' hidden activations (Switch 2021, section 4.2, "expert dropout").

    What is dropped depends only on the key and on the number of a row's assignment in the batch, not on the mesh or on
    how assignments reach their experts.

    Attributes:
        key: of the layer.
        rate: share of numbers set to 0, static; the others are divided by 1 − rate.
        rows: number of each row's assignment; None before rows are made.
    """

    key: PRNGKeyArray
    rate: float = dataclasses.field(metadata={"static": True})
    rows: Int[Array, " ..."] | None = None

    @property
    def assignments(self) -> Int[Array, " ..."]:
        """Number of each row's assignment, once rows are made."""
        assert self.rows is not None
        return self.rows

    def __call__(self, hidden: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
        """Drop hidden activations."""
        width, tensor = hidden.shape[-1], axis_of("tensor")
        # Within shard_map a device that has a part of F draws for all of F: only its part is computed.
        is_split = tensor in jax.sharding.get_abstract_mesh().manual_axes
        parts, first = (jax.lax.axis_size(tensor), jax.lax.axis_index(tensor)) if is_split else (1, 0)

        def draw(row: Array) -> Array:
            kept = jax.random.bernoulli(jax.random.fold_in(self.key, row), 1.0 - self.rate, (parts * width,))
            return jax.lax.dynamic_slice_in_dim(kept, first * width, width) if is_split else kept

        kept = jax.vmap(draw)(self.assignments.reshape(-1)).reshape(hidden.shape)
        return jnp.where(kept, hidden.astype(jnp.float32) / (1.0 - self.rate), 0).astype(hidden.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """E FFNs of one shape: their weights, and how they are applied.

    The bias of ``down`` is not among them: what a device computes may be a partial sum, so the layer adds it. A backend
    packs the weights in the form that its products read (:meth:`moe.dispatch.backends.Backend.pack`).

    Attributes:
        up: [E,D,F].
        gate: [E,D,F]; None for a plain activation.
        down: [E,F,D].
        biases: [E,F] of up and of gate; None: without biases.
        dropout: of the hidden activations; None: none.
        activation: a value of ``model.activation``, static.
        precision: of the factors, a value of ``model.low_precision``, static.
        sent_precision: of rows, and of gradients of outputs, on their way to other hosts, likewise.
        keeps_hidden: hidden activations are kept for the backward pass; else row blocks recompute them in it, static.
        keeps_outputs: outputs of experts on other devices are kept likewise; else the backward pass reads none, static.
    """

    up: Array
    gate: Array | None
    down: Array
    biases: tuple[Array, Array | None] | None = None
    dropout: ExpertDropout | None = None
    activation: str = dataclasses.field(kw_only=True, metadata={"static": True})
    precision: str = dataclasses.field(default="none", metadata={"static": True})
    sent_precision: str = dataclasses.field(default="none", metadata={"static": True})
    keeps_hidden: bool = dataclasses.field(default=True, metadata={"static": True})
    keeps_outputs: bool = dataclasses.field(default=True, metadata={"static": True})

    #: ``down`` is [E,D,F].
    down_transposed: ClassVar[bool] = False

    @property
    def into(self) -> tuple[Any, Any]:
        """Matrices and biases that :meth:`into_hidden` takes."""
        return (self.up, self.gate), self.biases

    def split(self, products: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        """The products of rows with up and with gate, of those with the matrices of :attr:`into`."""
        return products

    def into_hidden(self, rows: Array, into: tuple[Any, Any], matmul: Matmul) -> tuple[Array, Array | None]:
        """First half of an FFN: inputs of the nonlinearity, from up and from gate.

        Args:
            into: :attr:`into`, or one expert's.
        """
        matrices, biases = into
        products = jax.tree.map(lambda matrix: matmul(rows, matrix), matrices)
        if biases is None:
            return self.split(checkpoint_name(products, HIDDEN))
        # A bias is a matrix whose input is 1, so that each row gets its own expert's bias in every form of dispatch.
        # The biases of up and gate are added separately: XLA for TPUs then adds one together with the nonlinearity.
        ones = jnp.ones_like(rows[..., :1])
        hidden = jax.tree.map(lambda x, bias: x + matmul(ones, jnp.expand_dims(bias, -2)), self.split(products), biases)
        return checkpoint_name(hidden, HIDDEN)

    def quantizes(self, matrices: Array) -> bool:
        """Whether the product with these matrices has quantised factors; not with a bias, a matrix of one row."""
        return self.precision != "none" and matrices.shape[-2] > 1

    def at(self, rows: Int[Array, "*rows"]) -> ExpertWeights:
        """The same weights, with dropout for rows that hold these assignments."""
        assert self.dropout is not None
        return dataclasses.replace(self, dropout=dataclasses.replace(self.dropout, rows=rows))

    def part(self, tokens: slice) -> ExpertWeights:
        """The same weights, with the dropout, if any, of a part of the tokens (assignments [G,S,K])."""
        return self if self.dropout is None else self.at(self.dropout.assignments[:, tokens])

    def astype(self, dtype: Any) -> ExpertWeights:
        """All weights cast, split over devices as stored."""
        cast = jax.tree.map(lambda array: array.astype(dtype), dataclasses.replace(self, dropout=None))
        return dataclasses.replace(cast, dropout=self.dropout)

    def gathered(self, dtype: Any) -> ExpertWeights:
        """All weights cast, and gathered over ``fsdp`` for matmuls."""
        gate = None if self.gate is None else gather_array(self.gate, EXPERTS_IN, dtype)
        return dataclasses.replace(
            self,
            up=gather_array(self.up, EXPERTS_IN, dtype),
            gate=gate,
            down=gather_array(self.down, EXPERTS_OUT, dtype),
            biases=jax.tree.map(lambda bias: bias.astype(dtype), self.biases),
        )

    def specs(self) -> Any:
        """The same structure with PartitionSpecs of the stored weights, and of dropout's numbers [G,S,K], as leaves."""
        gate = None if self.gate is None else EXPERTS_IN
        biases = jax.tree.map(lambda _: EXPERT_BIASES, self.biases)
        specs: dict[str, Any] = {"up": EXPERTS_IN, "gate": gate, "down": EXPERTS_OUT, "biases": biases}
        if self.dropout is not None:
            specs["dropout"] = dataclasses.replace(self.dropout, key=REPLICATED, rows=GROUPS)
        return dataclasses.replace(self, **specs)


def out_of_hidden(
    hidden: tuple[Array, Array | None],
    down: Array,
    activation: str,
    dropout: ExpertDropout | None,
    matmul: Matmul,
    scale: Array | None = None,
) -> Array:
    """Second half of an FFN: the nonlinearity, dropout and down; ``scale``: factors of the rows."""
    activations = activate(activation, *hidden)
    if dropout is not None:
        activations = dropout(activations)
    if scale is not None:
        activations = (activations * scale[:, None]).astype(activations.dtype)
    return matmul(activations, down)


def ffn(rows: Array, weights: ExpertWeights, matmul: Matmul, scale: Array | None = None) -> Array:
    """Both halves; ``scale``: factors of the rows' outputs."""
    hidden = weights.into_hidden(rows, weights.into, matmul)
    if weights.down_transposed:
        matmul = functools.partial(matmul, transposed=True)
    return out_of_hidden(hidden, weights.down, weights.activation, weights.dropout, matmul, scale)


def batched_ffn(rows: Float[Array, "E R D"], weights: ExpertWeights) -> Float[Array, "E R D"]:
    """Apply expert e to its R rows."""

    def matmul(rows: Array, matrices: Array) -> Array:
        if weights.quantizes(matrices):
            return quantized.matmul(rows, matrices, weights.precision)
        return jnp.einsum("eri,eij->erj", rows, matrices)

    return ffn(rows, weights, matmul)
