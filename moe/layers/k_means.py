"""Router of centroids that move by online k-means, without a gradient (Ahrac et al. 2026)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from moe.config import ConfigError, ModelConfig
from moe.layers.moe_layer import MoELayer
from moe.layers.parameter import parameter
from moe.layers.router import Router, SelectionBias
from moe.parallel.partition_specs import REPLICATED
from moe.routing.balancing import BalanceSums, LayerReport
from moe.routing.interface import RouterKind
from moe.routing.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedSums(BalanceSums):
    """Sums of a training step with those of the tokens that each expert was sent.

    Attributes:
        routed: [E,D+1] sum of the tokens, and their number.
    """

    routed: Array


class KMeansRouter(Router):
    """Cosines of tokens with the experts' centroids [E,D], which are part of the state of
    :class:`moe.routing.balancing_rules.Centroids` and begin as random unit vectors; no parameters."""

    def __init__(self, config: ModelConfig, *, kind: RouterKind = "linear", rngs: nnx.Rngs):
        super().__init__(config, kind=kind, rngs=rngs)
        assert isinstance(self.bias, nnx.Dict)
        del self.kernel
        drawn = jax.random.normal(rngs.params(), (len(self.bias["bias"]), config.d_model))
        self.bias["centroids"] = parameter(_unit(drawn), REPLICATED, kind=SelectionBias)

    def features(self, x: Float[Array, "G S D"]) -> Float[Array, "G S D"]:
        """Tokens of length 1."""
        return _unit(x)

    def columns(self) -> Float[Array, "D E"]:
        """Centroids of length 1."""
        assert isinstance(self.bias, nnx.Dict)
        return _unit(self.bias["centroids"][...]).T


def _unit(vectors: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Vectors divided by their norms."""
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + 1e-12)


class KMeansMoE(MoELayer):
    """The layer of :class:`moe.routing.newer_gates.KMeans`, whose reports in training have :class:`RoutedSums`."""

    router_class = KMeansRouter

    def __init__(self, config: ModelConfig | None = None, **options: Any):
        super().__init__(config, **options)
        if gates := tuple(gate.name for gate in self.config.layer_gates):
            alone = "must be empty with centroids, which need the sums of every layer's tokens"
            raise ConfigError(f"model.moe.layer_gates={gates!r}: {alone}")

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[ArrayLike, "B T"] | None = None, **options: Any
    ) -> tuple[Float[Array, "B T D"], LayerReport, Routing]:
        """Apply the layer."""
        y, report, routing = super().__call__(x, mask, **options)
        if not options.get("train"):
            return y, report, routing
        tokens = jax.lax.stop_gradient(x.astype(jnp.float32)).reshape(*routing.broken.shape, -1)
        sent = jnp.any(routing.chosen, axis=-1, keepdims=True)  # neither padding nor broken
        tokens = jnp.pad(jnp.where(sent, tokens, 0.0), ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
        experts = jax.nn.one_hot(routing.expert_index, routing.router_logits.shape[-1]) * routing.chosen[..., None]
        chosen = jnp.sum(experts, axis=-2)  # [G,S,K,E] → [G,S,E]
        routed = jnp.einsum("gse,gsd->ed", chosen, tokens, precision=jax.lax.Precision.HIGHEST)
        sums = RoutedSums(
            **{f.name: getattr(report.sums, f.name) for f in dataclasses.fields(BalanceSums)}, routed=routed
        )
        return y, dataclasses.replace(report, sums=sums), routing
