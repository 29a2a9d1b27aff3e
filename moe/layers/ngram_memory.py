"""Memory of n-grams (Engram: Cheng et al. 2026, arXiv 2601.07372, section 2, and its code, engram_demo_v1.py).

A token reads a vector e, those of its last n ids joined, from a table whose rows are hashes of these ids, so that a
look-up costs the same for any number of rows. The hidden state h decides how much of it is added:

    k = e W_k      g = sigma(s(norm(h)·norm(k) / sqrt(D)))      v = g e W_v      h + v + silu(conv(norm(v)))

with s(x) = sign(x)·sqrt(max(abs(x), 1e-6)), which the code has and the paper does not, and conv a causal filter of each
channel over every n-th token, zero at first. Deviations: ids are hashed as they are, where the paper first maps ids of
like texts to one; tables have the learning rate of all parameters, without decay; there is one residual stream.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt

from moe.config import ModelConfig
from moe.config.memory_section import Ngrams
from moe.layers.call import Call, Report
from moe.layers.inputs import KEEP_ALL, Dropout, Rows, Site
from moe.layers.norms import RMSNorm
from moe.layers.parameter import matrix, zeros
from moe.parallel.mesh import AXES, ROW_AXES, axis_of, axis_size, constrain, on_mesh
from moe.parallel.parameters import axis_names, fit, gather_for_matmul, spec_of
from moe.parallel.partition_specs import BATCH, STORED

#: Least magnitude of what the squash takes the root of, whose gradient would be infinite at 0.
_LEAST = 1e-6

_WORD = 32  # bits of the halves in which hashes are computed: devices have no 64-bit integers


def ngram_rows(before: list[Int[Array, "B T"]], ngrams: Ngrams) -> Int[Array, "B T heads"]:
    """Row of the table for each head of each order.

    Args:
        before: ids of each token and of those before it in its document, the token's own first.
        ngrams: hashes.
    """
    hashed: tuple[Array, Array] | None = None
    rows: list[Array] = []
    sizes = dict(zip(ngrams.orders, ngrams.sizes, strict=True))
    offsets = iter(ngrams.offsets)
    for i, (ids, multiplier) in enumerate(zip(before, ngrams.multipliers, strict=True)):
        product = _product(ids.astype(jnp.uint32), multiplier)
        hashed = product if hashed is None else (hashed[0] ^ product[0], hashed[1] ^ product[1])
        rows += [_remainder(*hashed, size).astype(jnp.int32) + next(offsets) for size in sizes.get(i + 1, ())]
    return jnp.stack(rows, axis=-1)


def _product(ids: UInt[Array, "B T"], multiplier: int) -> tuple[UInt[Array, "B T"], UInt[Array, "B T"]]:
    """Upper and lower half of the 64-bit products of 32-bit numbers with a 64-bit one."""
    upper, lower = divmod(multiplier, 1 << _WORD)
    # The upper half of ids·lower, from products of 16 bits.
    low_ids, high_ids = ids & 0xFFFF, ids >> 16
    low, high = np.uint32(lower & 0xFFFF), np.uint32(lower >> 16)
    middle = high_ids * low + ((low_ids * low) >> 16)
    carried = high_ids * high + (middle >> 16) + ((low_ids * high + (middle & 0xFFFF)) >> 16)
    return carried + ids * np.uint32(upper), ids * np.uint32(lower)


def _remainder(upper: UInt[Array, "B T"], lower: UInt[Array, "B T"], size: int) -> UInt[Array, "B T"]:
    """A 64-bit number modulo a size below 2^31, by long division: as many bits at a time as fit beside a remainder."""
    rest, left = upper % np.uint32(size), _WORD
    while left:
        bits = min(_WORD - size.bit_length(), left)
        left -= bits
        digit = (lower >> left) & np.uint32((1 << bits) - 1)
        rest = ((rest << bits) | digit) % np.uint32(size)
    return rest


def earlier(x: Array, segment_ids: Int[Array, "B T"], by: int, fill: int) -> Array:
    """``x`` [B,T,...] of the token ``by`` places before each in its document; ``fill`` where there is none."""
    length, rest = x.shape[1], ((0, 0),) * (x.ndim - 2)
    moved = jnp.pad(x, ((0, 0), (by, 0), *rest))[:, :length]
    same = jnp.pad(segment_ids, ((0, 0), (by, 0)), constant_values=-1)[:, :length] == segment_ids
    return jnp.where(same.reshape(*same.shape, *(1 for _ in rest)), moved, fill)


def look_up(table: nnx.Variable[Array], rows: Int[Array, "B T heads"], dtype: jnp.dtype) -> Float[Array, "B T heads H"]:
    """Vectors of these rows, in this dtype; gradients are added in float32.

    On a mesh, each device looks up those of the rows that it stores, for the tokens of all devices with which it shares
    the table, and each gets the sum of what they found for its own tokens: only these vectors travel.
    """
    if axis_size(*AXES) == 1:
        return table[...][rows].astype(dtype)
    roles = axis_names(fit(spec_of(table), table.shape)[0])
    axes = tuple(axis_of(role) for role in roles if axis_size(role) > 1)

    def local(table: Array, rows: Array) -> Array:
        if not axes:
            return table[rows].astype(dtype)
        mine = jax.lax.all_gather(rows, axes, tiled=True) - jax.lax.axis_index(axes) * len(table)
        held = (mine >= 0) & (mine < len(table))
        found = jnp.where(held[..., None], table[jnp.where(held, mine, 0)], 0).astype(dtype)
        return jax.lax.psum_scatter(found, axes, tiled=True)

    batch = on_mesh(BATCH)
    specs = on_mesh(P(roles or None, None)), batch
    return jax.shard_map(local, in_specs=specs, out_specs=batch, check_vma=False)(table[...], rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryState:
    """State of one layer after a token; stacked over layers it gains a leading axis.

    Attributes:
        token_ids: [B,n-1] of the last tokens, for the largest n.
        values: [B,(W-1)·n,D], inputs of the convolution.
    """

    token_ids: Array
    values: Array


class NgramMemory(nnx.Module):
    """The look-up with which a layer begins. Generation carries a state, as of a token mixer."""

    def __init__(self, config: ModelConfig, ngrams: Ngrams, *, rngs: nnx.Rngs):
        c, m = config, config.memory
        self.config, self.ngrams = config, ngrams
        self.vectors = matrix(
            rngs, (ngrams.rows, m.head_dim), P(STORED, None), fan_in=c.d_model, scale=c.init_scale, inputs=0
        )
        shape = m.joined_dim, c.d_model
        self.key, self.value = (
            matrix(rngs, shape, P(None, STORED), fan_in=m.joined_dim, scale=c.init_scale) for _ in range(2)
        )
        self.query_norm, self.key_norm, self.value_norm = (RMSNorm.of(c) for _ in range(3))
        self.conv = zeros((m.conv_width, c.d_model))

    def run(self, x: Float[Array, "B T D"], call: Call) -> tuple[Float[Array, "B T D"], Report]:
        """Output for whole rows, or in generation for one more token."""
        y, state = call.mixed("memory", self, x, call.drop.at(Site.MEMORY_OUTPUT))
        return y, Report(state=state)

    @classmethod
    def empty_state(cls, config: ModelConfig, leading: tuple[int, int]) -> MemoryState:
        """The state before the first token.

        Args:
            config: of the model.
            leading: number of layers, and of rows.
        """
        m = config.memory
        token_ids = jnp.full((*leading, m.orders[-1] - 1), m.pad_id, jnp.int32)
        values = jnp.zeros((*leading, m.reach, config.d_model), jnp.dtype(config.dtype))
        return jax.tree.map(lambda leaf: constrain(leaf, P(None, ROW_AXES)), MemoryState(token_ids, values))

    def prefill(
        self, x: Float[Array, "B T D"], rows: Rows, drop: Dropout = KEEP_ALL
    ) -> tuple[Float[Array, "B T D"], MemoryState]:
        """Outputs of the memory for the tokens of whole rows, and the state after each row's last token."""
        m, segment_ids = self.config.memory, rows.segment_ids
        before = [earlier(rows.token_ids, segment_ids, by, m.pad_id) for by in range(m.orders[-1])]
        gated, normalised = self._read(x, before)
        inputs = [earlier(normalised, segment_ids, by, 0) for by in range(0, m.reach + 1, m.orders[-1])]
        state = MemoryState(
            last(rows.token_ids, segment_ids, m.orders[-1] - 1, m.pad_id), last(normalised, segment_ids, m.reach, 0)
        )
        return constrain(drop(self._convolve(gated, inputs)), BATCH), state

    def fill(self, state: MemoryState, found: MemoryState, lengths: Int[Array, " B"]) -> MemoryState:
        """The state after prompts, which :meth:`prefill` found."""
        del state, lengths
        return found

    def step(
        self, x: Float[Array, "B 1 D"], rows: Rows, state: MemoryState
    ) -> tuple[Float[Array, "B 1 D"], MemoryState]:
        """Outputs of the memory for one more token of each row, and the state after it."""
        order = self.config.memory.orders[-1]
        token_ids = jnp.concatenate([state.token_ids, rows.token_ids], axis=1)
        gated, normalised = self._read(x, [token_ids[:, order - 1 - by, None] for by in range(order)])
        values = jnp.concatenate([state.values, normalised], axis=1)
        y = self._convolve(gated, [values[:, by, None] for by in range(self.config.memory.reach, -1, -order)])
        return y, MemoryState(token_ids[:, 1:], values[:, 1:])

    def _read(self, x: Array, before: list[Array]) -> tuple[Array, Array]:
        """Gated values [B,T,D], and what the convolution reads of them."""
        read = look_up(self.vectors, ngram_rows(before, self.ngrams), x.dtype)
        read = constrain(read.reshape(*read.shape[:2], -1), BATCH)
        key, value = (read @ gather_for_matmul(weight, x.dtype) for weight in (self.key, self.value))
        query, key = (y.astype(jnp.float32) for y in (self.query_norm(x), self.key_norm(key)))
        score = jnp.sum(query * key, axis=-1, keepdims=True) * x.shape[-1] ** -0.5
        gate = jax.nn.sigmoid(jnp.sign(score) * jnp.sqrt(jnp.maximum(jnp.abs(score), _LEAST)))
        gated = (gate * value.astype(jnp.float32)).astype(x.dtype)
        return gated, self.value_norm(gated)

    def _convolve(self, gated: Array, inputs: list[Array]) -> Array:
        """The gated values, and the convolution of ``inputs``: those of the token and of every n-th before it."""
        kernel = self.conv[...].astype(jnp.float32)
        y = sum(x.astype(jnp.float32) * kernel[-1 - i] for i, x in enumerate(inputs))
        return (gated.astype(jnp.float32) + jax.nn.silu(y)).astype(gated.dtype)


def last(x: Array, segment_ids: Int[Array, "B T"], count: int, fill: int) -> Array:
    """``x`` [B,T,...] of the last tokens [B,count,...] of each row's last document; ``fill`` before its first."""
    columns = np.arange(segment_ids.shape[1])
    end = jnp.max(jnp.where(segment_ids > 0, columns, 0), axis=1, keepdims=True)
    at = end - np.arange(count - 1, -1, -1)  # [B,count]
    index = jnp.maximum(at, 0)
    documents = (jnp.take_along_axis(segment_ids, where, axis=1) for where in (index, end))
    kept = (at >= 0) & (next(documents) == next(documents))
    rest = (1,) * (x.ndim - 2)
    found = jnp.take_along_axis(x, index.reshape(*index.shape, *rest), axis=1)
    return jnp.where(kept.reshape(*kept.shape, *rest), found, fill)
