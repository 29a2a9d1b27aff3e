"""Routing rules whose choice depends on more than a token's logits: on the batch, on thresholds, on its document."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.routing.balancing_rules import BalancingRule, BiasRule, Centroids, RunningThreshold
from moe.routing.gates import TopK, every_expert, require_weights_that_differ
from moe.routing.interface import Gate, GateInputs, GateOutput, Scored, ScoreFunction, pick, rank, top_k
from moe.system.fields import require, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinkhorn(Scored):
    """In training, top-K of a transport plan that gives every expert an equal share of the batch; otherwise top-K of
    the logits (S-BASE: Clark et al. 2022, section 3.3 and appendix B; Megatron-Core's ``sinkhorn``).

    The plan is u_t·exp(logit_te)·v_e with equal sums of its rows, and of its columns. The K largest entries of a row
    are those of logit + ln v, so ln v is a selection bias, computed for the batch. Weights are the scores.
    """

    looks_ahead: ClassVar[bool] = True

    k: int = setting(1, least=1)
    iterations: int = setting(16, least=1, most=1000)  # Sinkhorn's; the paper stops at a tolerance

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights_that_differ(self.k, self.renormalise)

    @property
    def generates(self) -> bool:
        """True: outside training a token's experts depend on its own logits."""
        return True

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Choose by the plan or by the logits, and weigh by the scores."""
        bias = column_potentials(router_logits, inputs.mask, self.iterations) if inputs.train else 0.0
        return self.weigh(router_logits, inputs, top_k(router_logits + bias, self.k)[1])


def column_potentials(logits: Float[Array, "G S E"], mask: Bool[Array, "G S"], iterations: int) -> Float[Array, " E"]:
    """ln v of a transport plan u_t·exp(logit_te)·v_e whose rows, and whose columns, have equal sums over the masked-in
    tokens, after some of Sinkhorn's iterations; without a gradient, and with a mean of 0."""
    logits = jax.lax.stop_gradient(logits)

    def scale(_: Any, potentials: Array) -> Array:
        rows = jax.nn.logsumexp(logits + potentials, axis=-1, keepdims=True)  # -ln u, [G,S,1]
        columns = jax.nn.logsumexp(jnp.where(mask[..., None], logits - rows, -jnp.inf), axis=(0, 1))
        columns = jnp.where(jnp.isfinite(columns), columns, 0.0)  # no real token
        return jnp.mean(columns) - columns

    return jax.lax.fori_loop(0, iterations, scale, jnp.zeros(logits.shape[-1], jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningThresholds(Gate):
    """Every expert whose threshold a token's softmax probability exceeds, in training too, so no token depends on
    another (Expert Threshold Routing 2026, arXiv 2603.11535).

    A threshold is the moving average of the probability that K/E of a step's tokens exceed, corrected for its start.
    In the first step there are none, and every expert takes every token.
    """

    lists_all: ClassVar[bool] = True
    reweighs: ClassVar[bool] = True

    k: int = setting(2, least=1)  # experts per token on average
    threshold_rate: float = setting(0.05, least=0, most=1e6)  # of the moving average; not from the paper

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Apply the thresholds; the selection bias holds them negated."""
        probs, index = jax.nn.softmax(router_logits, axis=-1), every_expert(router_logits, inputs)
        weights = pick(probs, index)
        bias = 0.0 if inputs.selection_bias is None else inputs.selection_bias
        sent = weights + pick(jnp.broadcast_to(bias, probs.shape), index) > 0
        needed = -jax.lax.stop_gradient(probs) if inputs.train else None
        return GateOutput(index, weights, sent, needed_bias=needed)

    @property
    def balancing(self) -> BalancingRule:
        """The rule of the thresholds."""
        return RunningThreshold(self.threshold_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasedLogits(TopK):
    """Top-K of the logits + selection bias, weighted by the scores of the logits alone (Kolibri-1's released code:
    Aleph Alpha 2026, ``transformers.models.kolibri1``).

    The code does not say how the biases move in training: ``bias`` offers the rules of :class:`TopK`.
    """

    biases_logits: ClassVar[bool] = True

    k: int = setting(6, least=1)
    score: ScoreFunction = "sigmoid"

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Select by logit, bias and groups."""
        return self.select(router_logits, inputs, router_logits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(TopK):
    """Top-K of cosines: a token's logits are those of its projection to a small dimension with the experts' centroids
    there, over a learned temperature τ (X-MoE: Chi et al. 2022, arXiv 2204.09179, equations 5 and 6; 64 dimensions as
    in Ternovtsii and Bilak 2026, arXiv 2604.14419).

    W_g holds the centroids, [router_dim,E].
    """

    layer: ClassVar[str] = "moe.layers.cosine:CosineMoE"

    k: int = setting(1, least=1)
    router_dim: int = setting(64, least=1, most=2**16)
    temperature: float = setting(0.07, least=0.01, most=100.0)  # τ at the start

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Select by score, bias and groups."""
        return self.select(router_logits, inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zaya(TopK):
    """Top-K of the softmax of an MLP's logits, not renormalised; the MLP reads a vector to which each router adds its
    projection of x (ZAYA1's released code: Zyphra 2026, ``transformers.models.zaya``).

    The last column is an expert that returns 0 (``zero_experts`` = 1), and ``skip_bias`` is added to its score for the
    choice only. In ZAYA1 all biases move during training, by a rule that the code does not contain; ``bias`` offers
    those of :class:`TopK`.
    """

    layer: ClassVar[str] = "moe.layers.zaya:ZayaMoE"

    k: int = setting(1, least=1)
    router_dim: int = setting(256, least=1, most=2**16)  # H of the vector and of the MLP
    skip_bias: float = setting(-1.0, least=-1e6, most=1e6)

    def first_carry(self, num_experts: int) -> Any:
        """The vector below the lowest MoE layer: zeros."""
        del num_experts
        return jnp.zeros(self.router_dim)

    def check_experts(self, num_experts: int, null_experts: int = 0) -> None:
        """Check K and the expert that is skipped to."""
        super().check_experts(num_experts, null_experts)
        allowed = f"must be 1, and copy, constant and novice experts 0, with the gate {self.name!r}"
        require(null_experts == 1, "model.moe.zero_experts", null_experts, allowed)

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Select by score and biases."""
        is_skip = jnp.arange(router_logits.shape[-1]) == router_logits.shape[-1] - 1
        return self.select(router_logits, inputs, self.scores(router_logits) + jnp.where(is_skip, self.skip_bias, 0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matryoshka(TopK):
    """Top-K whose K is drawn in training, for every layer and microbatch, so that K may be chosen in evaluation (M-MoE:
    Wang et al. 2025, arXiv 2509.26520: K_l uniform from k_min to k_max, independently in each layer). The default
    range, 1 to 6, is not from the paper.

    A token's experts at a smaller K are the first of those at a larger one, with the same weights: the softmax over all
    experts, not renormalised.
    """

    k: int = setting(6, least=1)  # k_max
    least_k: int = setting(1, least=1)  # k_min
    eval_k: int = setting(0, least=0)  # experts per token in evaluation; 0: k

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "model.moe.gate."
        for name in ("least_k", "eval_k"):
            value = getattr(self, name)
            require(value <= self.k, f"{where}{name}", value, f"must be at most k={self.k}")
        same = "must be False where K is drawn: an expert's weight would depend on how many follow it"
        require(not self.renormalise, f"{where}renormalise", self.renormalise, same)
        fixed = "must be none, sign or momentum where K is drawn: the quantile is of a fixed K"
        require(self.bias != "quantile", f"{where}bias", self.bias, fixed)

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Send the first of K assignments: as many as are drawn, or without a key those of evaluation."""
        output, sent = self.select(router_logits, inputs), self.eval_k or self.k
        if inputs.train:
            sent = self.k
        if inputs.rng is not None:
            sent = jax.random.randint(inputs.rng, (), self.least_k, self.k + 1)
        accepted = jnp.broadcast_to(jnp.arange(self.k) < sent, output.expert_index.shape)
        return output._replace(accepted=accepted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coupled(TopK):
    """Top-K with a loss that couples each router column to its expert: the expert must respond more to its own column
    than to others, and more than other experts do (ERC: Lv et al. 2025, arXiv 2512.23447, equation 3)."""

    k: int = setting(8, least=1)
    coupling: float = setting(1.0, least=0, most=1e6)  # weight of the loss; not from the paper
    strength: float = setting(1.0, least=0, most=1e6)  # α; below 1 experts must differ more

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Select by score, bias and groups."""
        return self.select(router_logits, inputs)

    def parameter_loss(
        self, router: Float[Array, "D E"], experts: Float[Array, "E D F"], rng: Array | None
    ) -> Float[Array, ""]:
        """The weighted coupling loss, of columns with noise in training."""
        return self.coupling * coupling_loss(router, experts, self.strength, rng)


def coupling_loss(
    router: Float[Array, "D E"], experts: Float[Array, "E D F"], strength: float, rng: Array | None
) -> Float[Array, ""]:
    """1/E²·Σ_i Σ_{j≠i} max(M_ij − α·M_ii, 0) + max(M_ji − α·M_ii, 0), M_ij the norm of what expert j makes of column i
    (ERC 2025, equation 3).

    With a key each number of column i is multiplied by U[1 − ε_i, 1 + ε_i], ε_i half the distance to the nearest column
    over the column's norm, so that it stays nearest to its own. The factors have no gradient.
    """
    columns = router.T
    if rng is not None:
        fixed = jax.lax.stop_gradient(columns)
        apart = jnp.sqrt(jnp.sum(jnp.square(fixed[:, None] - fixed), axis=-1))
        nearest = jnp.min(jnp.where(jnp.eye(len(fixed), dtype=bool), jnp.inf, apart), axis=-1)
        bound = nearest / (2 * jnp.maximum(jnp.linalg.norm(fixed, axis=-1), 1e-9))
        bound = jnp.where(jnp.isfinite(bound), bound, 0.0)[:, None]  # one expert has no neighbour
        columns = columns * (1 + bound * jax.random.uniform(rng, columns.shape, minval=-1.0, maxval=1.0))
    responses = jnp.einsum("id,jdf->ijf", columns, experts)
    # The slope of a norm is infinite at 0.
    norms = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(responses), axis=-1), 1e-20))
    own = strength * jnp.diagonal(norms)
    excess = jax.nn.relu(norms - own[:, None]) + jax.nn.relu(norms - own)
    return jnp.sum(jnp.where(jnp.eye(len(norms), dtype=bool), 0.0, excess)) / len(norms) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerIteration(TopK):
    """Top-K of logits whose columns are tied to the experts: W_g after a step of power iteration on each expert's gate
    matrix, in columns of one length (MPI: Wu et al. 2026, arXiv 2606.12397, equations 4 to 6).

    8 of 64 experts as in the paper, whose sweep has its best ``length``, C′, at 4 (table 6); weights are not
    renormalised, as in its figure 1.
    """

    layer: ClassVar[str] = "moe.layers.power_iteration:PowerIterationMoE"

    k: int = setting(8, least=1)
    length: float = setting(4.0, above=0, most=1e6)  # C′: columns have the length C′/√E

    def check_experts(self, num_experts: int, null_experts: int = 0) -> None:
        """Check K, and that every column has an expert's matrix."""
        super().check_experts(num_experts, null_experts)
        kinds = "model.moe zero, copy, constant and novice experts"
        allowed = f"must be 0 with the gate {self.name!r}, whose columns are made of the experts' matrices"
        require(null_experts == 0, kinds, null_experts, allowed)

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Select by score, bias and groups."""
        return self.select(router_logits, inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KMeans(TopK):
    """Top-K of the cosines of a token with the experts' centroids + selection bias, weighted by the cosines; centroids
    are moving averages of the tokens sent to the experts, and the router learns nothing by gradient (Ahrac et al. 2026,
    arXiv 2605.12476, and ``MoECentroidRouter`` of the authors' released code).

    The rates are those of their training script at its highest learning rate, to which it keeps both proportional.
    """

    layer: ClassVar[str] = "moe.layers.k_means:KMeansMoE"

    k: int = setting(6, least=1)
    bias: BiasRule = "sign"
    bias_rate: float = setting(1e-3, least=0, most=1e6)
    centroid_rate: float = setting(0.01, share=True)  # 1 − α of the centroids

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "model.moe.gate."
        for name, value in (("score", "softmax"), ("bias", "sign")):
            allowed = f"must be {value} with centroids, whose weights are cosines and whose bias moves by signs"
            require(getattr(self, name) == value, f"{where}{name}", getattr(self, name), allowed)

    def scores(self, router_logits: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        """The cosines."""
        return router_logits

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Select by cosine and bias."""
        return self.select(router_logits, inputs)

    @property
    def balancing(self) -> BalancingRule:
        """The rule of the bias and the centroids."""
        return Centroids(self.bias_rate, self.centroid_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentPools(TopK):
    """Top-K within the pool of a token's document: the experts with the largest sums of the softmax over the document's
    tokens; weights are of the softmax over the pool (EMO 2026, arXiv 2605.06663, and its released code).

    In training the size of each document's pool is uniform from ``least_pool`` to ``most_pool``. A document is a run of
    one ``GateInputs.segment_ids`` within a group, or the group where there are none. Text is generated with the pool of
    its prompt. Deviation: the z-loss is of the logits of all experts, not of the pool's.
    """

    looks_ahead: ClassVar[bool] = True

    k: int = setting(7, least=1)
    least_pool: float = setting(1 / 16, above=0, most=1)  # share of the experts; a pool has at least K
    most_pool: float = setting(1.0, above=0, most=1)
    pool: float = setting(0.25, above=0, most=1)  # in evaluation

    def __post_init__(self) -> None:
        super().__post_init__()
        where, alone = "model.moe.gate.", "with pools of documents"
        require(self.bias == "none", f"{where}bias", self.bias, f"must be none {alone}")
        require(self.groups == 1, f"{where}groups", self.groups, f"must be 1 {alone}")
        require(self.score == "softmax", f"{where}score", self.score, f"must be softmax {alone}")
        ordered = self.least_pool <= self.most_pool
        require(ordered, f"{where}least_pool", self.least_pool, f"must be at most most_pool={self.most_pool}")

    def size(self, share: float, num_experts: int) -> int:
        """Number of experts in a pool of this share of them."""
        return max(self.k, math.ceil(share * num_experts))

    def route(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> GateOutput:
        """Choose and weigh within the pools: those of the documents, or after a prompt that of the prompt."""
        pool = self._pools(router_logits, inputs) if inputs.prompt is None else inputs.prompt[:, None]
        pooled = jnp.where(pool, router_logits, -jnp.inf)
        return self.select(pooled, inputs)._replace(probs=jax.nn.softmax(pooled, axis=-1))

    def of_prompt(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> Bool[Array, "G E"]:
        """The pool of each prompt."""
        return self._pools(router_logits, inputs)[:, 0]

    def _pools(self, router_logits: Float[Array, "G S E"], inputs: GateInputs) -> Bool[Array, "G S E"]:
        """Experts in the pool of each token's document. Without a key, pools have the size of evaluation."""
        first, last = documents(inputs)
        probs = jnp.where(inputs.mask[..., None], jax.nn.softmax(jax.lax.stop_gradient(router_logits), axis=-1), 0.0)
        # Sums of documents as differences of prefix sums, which are the same numbers for all tokens of a document.
        sums = jnp.pad(jnp.cumsum(probs, axis=1), ((0, 0), (1, 0), (0, 0)))
        start, stop = (jnp.take_along_axis(sums, at[..., None], axis=1) for at in (first, last + 1))
        least, most, fixed = (
            self.size(share, probs.shape[-1]) for share in (self.least_pool, self.most_pool, self.pool)
        )
        size = jnp.full(first.shape, fixed)
        if inputs.rng is not None:
            draws = jax.random.randint(inputs.rng, first.shape, least, most + 1)
            size = jnp.take_along_axis(draws, first, axis=1)
        return rank(stop - start) < size[..., None]


def documents(inputs: GateInputs) -> tuple[Int[Array, "G S"], Int[Array, "G S"]]:
    """Positions within the group of the first and the last token of each token's document."""
    groups, size = inputs.mask.shape
    place = jnp.broadcast_to(jnp.arange(size), (groups, size))
    if inputs.segment_ids is None:
        return jnp.zeros_like(place), jnp.full_like(place, size - 1)
    changes = inputs.segment_ids[:, 1:] != inputs.segment_ids[:, :-1]
    edge = jnp.ones((groups, 1), bool)
    starts, ends = jnp.concatenate([edge, changes], axis=1), jnp.concatenate([changes, edge], axis=1)
    first = jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, place, size - 1), axis=1, reverse=True)
    return first, last
