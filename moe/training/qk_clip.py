"""QK-clip: after an update, heads whose attention scores were too large get smaller queries and keys.

Kimi K2 (2025, arXiv 2507.20534, section 2.1, algorithm 1, "MuonClip" with Muon): with S the largest score of a head in
the step's batch and τ the threshold (100 there), a head with S > τ has γ = τ / S, and its scores are multiplied by γ:

* attention with keys of its own: its queries and keys are each multiplied by sqrt(γ);
* latent attention: what is not rotated of them by sqrt(γ), its rotated queries by γ, the rotated key that all heads
  share not at all.

Where several heads share keys, γ is the smallest of these heads' for all of them, as in Megatron-Core. Biases of
queries and keys are multiplied as their matrices are. S is of pairs that attention sees, within documents and without
padding; moments are not scaled.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from moe.config import ModelConfig, OptimizerConfig
from moe.config.layer_kinds import layer_kinds
from moe.layers.call import Report
from moe.layers.mixers.table import layer_class
from moe.models.segments import stacked_layers

#: Name of the layers' signal that is read.
SIGNAL = "largest_scores"


def score_factor(scores: Float[Array, "*heads"], threshold: float) -> Float[Array, "*heads"]:
    """γ of each head: τ / S where S > τ, else 1."""
    return threshold / jnp.maximum(scores, threshold)


def score_metrics(config: OptimizerConfig, report: Report) -> dict[str, Array]:
    """``largest_score`` of each layer with attention, and the number of ``clipped_heads`` of all of them."""
    scores = report.signals[SIGNAL]
    clipped = jnp.sum(scores > config.qk_clip).astype(jnp.float32)
    return {"largest_score": jnp.max(scores, axis=1), "clipped_heads": clipped}


def shape_of_scores(model: ModelConfig) -> jax.ShapeDtypeStruct:
    """Shape of the largest attention scores of a model's layers, [L,N]."""
    return jax.ShapeDtypeStruct((len(_scored(model)), model.num_heads), jnp.float32)


def _scored(model: ModelConfig) -> list[int]:
    """Layers that compute attention scores, whose number is their row of these."""
    return [layer for layer, kind in enumerate(layer_kinds(model)) if kind.mixer.score_dims]


def qk_clip(model: ModelConfig, threshold: float) -> optax.GradientTransformationExtraArgs:
    """Change updates so that they lead to clipped parameters; ``update`` takes ``report=``, whose ``largest_scores``
    are the largest attention scores [L,N] of the layers that have attention."""
    kinds = layer_kinds(model)
    rows = {layer: row for row, layer in enumerate(_scored(model))}

    def factors(names: list[str], gamma: Float[Array, "L N"]) -> Array | None:
        """Factors that broadcast to a parameter; None if it has none."""
        stacked = stacked_layers(model, names)
        if stacked is None or not set(stacked[0]) <= rows.keys():
            return None
        layers, (owner, *rest) = stacked
        mixer = kinds[layers[0]].mixer
        if owner != mixer.path or len(rest) != 1:
            return None
        own = gamma[np.asarray([rows[layer] for layer in layers])]
        return layer_class(mixer).score_factors(mixer, own).get(rest[0])

    def update(updates: Any, state: Any, params: Any = None, **known: Any) -> tuple[Any, Any]:
        gamma = score_factor(known["report"].signals[SIGNAL], threshold)

        def leaf(path: Any, moved: Array, parameter: Array) -> Array:
            factor = factors([key.key for key in path], gamma)
            # factor·(parameter + update) − parameter, and the update itself where the factor is 1.
            return moved if factor is None else moved + (factor - 1) * (parameter + moved)

        return jax.tree_util.tree_map_with_path(leaf, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
