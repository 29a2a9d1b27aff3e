"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a memory of fixed size in place of attention to all tokens.

N heads of values share M heads of queries and keys, J = N / M each (:mod:`moe.layers.delta_rule`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe.config import ModelConfig
from moe.layers.basic import KEEP_ALL, Dropout, RMSNorm, matrix, parameter
from moe.layers.delta_rule import delta_rule, delta_step, short_convolution
from moe.parallel import partition_specs
from moe.parallel.mesh import constrain
from moe.parallel.parameters import gather_for_matmul
from moe.parallel.partition_specs import ATTENTION, HEADS_IN, HEADS_OUT, IN

#: Steps of the decay at the start of training, between which its bias is drawn (as in Mamba 2 and the paper's code).
_FIRST_STEPS = 1e-3, 1e-1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaState:
    """State of one layer after a token; stacked over layers it gains a leading axis.

    Attributes:
        inputs: queries, keys and values of the last W-1 tokens before the convolution, [B,W-1,heads,dim] each.
        memory: [B,M,J,H,V] float32.
    """

    inputs: tuple[Array, ...]
    memory: Array


class GatedDeltaNet(nnx.Module):
    """Short convolutions of queries, keys and values, the gated delta rule, and a gated norm of its outputs."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, d = config, config.delta_net
        self.config = config
        keys, values = (d.key_heads, d.key_dim), (d.value_heads, d.value_dim)

        def project(shape: tuple[int, ...], spec: P) -> nnx.Param[Array]:
            return matrix(rngs, (c.d_model, *shape), spec, fan_in=c.d_model, scale=c.init_scale)

        def channels(shape: tuple[int, int]) -> nnx.Param[Array]:
            draw = jax.random.uniform(rngs.params(), (d.conv_width, *shape), jnp.float32, -1, 1)
            return parameter(draw * d.conv_width**-0.5, P(None, "tensor", None))

        self.query, self.query_conv = project(keys, HEADS_IN), channels(keys)
        self.key, self.key_conv = project(keys, HEADS_IN), channels(keys)
        self.value, self.value_conv = project(values, HEADS_IN), channels(values)
        self.gate = project(values, HEADS_IN)
        self.beta = project((d.value_heads,), IN)
        self.decay = project((d.value_heads,), IN)
        low, high = map(float, np.log(_FIRST_STEPS))
        steps = jnp.exp(jax.random.uniform(rngs.params(), (d.value_heads,), jnp.float32, low, high))
        self.decay_bias = parameter(steps + jnp.log(-jnp.expm1(-steps)), P("tensor"))  # softplus of it: the steps
        scales = jax.random.uniform(rngs.params(), (d.value_heads,), jnp.float32, 0.01, 16.0)
        self.log_decay_scale = parameter(jnp.log(scales), P("tensor"))
        self.norm = RMSNorm(d.value_dim, c.norm_eps)
        fan_in = d.value_heads * d.value_dim
        self.out = matrix(rngs, (*values, c.d_model), HEADS_OUT, fan_in=fan_in, scale=c.init_scale, inputs=2)

    @staticmethod
    def empty_state(config: ModelConfig, repeats: int, rows: int) -> DeltaState:
        """State before the first token, of equal layers stacked over the repeats."""
        d, dtype = config.delta_net, jnp.dtype(config.dtype)
        keys, values = (d.key_heads, d.key_dim), (d.value_heads, d.value_dim)

        def zeros(heads: tuple[int, int]) -> Array:
            shape = (repeats, rows, d.conv_width - 1, *heads)
            return constrain(jnp.zeros(shape, dtype), partition_specs.CACHE)

        shape = (repeats, rows, d.key_heads, d.value_heads // d.key_heads, d.key_dim, d.value_dim)
        memory = constrain(jnp.zeros(shape, jnp.float32), P(None, partition_specs.ROW_AXES, "tensor"))
        return DeltaState((zeros(keys), zeros(keys), zeros(values)), memory)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        *,
        drop: Dropout = KEEP_ALL,
    ) -> tuple[Float[Array, "B T N V"], DeltaState]:
        """Run whole rows, each document for itself.

        Args:
            x: normalised activations.
            segment_ids: the document of each token; 0 is padding.
            positions: not used: the decay stands for them.
            drop: not used: there are no attention weights.

        Returns:
            The heads, and the state after the last token of each row that is no padding.
        """
        del positions, drop
        raw = self._inputs(x)
        query, key, value = (
            checkpoint_name(short_convolution(heads, weight, segment_ids), ATTENTION)
            for heads, weight in zip(raw, self._kernels(), strict=True)
        )
        decay, beta = self._rates(x)
        y, memory = delta_rule(query, key, self._grouped(value), decay, beta, segment_ids)
        heads = checkpoint_name(self._joined(y).astype(x.dtype), ATTENTION)
        return heads, DeltaState(self._last(raw, segment_ids), memory)

    def step(self, x: Float[Array, "B 1 D"], state: DeltaState) -> tuple[Float[Array, "B 1 N V"], DeltaState]:
        """One more token a row."""
        raw = self._inputs(x)
        pairs = zip(state.inputs, raw, strict=True)
        inputs = [jnp.concatenate([old, new.astype(old.dtype)], axis=1) for old, new in pairs]
        ones = jnp.ones(inputs[0].shape[:2], jnp.int32)
        query, key, value = (
            short_convolution(heads, weight, ones)[:, -1] for heads, weight in zip(inputs, self._kernels(), strict=True)
        )
        decay, beta = (rate[:, 0] for rate in self._rates(x))
        y, memory = delta_step(query, key, self._grouped(value), decay, beta, state.memory)
        last = tuple(heads[:, 1:] for heads in inputs)
        return self._joined(y).astype(x.dtype)[:, None], DeltaState(last, memory)

    def join(self, heads: Float[Array, "B T N V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Output projection of all heads, normalised and gated by the layer's input."""
        gate = jnp.einsum("btd,dnh->btnh", x, gather_for_matmul(self.gate, x.dtype))
        heads = (self.norm(heads) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)
        return jnp.einsum("btnh,nhd->btd", heads, gather_for_matmul(self.out, heads.dtype))

    def _inputs(self, x: Array) -> tuple[Array, ...]:
        """Queries, keys and values before their convolutions."""
        weights = (gather_for_matmul(weight, x.dtype) for weight in (self.query, self.key, self.value))
        return tuple(constrain(jnp.einsum("btd,dnh->btnh", x, w), partition_specs.HEADS) for w in weights)

    def _kernels(self) -> tuple[Array, Array, Array]:
        return self.query_conv[...], self.key_conv[...], self.value_conv[...]

    def _rates(self, x: Array) -> tuple[Array, Array]:
        """Logarithm of the decay, and share that is replaced, [B,T,M,J] float32."""
        decay, beta = ((x @ gather_for_matmul(w, x.dtype)).astype(jnp.float32) for w in (self.decay, self.beta))
        scale, bias = (w[...].astype(jnp.float32) for w in (self.log_decay_scale, self.decay_bias))
        decay = -jnp.exp(scale) * jax.nn.softplus(decay + bias)
        shape = (*x.shape[:2], self.config.delta_net.key_heads, -1)
        return decay.reshape(shape), jax.nn.sigmoid(beta).reshape(shape)

    def _grouped(self, value: Array) -> Array:
        """[...,N,V] → [...,M,J,V]."""
        heads = self.config.delta_net.key_heads
        return value.reshape(*value.shape[:-2], heads, -1, value.shape[-1])

    def _joined(self, y: Array) -> Array:
        """[...,M,J,V] → [...,N,V]."""
        return y.reshape(*y.shape[:-3], -1, y.shape[-1])

    def _last(self, raw: tuple[Array, ...], segment_ids: Array) -> tuple[Array, ...]:
        """The last W-1 tokens of each row's last document, zeros before its first."""
        columns = np.arange(segment_ids.shape[1])
        last = jnp.max(jnp.where(segment_ids > 0, columns, 0), axis=1, keepdims=True)
        at = last - np.arange(self.config.delta_net.conv_width - 2, -1, -1)  # [B,W-1]
        index = jnp.maximum(at, 0)
        documents = (jnp.take_along_axis(segment_ids, where, axis=1) for where in (index, last))
        kept = (at >= 0) & (next(documents) == next(documents))

        def take(heads: Array) -> Array:
            return jnp.where(kept[..., None, None], jnp.take_along_axis(heads, index[..., None, None], axis=1), 0)

        return tuple(map(take, raw))
