"""Text from a model: prompts of unequal length in, tokens out as they are chosen.

In: a model's variables and prompts. Out: a stream of one token a row, or whole rows. Every step costs one position
(:mod:`moe.models.kv_cache`). Nothing is dropped, so that a row's text does not depend on what shares its batch.

Letters: B rows, T columns of the prompts, V vocab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moe.config import ConfigError, ModelConfig
from moe.models import kv_cache
from moe.models.decoder import Transformer
from moe.models.stack import LayerStates
from moe.parallel import partition_specs
from moe.routing.registry import find_gate


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: choose among this many likeliest; 0: all.
        top_p: choose among the fewest likeliest tokens that together have this probability.
        stop_tokens: a row ends after any of these.
        seed: of the draws; row b draws the same whatever the other rows are.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("temperature", self.temperature >= 0, "must be at least 0"),
            ("top_k", self.top_k >= 0, "must be at least 0"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
        ):
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {allowed}")


def choose(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """logits [B,V] float32 and a key per row → tokens [B] int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def without_drops(config: ModelConfig) -> ModelConfig:
    """The same model with room for every token in one group a row: text must not depend on what shares its batch.

    A gate that looks ahead keeps its capacity, which is part of its function.
    """
    if config.moe.gate == "none" or find_gate(config.moe.gate).looks_ahead:
        return config
    k = config.moe.experts_per_token
    moe = dataclasses.replace(config.moe, group_size=0, eval_capacity_factor=config.moe.num_experts / k)
    return dataclasses.replace(config, moe=moe)


def stream(
    config: ModelConfig,
    variables: dict[str, Any],
    prompts: Sequence[Sequence[int] | np.ndarray],
    num_tokens: int,
    sampling: Sampling = Sampling(),
) -> Iterator[np.ndarray]:
    """Continues prompts, a token a row at a time.

    Args:
        config: of the model.
        variables: nested dict of all its variables, on the mesh in context if there is one.
        prompts: B token sequences of any lengths from 1.
        num_tokens: at most so many more.
        sampling: how they are chosen.

    Yields:
        [B] int32, the next token of each row, -1 after a row's stop token; ends when all rows have.

    Raises:
        ConfigError: no prompts, an empty one, a token that the model has not, or a gate that needs later tokens.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("prompts: give at least one, each of at least one token")
    if any(not 0 <= int(token) < config.vocab_size for prompt in prompts for token in prompt):
        raise ConfigError(f"prompts: tokens must be from 0 to {config.vocab_size - 1}")
    if config.moe.gate != "none" and find_gate(config.moe.gate).looks_ahead:
        raise ConfigError(f"model.moe.gate={config.moe.gate!r}: routes by later tokens, which a text has not yet")
    config = without_drops(config)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in partition_specs.TOKEN_AXES]))
    rows = -(-len(prompts) // shards) * shards  # rows are split over the mesh: idle ones fill it up
    lengths = np.ones(rows, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens = np.zeros((rows, lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt)] = prompt
    active = np.arange(rows) < len(prompts)
    stops = np.asarray(sampling.stop_tokens, np.int32)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(sampling.seed), row))(jnp.arange(rows))

    def pick(logits: Array, positions: Array) -> Array:
        """The token at each row's position."""
        return choose(logits, jax.vmap(jax.random.fold_in)(keys, positions), sampling)

    @jax.jit
    def begin(variables: Any, tokens: Array, lengths: Array) -> tuple[Array, LayerStates]:
        caches = kv_cache.empty(config, rows, tokens.shape[1] + num_tokens)
        logits, filled = kv_cache.prefill(nnx.merge(graphdef, variables), tokens, lengths, caches)
        return pick(logits, lengths), filled

    def step(variables: Any, token: Array, positions: Array, active: Array, filled: LayerStates) -> Any:
        active &= ~jnp.isin(token, stops)
        logits, filled = kv_cache.decode(nnx.merge(graphdef, variables), token, positions, active, filled)
        return pick(logits, positions + 1), positions + 1, active, filled

    step = jax.jit(step, donate_argnums=4)
    token, filled = begin(variables, tokens, lengths)
    positions = jnp.asarray(lengths)
    for i in range(num_tokens):
        shown, shown_active = token, active
        if i + 1 < num_tokens:  # started before the last token is read: the device never waits for the host
            token, positions, active, filled = step(variables, token, positions, active, filled)
        chosen = np.where(np.asarray(shown_active), np.asarray(shown), -1)[: len(prompts)]
        if (chosen == -1).all():
            return
        yield chosen


def sample(
    config: ModelConfig,
    variables: dict[str, Any],
    prompts: Sequence[Sequence[int] | np.ndarray],
    num_tokens: int,
    sampling: Sampling = Sampling(),
) -> list[np.ndarray]:
    """The continuations of :func:`stream`, whole: B arrays of at most num_tokens int32, stop tokens included."""
    columns = list(stream(config, variables, prompts, num_tokens, sampling))
    table = np.stack(columns, axis=1) if columns else np.zeros((len(prompts), 0), np.int32)
    return [row[row >= 0] for row in table]
