"""Text from a model.

In: a model's parameters and prompts. Out: sampled continuations. Every step runs the whole row again, which is enough
for a short sample at the end of a run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moe.config import ModelConfig
from moe.transformer import Transformer


def without_drops(config: ModelConfig) -> ModelConfig:
    """The same model with room for every token in one group a row: text must not depend on what shares its batch."""
    k = config.moe.experts_per_token
    moe = dataclasses.replace(config.moe, group_size=0, eval_capacity_factor=config.moe.num_experts / k)
    return dataclasses.replace(config, moe=moe)


def sample(
    config: ModelConfig,
    parameters: dict[str, Any],
    prompts: np.ndarray,
    num_tokens: int,
    *,
    temperature: float = 0.8,
    seed: int = 0,
) -> np.ndarray:
    """Continues prompts by num_tokens each.

    Args:
        config: of the model.
        parameters: nested dict.
        prompts: [B,P] int32, of equal length; B divisible by the mesh's token shards.
        num_tokens: how many to add.
        temperature: of the softmax; 0 takes the likeliest token.
        seed: of the draws.

    Returns:
        [B,P+num_tokens] int32.
    """
    config = without_drops(config)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    length = prompts.shape[1]
    buffer = np.zeros((prompts.shape[0], length + num_tokens), np.int32)
    buffer[:, :length] = prompts

    @jax.jit
    def run(parameters: dict[str, Any], buffer: Array, key: Array) -> Array:
        model = nnx.merge(graphdef, parameters)

        def extend(i: Array, buffer: Array) -> Array:
            logits = model(buffer).logits[:, i - 1].astype(jnp.float32)  # [B,V]
            if temperature == 0:
                token = jnp.argmax(logits, axis=-1)
            else:
                token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
            return buffer.at[:, i].set(token.astype(jnp.int32))

        return jax.lax.fori_loop(length, length + num_tokens, extend, buffer)

    return np.asarray(run(parameters, jnp.asarray(buffer), jax.random.key(seed)))
