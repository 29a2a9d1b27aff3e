"""The oracle of attention: norm, rotary positions and scores in plain loops, independent of ``moe``."""

from __future__ import annotations

import math

import numpy as np

from moe.conformance.reference_gates import softmax


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    """One vector: x_i / sqrt(mean x² + epsilon) · scale_i."""
    mean = sum(float(value) ** 2 for value in x) / len(x)
    return np.array([value / math.sqrt(mean + epsilon) * s for value, s in zip(x, scale, strict=True)])


def rope(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """One head [H]: pair (i, i + H/2) turned by position·theta^(-2i/H)."""
    half = len(x) // 2
    turned = np.empty(len(x))
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return turned


def attention(
    x: np.ndarray,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    out: np.ndarray,
    segment_ids: np.ndarray,
    positions: np.ndarray,
    *,
    theta: float,
    window: int = 0,
    norm: str = "none",
    query_scale: np.ndarray | None = None,
    key_scale: np.ndarray | None = None,
    epsilon: float = 0.0,
) -> np.ndarray:
    """Causal attention in float64, query by query and head by head.

    Args:
        x: [B,T,D].
        query, key, value, out: [D,N,H], [D,M,H], [D,M,H], [N,H,D]; query head n reads key head n·M//N.
        segment_ids, positions: [B,T].
        theta: of the rotary positions.
        window: how many tokens back a query sees, itself included; 0: all.
        norm: none, head (over H) or full (over all heads at once), before the rotation.
        query_scale, key_scale: of that norm, [H], or [N·H] and [M·H].
        epsilon: of that norm.
    """
    x = x.astype(np.float64)

    def heads(token: np.ndarray, matrix: np.ndarray, scale: np.ndarray | None, position: int | None) -> np.ndarray:
        _, number, dim = matrix.shape
        projected = np.array([[token @ matrix[:, n, h] for h in range(dim)] for n in range(number)])
        if scale is not None and norm == "head":
            projected = np.array([rms_norm(head, scale, epsilon) for head in projected])
        if scale is not None and norm == "full":
            projected = rms_norm(projected.reshape(-1), scale, epsilon).reshape(projected.shape)
        return projected if position is None else np.array([rope(head, position, theta) for head in projected])

    batch, length, _ = x.shape
    num_heads, num_kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[2]
    y = np.zeros(x.shape)
    for b in range(batch):
        q = [heads(x[b, t], query, query_scale, positions[b, t]) for t in range(length)]
        k = [heads(x[b, t], key, key_scale, positions[b, t]) for t in range(length)]
        v = [heads(x[b, t], value, None, None) for t in range(length)]
        for t in range(length):
            visible = [
                u for u in range(t + 1) if segment_ids[b, u] == segment_ids[b, t] and (window == 0 or t - u < window)
            ]
            for n in range(num_heads):
                m = n * num_kv_heads // num_heads
                probs = softmax(np.array([q[t][n] @ k[u][m] / math.sqrt(head_dim) for u in visible]))
                mixed = sum(prob * v[u][m] for prob, u in zip(probs, visible, strict=True))
                y[b, t] += mixed @ out[n]
    return y
