"""Error bounds of a layer in bfloat16, derived from its rounding alone: the layer's equations with random roundings.

bfloat16 keeps 8 significant bits: storing a number changes it by at most 2^-8 of itself, its unit roundoff u. Here the
equations of a SwiGLU layer, forward and backward, are computed in float64, and every number that a bfloat16 layer
stores is multiplied by 1 + δ, the δ independent and uniform in [-u, u]: rounding errors as random numbers of mean zero
(Higham and Mary 2019, "A new approach to probabilistic rounding error analysis"). Real errors are on average about 0.7
times as large, since u is reached only just above a power of two. Matmuls accumulate in float32 and round their result
once; router, weights and their sums are float32 and not rounded. :func:`bounds` is three times the root mean square
over draws of the resulting error; nothing in it is fitted to measured errors.

Inputs: those of the oracle, and its decisions. Results: for y and each gradient, a bound on norm(error)/norm(value).

Letters: G groups, S tokens per group, K choices per token, E experts, P pairs or slots, D model dim, F hidden dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from moe.conformance import reference, reference_gates

UNIT_ROUNDOFF = 2.0**-8
DRAWS = 16

Arrays = dict[str, np.ndarray]
Store = Callable[[np.ndarray], np.ndarray]


def norm_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Euclidean norm of the difference over that of the expected array."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected)) / (float(np.linalg.norm(expected)) or 1.0)


def bounds(layer: Callable[[Store], Arrays]) -> tuple[Arrays, dict[str, float]]:
    """The exact values of a layer, and three times the root mean square error of storing in bfloat16, by name.

    Args:
        layer: from :func:`sparse` or :func:`soft`.
    """
    exact = layer(lambda value: value)
    rng = np.random.default_rng(0)

    def store(value: np.ndarray) -> np.ndarray:
        return value * (1 + UNIT_ROUNDOFF * rng.uniform(-1, 1, value.shape))

    rounded = [layer(store) for _ in range(DRAWS)]
    squares = {name: [norm_error(draw[name], exact[name]) ** 2 for draw in rounded] for name in exact}
    return exact, {name: 3 * float(np.mean(values)) ** 0.5 for name, values in squares.items()}


@dataclasses.dataclass
class _Experts:
    """Forward and backward pass of rows [P,D] through their experts [P], each a SwiGLU FFN."""

    store: Store
    expert: np.ndarray
    matrices: Arrays

    def forward(self, rows: np.ndarray) -> np.ndarray:
        """[P,D] → [P,D]."""
        self.up, self.gate, self.down = (
            self.store(self.matrices[name])[self.expert] for name in ("up", "gate_matrix", "down")
        )
        store, self.rows = self.store, rows
        self.z, self.u = (store(np.einsum("pd,pdf->pf", rows, matrix)) for matrix in (self.gate, self.up))
        self.sigmoid = store(1 / (1 + np.exp(-self.z)))
        self.a = store(self.z * self.sigmoid)
        self.h = store(self.a * self.u)
        return store(np.einsum("pf,pfd->pd", self.h, self.down))

    def backward(self, d_out: np.ndarray) -> tuple[np.ndarray, Arrays]:
        """Gradient of the outputs [P,D] → of the rows [P,D], and of the matrices."""
        store = self.store
        d_h = store(np.einsum("pd,pfd->pf", d_out, self.down))
        d_a, d_u = store(d_h * self.u), store(d_h * self.a)
        slope = store(self.sigmoid * store(1 - self.sigmoid))
        d_z = store(store(d_a * self.sigmoid) + store(store(d_a * self.z) * slope))
        d_rows = store(np.einsum("pf,pdf->pd", d_z, self.gate)) + store(np.einsum("pf,pdf->pd", d_u, self.up))
        return store(d_rows), {
            "up": self._by_expert(self.rows, d_u),
            "gate_matrix": self._by_expert(self.rows, d_z),
            "down": self._by_expert(self.h, d_out),
        }

    def _by_expert(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        total = np.zeros((len(self.matrices["up"]), left.shape[1], right.shape[1]))
        np.add.at(total, self.expert, left[:, :, None] * right[:, None, :])
        return self.store(total)


def sparse(
    gate: str,
    x: np.ndarray,
    matrices: Arrays,
    decisions: reference.Decisions,
    cotangent: np.ndarray,
    rule: reference_gates.Rule = reference_gates.PLAIN,
) -> Callable[[Store], Arrays]:
    """y and the gradients of sum(y·cotangent) as a function of how numbers are stored.

    Args:
        gate: a name in moe.config.registry.LAYERS.
        x: [G,S,D], exact in bfloat16.
        matrices: router [D,E], noise [D,E] (noisy_topk with draws), up, gate_matrix, down.
        decisions: of the oracle.
        cotangent: [G,S,D].
        rule: of the gate.
    """
    groups, tokens, choices = decisions.expert.shape
    num_experts, model_dim = len(matrices["up"]), x.shape[-1]
    x, cotangent = (array.reshape(-1, model_dim).astype(np.float64) for array in (x, cotangent))
    matrices = {name: array.astype(np.float64) for name, array in matrices.items()}
    noise_logits = x @ matrices["noise"] if "noise" in matrices else None
    draws = None if noise_logits is None else np.asarray(rule.draws).reshape(-1, num_experts)
    logits = x @ matrices["router"]
    if noise_logits is not None:
        logits = reference_gates.noisy(logits, noise_logits, draws)
    # The weight of each pair, and its derivative by the token's logits, by central differences.
    named, placed = (array.reshape(-1, choices).tolist() for array in (decisions.original, decisions.expert))

    def weights(logits: np.ndarray) -> np.ndarray:  # [G·S,E] → [G·S,K]
        rows = zip(logits, named, placed, strict=True)
        return np.array([reference_gates.assignment_weights(gate, *row, rule) for row in rows], np.float64)

    weight, step = weights(logits), 1e-5 * np.eye(num_experts)
    slope = np.stack([(weights(logits + e) - weights(logits - e)) / 2e-5 for e in step], axis=-1)
    kept = decisions.kept.reshape(-1, choices)
    token, choice = np.nonzero(kept)  # [P] each
    expert, weight = decisions.expert.reshape(-1, choices)[token, choice], weight[token, choice, None]

    def layer(store: Store) -> Arrays:
        experts = _Experts(store, expert, matrices)
        outputs = experts.forward(x[token])
        y = np.zeros_like(x)
        d_x = np.zeros_like(x)
        d_logits = np.zeros_like(logits)
        np.add.at(y, token, weight * outputs)
        d_y = store(cotangent)
        d_rows, gradients = experts.backward(store(weight * d_y[token]))
        np.add.at(d_x, token, d_rows)
        d_weight = np.sum(d_y[token] * outputs, axis=-1)
        np.add.at(d_logits, token, slope[token, choice] * d_weight[:, None])
        d_router = d_logits @ matrices["router"].T
        gradients["router"] = x.T @ d_logits
        if noise_logits is not None:
            d_noise = d_logits * draws / (1 + np.exp(-noise_logits))  # softplus' is the sigmoid
            d_router, gradients["noise"] = d_router + d_noise @ matrices["noise"].T, x.T @ d_noise
        d_x = store(store(d_x) + store(d_router))
        return {"y": store(y), "x": d_x, **gradients}

    shape = (groups, tokens, model_dim)
    return lambda store: {
        name: value.reshape(shape) if name in ("y", "x") else value for name, value in layer(store).items()
    }


def soft(x: np.ndarray, matrices: Arrays, mask: np.ndarray, cotangent: np.ndarray) -> Callable[[Store], Arrays]:
    """Soft MoE with the same rounding; router [D,E,P], mask [G,S] of real tokens, at least one in each group."""
    groups, _, model_dim = x.shape
    matrices = {name: array.astype(np.float64) for name, array in matrices.items()}
    router = matrices["router"].reshape(model_dim, -1)  # [D,E,P] → [D,E·P]
    num_experts, slots = len(matrices["up"]), router.shape[1]
    expert = np.tile(np.repeat(np.arange(num_experts), slots // num_experts), groups)
    x, logits, real = x.astype(np.float64), x.astype(np.float64) @ router, mask[..., None]
    powers = np.where(real, np.exp(logits), 0.0)
    dispatch = powers / powers.sum(1, keepdims=True)
    combine = powers / np.maximum(powers.sum(2, keepdims=True), 1e-300)

    def layer(store: Store) -> Arrays:
        experts, sent = _Experts(store, expert, matrices), store(dispatch)
        rows = store(np.einsum("gsp,gsd->gpd", sent, x))
        outputs = experts.forward(rows.reshape(-1, model_dim)).reshape(rows.shape)
        d_y = store(cotangent.astype(np.float64))
        d_outputs = store(np.einsum("gsp,gsd->gpd", combine, d_y))
        d_rows, gradients = experts.backward(d_outputs.reshape(-1, model_dim))
        d_rows = d_rows.reshape(rows.shape)
        d_dispatch, d_combine = store(np.einsum("gsd,gpd->gsp", x, d_rows)), np.einsum("gsd,gpd->gsp", d_y, outputs)
        # Backward through a softmax p: p·(d − Σ p·d), over tokens and over slots.
        d_logits = dispatch * (d_dispatch - np.sum(dispatch * d_dispatch, axis=1, keepdims=True))
        d_logits += combine * (d_combine - np.sum(combine * d_combine, axis=2, keepdims=True))
        gradients["router"] = np.einsum("gsd,gsp->dp", x, d_logits).reshape(matrices["router"].shape)
        d_x = store(np.einsum("gsp,gpd->gsd", sent, d_rows)) + store(d_logits @ router.T)
        return {"y": store(np.einsum("gsp,gpd->gsd", combine, outputs)), "x": store(d_x), **gradients}

    return layer
