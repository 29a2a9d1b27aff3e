"""Sampled completions with the log-probability of each token and the experts of each token that the model read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe.config import ConfigError, ModelConfig
from moe.models import kv_cache
from moe.models.factory import abstract_model
from moe.models.sampling import check_prompts, pad_prompts, without_drops


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One completion.

    Attributes:
        tokens: [n] int32, the stop token included.
        log_probs: [n] float32, of each token at temperature 1 over the whole vocabulary, nats.
        experts: [p + n - 1, L, K] int32 of the tokens of prompt and completion but the last, in the MoE layers; None in
            a dense model.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    experts: np.ndarray | None


#: (variables, prompts, key) → a rollout of each prompt.
Sampler = Callable[[dict[str, Any], Sequence[np.ndarray], Key[Array, ""]], list[Rollout]]


def make_sampler(config: ModelConfig, num_tokens: int, stop_tokens: Sequence[int] = ()) -> Sampler:
    """A sampler at temperature 1; it compiles once for each number of prompts and length of the longest.

    Args:
        config: of a decoder-only model.
        num_tokens: the most tokens to add to a prompt.
        stop_tokens: ids that end a completion.

    Raises:
        ConfigError: an encoder-decoder; later, see :func:`moe.models.sampling.check_prompts`.
    """
    if config.encoder_layers:
        raise ConfigError(f"model.encoder_layers={config.encoder_layers}: must be 0 to sample rollouts")
    graphdef = nnx.graphdef(abstract_model(without_drops(config)))
    stops = np.asarray(stop_tokens, np.int32)

    @jax.jit
    def run(variables: Any, token_ids: Int[Array, "B P"], lengths: Int[Array, " B"], key: Key[Array, ""]) -> Any:
        model, rows = nnx.merge(graphdef, variables), len(token_ids)
        caches = kv_cache.empty(config, rows, token_ids.shape[1] + num_tokens)
        x, caches, of_prompt = kv_cache.run_prompt(model, token_ids, lengths, caches)

        def step(carry: Any, key: Key[Array, ""]) -> Any:
            logits, positions, active, caches = carry
            tokens, log_probs = _draw(logits, key)
            going_on = active & ~jnp.isin(tokens, stops)
            x, caches, choices = kv_cache.extend(model, tokens[:, None], positions[:, None], going_on, caches)
            written = jnp.where(active, tokens, -1), log_probs, choices
            return (kv_cache.next_logits(model, x), positions + 1, going_on, caches), written

        active: Bool[Array, " B"] = jnp.ones(rows, bool)
        first = kv_cache.prompt_logits(model, x, lengths), lengths, active, caches
        _, (tokens, log_probs, written) = jax.lax.scan(step, first, jax.random.split(key, num_tokens))
        experts = None
        if of_prompt is not None:
            # [L,B,P,K], and [n,L,B,1,K] → [L,B,n,K]
            experts = of_prompt.expert_index, jnp.moveaxis(written.expert_index[:, :, :, 0], 0, 2)
        return tokens.T, log_probs.T, experts

    def sample(variables: dict[str, Any], prompts: Sequence[np.ndarray], key: Key[Array, ""]) -> list[Rollout]:
        check_prompts(config, prompts)
        token_ids, lengths = pad_prompts(prompts)
        tokens, log_probs, experts = jax.tree.map(np.asarray, run(variables, token_ids, lengths, key))
        found = []
        for row in range(len(prompts)):
            count, length = int((tokens[row] >= 0).sum()), int(lengths[row])
            of_row = None
            if experts is not None:
                parts = experts[0][:, row, :length], experts[1][:, row, : count - 1]
                of_row = np.concatenate(parts, axis=1).swapaxes(0, 1)  # [L,T,K] → [T,L,K]
            found.append(Rollout(tokens[row, :count], log_probs[row, :count], of_row))
        return found

    return sample


def _draw(logits: Float[Array, "B V"], key: Key[Array, ""]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token of each row and its log-probability."""
    tokens = jax.random.categorical(key, logits).astype(jnp.int32)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return tokens, jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]
