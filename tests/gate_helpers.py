"""Logits of two tokens for values computed by hand, and a call of `route`."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from moe.config.registry import LAYERS
from moe.routing.interface import GateInputs
from moe.routing.routing import route
from tests.helpers import gate_named

# Two tokens with probabilities (6, 3, 1, 2)/12 and (1, 2, 9, 4)/16.
LOGITS = np.log([[[6.0, 3.0, 1.0, 2.0], [1.0, 2.0, 9.0, 4.0]]])
# Sigmoids: token 0 (0.8, 0.5, 0.6, 0.2), token 1 (0.1, 0.3, 0.4, 0.9); s/(1 − s) is the exponential of the logit.
SIGMOIDS = np.array([[[0.8, 0.5, 0.6, 0.2], [0.1, 0.3, 0.4, 0.9]]])
SIGMOID_LOGITS = np.log(SIGMOIDS / (1 - SIGMOIDS))
# One token whose softplus is 4, 1, 9, 16.
SOFTPLUS_LOGITS = np.log(np.expm1([[[4.0, 1.0, 9.0, 16.0]]]))


def routed(gate, logits, k=None, mask=None, replay=None, **given):
    """route() on logits [G,S,E], all real unless said otherwise; ``given``: fields of the gate, inputs of the call."""
    logits = jnp.asarray(logits, jnp.float32)
    mask = jnp.ones(logits.shape[:2], bool) if mask is None else jnp.asarray(mask)
    own = {field.name for field in dataclasses.fields(LAYERS[gate].gate)}
    fields = {name: value for name, value in given.items() if name in own}
    inputs = {name: value for name, value in given.items() if name not in own}
    return route(gate_named(gate, k, **fields), logits, GateInputs(mask, **inputs), replay=replay)
