"""Factors of each parameter's learning rate and gradient in a model that takes over a smaller one's settings.

With m the factor by which a matrix's fan-in has grown (D: width, F of an expert: its own), M that of D, L that of the
depth, and σ = 1/sqrt(fan-in) as everywhere:

======================================  =====================  =================  ==============================
parameter                               rate, Adam             gradient           rate, Muon
======================================  =====================  =================  ==============================
matrices of attention, FFN, experts     1/m                    M L                f/f₀, f² = out/(in·max(in, out))
router and its like                     1/m                    L                  Adam's
embedding, unembedding                  1/sqrt(M)              sqrt(M)            Adam's
norm scales, biases                     1                      M L                Adam's
======================================  =====================  =================  ==============================

Like the router are the gate of a shared expert and the mix of constant experts, whose columns do not grow with D, so
that their gradients do not shrink. L is of residual branches: the final norm has none, nor have the projection and the
norms of prediction layers outside their block.

Sources: muP (Yang et al. 2022, arXiv 2203.03466, table 8) and CompleteP (Dey et al. 2025, arXiv 2505.01618, table 1,
α = 1). A gradient times c has the effect of ε divided by c. Weight decay is muP's λ·m times the rate η/m, so it has
no factor. For embedding and unembedding muP keeps σ while the width grows; their rates and two factors in the forward
pass give an equivalent model (Yang et al. 2022, lemma J.1): embeddings times sqrt(M), logits times 1/sqrt(M) instead of
1/M. CompleteP multiplies what attention and FFN add by 1/L (:class:`moe.config.ModelConfig` fills these in).

The router has the rate of an output, and σ ∝ M^-1/2 where muP's table has 1/M: so first logits do not vanish as M grows
(docs/transfer.md has both measured).

Experts are hidden matrices and E is a number of outputs, like V, as in muP for MoE (Małaśnicki et al. 2025, arXiv
2508.09752): neither E nor K has a factor.

What is decayed, and who moves it, follows from the same roles:

====================================================================  =======  ==================
role                                                                  decayed  with ``muon``
====================================================================  =======  ==================
matrix: attention, FFNs, experts, latents, prediction's projection    yes      Muon
router, shared expert's gate, mix of constant experts, memory's key,  yes      AdamW
value
embedding, unembedding                                                yes      AdamW
vector: norm scales, biases, tables of relative biases, sinks,        no       AdamW
constant and novice experts' and memories' vectors, a delta net's
rates, convolutions (a filter for each channel)
====================================================================  =======  ==================

Decay (decoupled, Loshchilov and Hutter 2019) acts on what multiplies activations: it would pull to 0 what constant
experts (MoE++, Jin et al. 2024) and novices (MoNE) return. A depthwise convolution is a filter for each channel,
without an input that grows. Muon is for hidden matrices, AdamW for the rest (Liu et al. 2025, section 2.2).

An update of Muon here has an RMS of 0.2 whatever the shape, so its spectral norm is 0.2·sqrt(max(in, out)); features
need sqrt(out/in) (Yang et al. 2023, arXiv 2310.17813, condition 1): hence f, relative to the base's shape.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from moe.config import ModelConfig
from moe.config.mixers import BUILT_IN_PATHS
from moe.models.segments import PREDICTION, part_of

#: Ends of the names of vectors, or of their owners, as of a table of relative biases.
_VECTORS = ("scale", "bias", "sinks", "vectors", "novices", "conv")


def rates(model: ModelConfig, optimizer: str, parameters: Any) -> Any:
    """Factor of each parameter's learning rate.

    Args:
        model: with the sizes of its base model.
        optimizer: ``adamw`` or ``muon``.
        parameters: nested dict of arrays or shapes.
    """

    def rate(path: Any, leaf: Any) -> float:
        names = [key.key for key in path]
        if part_of(names) in ("embedding", "unembedding"):
            return model.width_growth**-0.5
        if not is_matrix(path):
            return 1.0
        grown_in, grown_out = _growth(model, names)
        axes = matrix_axes(path) if optimizer == "muon" else None
        if axes is None:
            return 1 / grown_in
        size_in, size_out = (_size(leaf, own) for own in (axes.reduction_axis, axes.output_axis))
        return _spectral(size_in, size_out) / _spectral(size_in / grown_in, size_out / grown_out)

    return jax.tree_util.tree_map_with_path(rate, parameters)


def gains(model: ModelConfig, parameters: Any) -> Any:
    """Factor of each parameter's gradient."""
    width, depth = model.width_growth, model.depth_growth

    def gain(path: Any, _: Any) -> float:
        names = [key.key for key in path]
        if part_of(names) in ("embedding", "unembedding"):
            return width**0.5
        in_branch = names[0].startswith("segment_") or names[:2] == [PREDICTION, "block"]
        return (1.0 if _has_few_columns(names) else width) * (depth if in_branch else 1.0)

    return jax.tree_util.tree_map_with_path(gain, parameters)


def _growth(model: ModelConfig, names: list[str]) -> tuple[float, float]:
    """Ratio of the input and output dimension of a matrix to those of the base model; the dimension of latent experts
    grows with D."""
    width, part = model.width_growth, part_of(names)
    if part == "experts":
        grown = model.expert_growth
        return (grown, width) if names[-1] == "down" else (width, grown)
    return width, 1.0 if _has_few_columns(names) else width


def _has_few_columns(names: list[str]) -> bool:
    """Whether a parameter's number of columns does not grow with D."""
    return part_of(names) == "router" or names[-2:] in (["shared", "gate"], ["null", "mix"])


def _size(leaf: Any, axes: Any) -> float:
    return float(np.prod([leaf.shape[axis] for axis in axes]))


def _spectral(size_in: float, size_out: float) -> float:
    """Ratio of the spectral norm that features need to that of an update with RMS 1, up to a constant."""
    return (size_out / (size_in * max(size_in, size_out))) ** 0.5


def is_matrix(path: Any) -> bool:
    """Whether a parameter is a matrix, an embedding or a router by the table above, and not a vector."""
    return not any(key.key.endswith(_VECTORS) for key in path[-2:])


def matrix_axes(path: Any, heads: bool = False) -> optax.contrib.MuonDimensionNumbers | None:
    """Input and output axes of a matrix by the last two names of its path; None if Muon does not update it.

    ``heads``: each head of attention is a matrix; else all heads of a projection are one.
    """
    if [key.key for key in path[-2:]] == [PREDICTION, "project"]:  # [2D,D]
        return optax.contrib.MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,))
    owner, name = path[-2].key if len(path) > 1 else "", path[-1].key
    mixer = owner in BUILT_IN_PATHS
    if mixer and name in ("query", "key", "value", "gate", "query_up", "kv_up"):  # [D,N,H]
        return optax.contrib.MuonDimensionNumbers(reduction_axis=(-3,), output_axis=(-1,) if heads else (-2, -1))
    if mixer and name == "out":  # [N,H,D]
        return optax.contrib.MuonDimensionNumbers(reduction_axis=(-2,) if heads else (-3, -2), output_axis=(-1,))
    ffn = owner in ("dense", "experts", "latent") and name in ("gate", "up", "down")
    if ffn or (mixer and name in ("query_down", "kv_down")):  # [D,F], [F,D]
        return optax.contrib.MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,))
    return None
