"""Logits of two tokens for values computed by hand, and a call of `route`."""

import jax.numpy as jnp
import numpy as np

from moe.routing.registry import GATES
from moe.routing.routing import route

# Two tokens with probabilities (6, 3, 1, 2)/12 and (1, 2, 9, 4)/16.
LOGITS = np.log([[[6.0, 3.0, 1.0, 2.0], [1.0, 2.0, 9.0, 4.0]]])
# Sigmoids: token 0 (0.8, 0.5, 0.6, 0.2), token 1 (0.1, 0.3, 0.4, 0.9); s/(1 − s) is the exponential of the logit.
SIGMOIDS = np.array([[[0.8, 0.5, 0.6, 0.2], [0.1, 0.3, 0.4, 0.9]]])
SIGMOID_LOGITS = np.log(SIGMOIDS / (1 - SIGMOIDS))
# One token whose softplus is 4, 1, 9, 16.
SOFTPLUS_LOGITS = np.log(np.expm1([[[4.0, 1.0, 9.0, 16.0]]]))


def routed(gate, logits, k=None, mask=None, **given):
    """route() on logits [G,S,E], all real unless said otherwise, without DeepSeek-V3's groups."""
    logits = jnp.asarray(logits, jnp.float32)
    mask = jnp.ones(logits.shape[:2], bool) if mask is None else jnp.asarray(mask)
    k = k or GATES[gate].experts_per_token or logits.shape[-1]
    given = {"expert_groups": 1, "kept_expert_groups": 1} | given
    return route(GATES[gate], logits, mask, experts_per_token=k, **given)
