"""The router decides: logits in, who goes where and with which weight out. All in float32.

In: ``router_logits`` [G,S,E] and a mask of real tokens [G,S]. Out: a :class:`Routing`. Nothing here knows of
capacity, buffers or meshes; that is :mod:`moe.dispatch`. A gate is one function and one entry of :data:`GATES`,
whose constants are its paper's and the defaults of the config.

Letters: G groups, S tokens per group, E experts, K choices per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a gate decided for every token.

    Attributes:
        expert_index: [G,S,K] int32, the experts of a token, first choice first.
        combine_weights: [G,S,K] float32, what each expert's output is multiplied by; 0 where not chosen.
        chosen: [G,S,K] bool, False where the token is not sent: padding, or a choice the gate declined.
        router_logits: [G,S,E] float32.
        router_probs: [G,S,E] float32, softmax of the logits over E.
    """

    expert_index: Array
    combine_weights: Array
    chosen: Array
    router_logits: Array
    router_probs: Array


@dataclasses.dataclass(frozen=True)
class Gate:
    """A paper's rule and its constants; each constant is the default of the field of that name in ``model.moe``.

    Attributes:
        choose: (router_logits [G,S,E], K, rng or None) → (expert_index [G,S,K], weights [G,S,K], accepted [G,S,K]).
            Without an rng the rule is deterministic (evaluation).
        source: paper and equation.
        experts_per_token: K; 0 means every expert.
        fixed_k: whether the rule exists for that K only.
        balance_first_choice: whether the load-balancing loss counts first choices alone.
    """

    choose: Callable[[Array, int, Array | None], tuple[Array, Array, Array]]
    source: str
    experts_per_token: int
    capacity_factor: float
    eval_capacity_factor: float
    load_balancing_weight: float = 0.0
    z_loss_weight: float = 0.0
    jitter: float = 0.0
    fixed_k: bool = False
    balance_first_choice: bool = False


def route(
    gate: Gate, router_logits: Array, mask: Array, *, experts_per_token: int, rng: Array | None = None
) -> Routing:
    """Applies a gate and takes padding out.

    Args:
        gate: an entry of :data:`GATES`.
        router_logits: [G,S,E], cast to float32.
        mask: [G,S] bool, True for real tokens. Padding is never chosen and has zero weights.
        experts_per_token: K, at most E.
        rng: key for gates that draw; None in evaluation.
    """
    router_logits = router_logits.astype(jnp.float32)
    expert_index, weights, accepted = gate.choose(router_logits, experts_per_token, rng)
    chosen = accepted & mask[..., None]
    return Routing(
        expert_index=expert_index.astype(jnp.int32),
        combine_weights=jnp.where(chosen, weights, 0.0),
        chosen=chosen,
        router_logits=router_logits,
        router_probs=jax.nn.softmax(router_logits, axis=-1),
    )


def top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """``jax.lax.top_k`` as k rounds of argmax: scores [...,E] → values [...,K], indices [...,K]; ties to the lower index.

    XLA's partitioner cannot split ``lax.top_k`` over tokens: on a mesh every device would gather everyone's logits and
    route all tokens. Reductions over E it splits, and the gradient is elementwise instead of a scatter.
    """
    experts = jnp.arange(scores.shape[-1])
    remaining, indices = jax.lax.stop_gradient(scores), []
    for _ in range(k):
        indices.append(jnp.argmax(remaining, axis=-1))
        remaining = jnp.where(indices[-1][..., None] == experts, -jnp.inf, remaining)
    index = jnp.stack(indices, axis=-1)
    # [...,1,E] where [...,K,E] → [...,K]
    values = jnp.sum(jnp.where(index[..., None] == experts, scores[..., None, :], 0.0), axis=-1)
    return values, index


def dense_mixture(router_logits: Array, k: int, rng: Array | None) -> tuple[Array, Array, Array]:
    """Every token to every expert, weighted by the softmax: y = Σ_e p_e E_e(x) (Jacobs et al. 1991, equation 1)."""
    del k, rng
    expert_index = jnp.broadcast_to(jnp.arange(router_logits.shape[-1]), router_logits.shape)
    return expert_index, jax.nn.softmax(router_logits, axis=-1), jnp.ones_like(expert_index, bool)


def switch(router_logits: Array, k: int, rng: Array | None) -> tuple[Array, Array, Array]:
    """Top-k of the full softmax, not renormalised, so that at k = 1 the router learns (Switch 2021, equation 2)."""
    del rng
    weights, expert_index = top_k(jax.nn.softmax(router_logits, axis=-1), k)
    return expert_index, weights, jnp.ones_like(expert_index, bool)


def gshard(router_logits: Array, k: int, rng: Array | None) -> tuple[Array, Array, Array]:
    """Top-2 renormalised over the two; the second is sent if 2·g2 > U(0,1) (GShard 2020, algorithm 1).

    Without an rng every second expert is sent. A declined second expert leaves the first one's weight as it is.
    """
    top_probs, expert_index = top_k(jax.nn.softmax(router_logits, axis=-1), k)
    weights = top_probs / jnp.sum(top_probs, axis=-1, keepdims=True)
    accepted = jnp.ones_like(expert_index, bool)
    if rng is not None:
        accepted = accepted.at[..., 1].set(2.0 * weights[..., 1] > jax.random.uniform(rng, weights.shape[:-1]))
    return expert_index, weights, accepted


def mixtral(router_logits: Array, k: int, rng: Array | None) -> tuple[Array, Array, Array]:
    """Top-k of the logits, weights their softmax: Softmax(TopK(x·W_g)) (Mixtral 2024, section 2.1)."""
    del rng
    top_logits, expert_index = top_k(router_logits, k)
    return expert_index, jax.nn.softmax(top_logits, axis=-1), jnp.ones_like(expert_index, bool)


GATES: dict[str, Gate] = {
    "dense_mixture": Gate(
        dense_mixture,
        "Jacobs et al. 1991, equation 1",
        experts_per_token=0,
        capacity_factor=1.0,  # K = E: C = S, nothing is ever dropped
        eval_capacity_factor=1.0,
        fixed_k=True,
    ),
    "switch": Gate(
        switch,
        "Switch 2021, equations 1-6",
        experts_per_token=1,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        load_balancing_weight=0.01,
        jitter=0.01,
    ),
    "gshard": Gate(
        gshard,
        "GShard 2020, algorithm 1",
        experts_per_token=2,
        capacity_factor=1.0,  # the paper's C = 2T/(G·E) is 1.0 with the K inside
        eval_capacity_factor=1.0,
        load_balancing_weight=0.01,
        fixed_k=True,
        balance_first_choice=True,
    ),
    "mixtral": Gate(
        mixtral,
        "Mixtral 2024, section 2.1",
        experts_per_token=2,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        load_balancing_weight=0.02,
    ),
}
